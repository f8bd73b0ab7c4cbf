"""Tokens that the base has no embedding for are refused before it is loaded."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import datasets
import pytest
import transformers as hf

from adalora_scale.config import DataConfig, ModelConfig, RunConfig
from adalora_scale.data.preparing import Prepared
from adalora_scale.errors import UserError
from adalora_scale.placing.tokens import embedding_rows, largest_token, require_rows

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def base(folder, rows=16, **options):
    shape = hf.LlamaConfig(vocab_size=rows, num_key_value_heads=2, **SIZES, **options)
    hf.LlamaForCausalLM(shape).save_pretrained(folder)
    return RunConfig(
        model=ModelConfig(model_name_or_path=str(folder)),
        data=DataConfig(train=""),
        training={"output_dir": str(folder / "out")},
    )


def tokenizer(**ids):
    return SimpleNamespace(
        **{f"{name}_token_id": number for name, number in ids.items()},
        all_special_ids=list(ids.values()),
        convert_ids_to_tokens=lambda number: f"<{number}>",
    )


def rows(*lines):
    return datasets.Dataset.from_dict({"input_ids": [list(line) for line in lines]})


def test_the_largest_token_of_rows_is_found():
    """Over chunks, selections and empty rows; else some row's token is not looked at."""
    dataset = datasets.concatenate_datasets([rows([1, 5], []), rows([7, 2], [3])])
    assert largest_token(dataset) == 7
    assert largest_token(dataset.select([3, 0])) == 5
    assert largest_token(rows([])) == -1


@pytest.mark.parametrize(
    ("train", "held_out", "ids", "token"),
    [
        ([1, 16], None, {"pad": 0}, "token 16 .*of the rows of data"),
        ([1, 2], [17], {"pad": 0}, "token 17 .*of the rows of data"),
        ([1, 2], None, {"pad": 16}, "token 16 .*of the tokenizer's pad_token"),
        ([1, 2], None, {"pad": 0, "eos": 20}, "token 20 .*of the tokenizer's eos_token"),
    ],
)
def test_a_token_beyond_is_refused(tmp_path, train, held_out, ids, token):
    """Else an IndexError in the first step, or on a GPU an assert of the device that names nothing."""
    data = Prepared(rows(train), rows(held_out) if held_out else None, {})
    with pytest.raises(UserError, match=rf"{token}.* has 16 \(0 to 15\).*model\.tokenizer_name_or_path"):
        require_rows(base(tmp_path), tokenizer(**ids), data, None)


def test_what_has_a_row_passes(tmp_path, capsys):
    """The last row counts; a special token that no row holds is only named (Gemma has one for images)."""
    require_rows(base(tmp_path), tokenizer(pad=15, image=16), Prepared(rows([15, 0]), None, {}), None)
    assert "<16>" in capsys.readouterr().out


def test_the_files_count_where_the_config_says_otherwise(tmp_path):
    """Else a config.json with a rounded vocab_size would let tokens through that have no row."""
    config = base(tmp_path, rows=16)
    shape = hf.LlamaConfig.from_pretrained(tmp_path)
    shape.vocab_size = 64
    shape.save_pretrained(tmp_path)
    assert embedding_rows(config) == 16


@pytest.mark.parametrize(
    ("largest", "size", "expected"),
    [(15, 16, None), (16, 17, 64), (15, 70, 128), (63, 16, 64), (64, 16, 128)],
)
def test_how_many_rows_the_embedding_gets(tmp_path, largest, size, expected):
    """All tokens of the tokenizer have one of 64, 128 … rows; none is added where none lacks."""
    config = base(tmp_path)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, resize_token_embeddings=True))
    words = type("Words", (SimpleNamespace,), {"__len__": lambda self: size})(**vars(tokenizer(pad=0)))
    assert require_rows(config, words, Prepared(rows([largest]), None, {}), None) == expected
