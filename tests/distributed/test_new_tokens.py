"""A base whose embedding lacks rows for tokens: they are added, trained and saved alike on every engine."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from adalora_scale.checkpoint.format import Checkpoint
from tests.distributed.launcher import run_ranks
from tests.distributed.test_resume import TRAIN
from tests.distributed.test_trainer_engines import DEEPSPEED, distances

full = pytest.mark.full
OPTIONS = (
    "model.resize_token_embeddings=true", "training.weight_decay=0.0", "training.max_steps=8", "adalora.tfinal=2",
    "training.save_steps=4", "training.save_total_limit=9",
)  # fmt: skip
IN_4_BIT = ("model.load_in_4bit=true", "model.bnb_4bit_compute_dtype=float32")
OLD, NEW = 512, 576


@pytest.fixture(scope="module")
def bases(stories260k, tmp_path_factory):
    """The small real model with two more words in its tokenizer, head and embedding tied or not."""

    @functools.cache
    def made(tied):
        folder = tmp_path_factory.mktemp("base")
        model = hf.AutoModelForCausalLM.from_pretrained(stories260k)
        if not tied:
            model.config.tie_word_embeddings = False
            torch.manual_seed(1)
            noise = 0.01 * torch.randn_like(model.lm_head.weight)
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + noise)
        model.save_pretrained(folder)
        tokenizer = hf.AutoTokenizer.from_pretrained(stories260k)
        assert len(tokenizer) == OLD == model.config.vocab_size
        tokenizer.add_tokens(["restaurant", "you"])
        tokenizer.save_pretrained(folder)
        return folder

    return made


@pytest.fixture(scope="module")
def trained(bases, data_dir, tmp_path_factory, request):
    @functools.cache
    def train(engine, ranks, tied, in_4_bit, *extra):
        if engine in DEEPSPEED:
            request.getfixturevalue("deepspeed_ops")
        folder = tmp_path_factory.mktemp(engine)
        env = {"DS_ACCELERATOR": "cpu"} if engine in DEEPSPEED else {}
        options = [*OPTIONS, *(IN_4_BIT if in_4_bit else ()), *extra]
        found = run_ranks(TRAIN, ranks, [engine, "sft", bases(tied), data_dir, folder, *options], timeout=300, env=env)
        return found, folder

    return train


@pytest.mark.shows(
    "training",
    task="causal_lm",
    engine="{engine}",
    base=lambda given: "4-bit, made while loading" if given["in_4_bit"] else "float32",
)
@pytest.mark.shows("features", feature="trained output head or embedding, new tokens", engine="{engine}")
@pytest.mark.parametrize(
    ("engine", "tied", "in_4_bit"),
    [
        ("fsdp2", True, True),
        *(pytest.param(e, True, False, marks=full) for e in ("ddp", "fsdp2", "zero1", "zero2", "zero3")),
        *(pytest.param(e, False, False, marks=full) for e in ("ddp", "fsdp2", "zero1", "zero2", "zero3")),
        *(pytest.param(e, False, True, marks=full) for e in ("ddp", "fsdp2", "zero2", "zero3")),
    ],
)  # fmt: skip
def test_two_ranks_are_one_process(engine, tied, in_4_bit, trained):
    """Else new rows differ from rank to rank, stay as drawn, or a shard that begins behind the files' rows is empty."""
    (alone,), one = trained("ddp", 1, tied, in_4_bit)
    both, two = trained(engine, 2, tied, in_4_bit)
    assert both[0]["masks"] == both[1]["masks"] == alone["masks"]
    wanted, found = (load_file(folder / "live.safetensors") for folder in (one, two))
    assert wanted["model.embed_tokens.weight"].shape == wanted["lm_head.weight"].shape == (NEW, 64)
    together, each = distances(wanted, found)
    assert together < 1e-6 and each < 1e-5, (together, each)
    saved = load_file(two / "out" / "adapter_model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(saved[f"base_model.model.{name}"], found[name], rtol=0, atol=0)
    first = Checkpoint(two / "out" / "checkpoint-4").read_whole("other", "weight", "model.embed_tokens.weight")
    moved = (found["model.embed_tokens.weight"] != first).all(1)
    # The rows say "you", and not all words: a row that no gradient reaches stays, but for a head that is the same.
    assert bool(moved[OLD + 1]) and (tied or not bool(moved[OLD + 2 :].any()))


@pytest.mark.shows(
    "features",
    feature="resumed bit for bit on as many ranks",
    engine=lambda given: given["engine"] if given["ranks"] > 1 else "one process",
)
@pytest.mark.shows(
    "training",
    task="causal_lm",
    engine=lambda given: "one process" if given["in_4_bit"] else None,
    base="4-bit, made while loading",
)
@pytest.mark.parametrize(
    ("engine", "ranks", "in_4_bit"),
    [("ddp", 1, True), *(pytest.param(e, 2, False, marks=full) for e in ("fsdp2", "zero2", "zero3"))],
)
def test_a_resumed_run_is_the_same_run(engine, ranks, in_4_bit, trained):
    """Else the new rows are drawn again, or their moments are lost."""
    _, straight = trained(engine, ranks, True, in_4_bit)
    resume = f"training.resume_from_checkpoint={straight / 'out' / 'checkpoint-4'}"
    _, again = trained(engine, ranks, True, in_4_bit, resume)
    one, other = (load_file(folder / "live.safetensors") for folder in (straight, again))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
