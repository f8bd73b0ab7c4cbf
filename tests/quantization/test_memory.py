"""Loading in pieces: the same bytes, each read once."""

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adalora_scale.config import AdaLoraConfig, DataConfig, ModelConfig, RunConfig
from adalora_scale.placing import streaming
from adalora_scale.quantization import fill, functional
from adalora_scale.quantization.linear import Linear4bit
from adalora_scale.quantization.memory import block_pieces, give_back_freed, row_pieces


@pytest.mark.parametrize("piece", [1, 64, 1000, 10**9])
@pytest.mark.parametrize(("blocksize", "row"), [(64, 256), (64, 96), (128, 64), (64, 100)])
def test_pieces_cover_the_range_and_cut_no_row(blocksize, row, piece):
    """A block left out stays uninitialised; a row cut is read twice."""
    blocks = 25 * row * 128 // blocksize
    for start, stop in ((0, blocks), (7, blocks - 3), (5, 5), (5, 6)):
        cuts = list(block_pieces(start, stop, blocksize, row, piece))
        assert [block for first, last in cuts for block in range(first, last)] == list(range(start, stop))
        assert all(last * blocksize % row == 0 for _, last in cuts[:-1])
    if piece == 10**9:
        assert len(list(block_pieces(7, blocks, blocksize, row, piece))) == 1


def test_rows_are_covered_too():
    """The last piece is shorter, a row longer than a piece is one."""
    assert list(row_pieces(3, 10, 10, 35)) == [(3, 6), (6, 9), (9, 10)]
    assert list(row_pieces(3, 5, 1000, 35)) == [(3, 4), (4, 5)]
    assert list(row_pieces(4, 4, 10, 35)) == []
    give_back_freed()


@pytest.fixture(params=["16 bits", "4 bits"])
def folder(request, tmp_path):
    """A checkpoint whose rows of 96 weights begin inside blocks of 64."""
    shape = LlamaConfig(
        vocab_size=61, hidden_size=96, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(tmp_path / "whole")
    if request.param == "16 bits":
        return tmp_path / "whole"
    from adalora_scale.cli import main

    assert main(["quantize", str(tmp_path / "whole"), str(tmp_path / "quantized")]) == 0
    return tmp_path / "quantized"


def test_small_pieces_load_the_same_bytes_and_read_each_once(folder, monkeypatch):
    """Matrices of real models are loaded in hundreds of pieces, those of the other tests in one."""
    config = RunConfig(
        model=ModelConfig(model_name_or_path=str(folder), load_in_4bit=folder.name == "whole"),
        data=DataConfig(train=""),
        adalora=AdaLoraConfig(),
        training={"output_dir": str(folder)},
    )
    models, read = [], []
    for piece in (10**9, 500):
        monkeypatch.setattr(fill, "PIECE", piece)
        monkeypatch.setattr(fill, "CPU_PIECE", piece)
        started = streaming.begin(config, device=torch.device("cpu"))
        models.append(streaming.load_whole(started))
        read.append(started.plan.checkpoint.bytes_read)
    names = [dict(itertools.chain(model.named_parameters(), model.named_buffers())) for model in models]
    assert names[0].keys() == names[1].keys()
    assert all(torch.equal(names[0][name], names[1][name]) for name in names[0])
    original = LlamaForCausalLM.from_pretrained(folder.parent / "whole", dtype=torch.bfloat16)
    for name, layer in models[1].named_modules():
        if isinstance(layer, Linear4bit):
            packed, scales, nested = functional.quantize(original.get_submodule(name).weight.detach(), layer.spec)
            assert torch.equal(layer.weight, packed) and torch.equal(layer.scales, scales)
            assert torch.equal(layer.nested, nested)
    if folder.name == "whole":
        assert read[0] == read[1]
