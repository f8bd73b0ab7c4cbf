"""Mixed sources: shares at every point of the order, repeats, held-out rows, packing, and the refusals."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from adalora_scale.config import DataConfig, load_config
from adalora_scale.data.mixing import MixedPart, Mixing, Mixture, MixtureSampler
from adalora_scale.data.rows import load_raw
from adalora_scale.data.tokenization import prepare_classification, prepare_language_model
from adalora_scale.errors import UserError
from adalora_scale.tasks.registry import find_task, wanted_rows


@pytest.fixture(scope="module")
def tokenizer(stories260k):
    return AutoTokenizer.from_pretrained(stories260k)


def mixture(amounts, sizes, key="weight", limit=None, rows_of=None):
    parts = [MixedPart(name=str(i), amount=a, rows=n) for i, (a, n) in enumerate(zip(amounts, sizes, strict=True))]
    rows = rows_of or [np.ones(size, dtype=np.int64) for size in sizes]
    return Mixture(Mixing(parts=tuple(parts), key=key, limit=limit), rows)


def sources_of(order, sizes):
    return np.searchsorted(np.cumsum(sizes), order, side="right")


MANY = tuple(np.random.RandomState(0).rand(40) * 5 + 0.05)


@pytest.mark.parametrize(
    ("amounts", "sizes"),
    [
        ((3, 1), (3000, 200)),
        ((1, 1), (7, 900)),
        ((0.7, 0.2, 0.1), (1000, 5000, 30)),
        ((1000, *[1] * 40), (9000, *[50] * 40)),
        (MANY, tuple(50 + 3 * i for i in range(40))),
    ],
    ids=["3 to 1", "a tiny one", "three", "one large, forty small", "forty"],
)
def test_shares_hold_over_any_thousand_rows(amounts, sizes):
    """A seeded draw would miss by three times as much: the weights would be true on average, of no batch."""
    order = mixture(amounts, sizes).order(0, 20_000, seed=1)
    found = sources_of(order, sizes)
    for source, amount in enumerate(amounts):
        before = np.concatenate([[0], np.cumsum(found == source)])
        shares = (before[1000:] - before[:-1000]) / 1000
        assert np.abs(shares - amount / sum(amounts)).max() <= 0.01


def test_each_pass_over_a_source_has_every_row_once_in_another_order():
    """Draws with replacement would leave out a third of a source's rows in a pass."""
    sizes = (30, 7)
    order = mixture((3, 1), sizes).order(0, 400, seed=5)
    for source, (start, size) in enumerate(((0, 30), (30, 7))):
        rows = order[sources_of(order, sizes) == source]
        passes = [rows[i : i + size].tolist() for i in range(0, len(rows) - size + 1, size)]
        assert all(sorted(one) == list(range(start, start + size)) for one in passes)
        assert len({tuple(one) for one in passes}) == len(passes) > 5


def test_the_order_is_one_from_wherever_it_is_read_and_another_for_each_seed():
    rng = np.random.RandomState(2)
    for rows_of in (None, [rng.randint(1, 9, 31), rng.randint(1, 30, 11), rng.randint(1, 4, 5)]):
        mixed = mixture((5, 2, 0.3), (31, 11, 5), rows_of=rows_of)
        whole = mixed.order(0, 700, seed=9)
        for step in (1, 7, 250):
            pieces = [mixed.order(at, min(at + step, 700), seed=9) for at in range(0, 700, step)]
            assert np.array_equal(np.concatenate(pieces), whole)
        assert not np.array_equal(mixed.order(0, 700, seed=10), whole)


def test_an_epoch_draws_every_row_once_at_least_or_the_rows_asked_for():
    sizes = (30, 7)
    weighted = mixture((3, 1), sizes)
    assert weighted.epoch_length == 40
    assert set(weighted.order(0, 40, seed=1)) == set(range(37))
    assert [row["passes_per_epoch"] for row in weighted.report(80)] == [1.0, pytest.approx(10 / 7, abs=1e-4)]
    asked = mixture((12, 20), sizes, key="rows")
    for epoch in range(4):
        drawn = sources_of(asked.order(32 * epoch, 32 * (epoch + 1), seed=1), sizes)
        assert (asked.epoch_length, np.bincount(drawn).tolist()) == (32, [12, 20])
    assert mixture((3, 1), sizes, limit=16).epoch_length == 16


def test_an_epoch_is_filled_up_to_whole_batches_and_the_next_goes_on():
    """Else accelerate fills the last batch, with other rows at every number of ranks."""
    mixed = mixture((3, 1), (30, 7))
    sampler = MixtureSampler(mixed, seed=4, global_batch=6)
    drawn = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        drawn += list(sampler)
    assert len(sampler) == 42 and drawn == mixed.order(0, 126, seed=4).tolist()


def files(tmp_path, **sizes):
    for name, size in sizes.items():
        rows = [json.dumps({"text": f"{name} {i}" + " word" * (i % 7), "label": i % 2}) for i in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return {name: str(tmp_path / f"{name}.jsonl") for name in sizes}


def load(train, task="causal_lm", **options):
    config = DataConfig(train=train, **options)
    return config, load_raw(config, wanted_rows(find_task(task)), seed=3)


def test_held_out_rows_come_from_every_source_and_are_never_trained_on(tmp_path):
    """Rows that repeat before they are split would stand on both sides."""
    paths = files(tmp_path, a=60, b=10)
    parts = [{"path": paths["a"], "weight": 1}, {"path": paths["b"], "weight": 1}]
    _, raw = load(parts, format="text", eval_fraction=0.2)
    trained, held_out = set(raw.train["text"][:]), raw.eval["text"][:]
    assert not trained & set(held_out) and len(trained) + len(held_out) == 70
    assert [sum(text.startswith(name) for text in held_out) for name in "ab"] == [12, 2]
    assert [part.rows for part in raw.mixing.parts] == [48, 8]
    _, few = load(parts, format="text", eval_fraction=0.2, max_eval_samples=4, max_train_samples=10)
    assert [sum(text.startswith(name) for text in few.eval["text"][:]) for name in "ab"] == [4, 0]
    assert [part.rows for part in few.mixing.parts] == [5, 5]


@pytest.mark.parametrize("packing", [False, True])
def test_prepared_rows_are_drawn_by_their_source(tmp_path, tokenizer, packing):
    """A border that is one row off gives one source's row to the other, and dropped rows move every border."""
    paths = files(tmp_path, a=200, b=40)
    with open(paths["a"], "a") as file:
        file.write("\n" + json.dumps({"text": "a " + "long " * 400}))
    parts = [{"path": paths["a"], "weight": 1}, {"path": paths["b"], "weight": 2}]
    config, raw = load(parts, format="text", max_length=48, packing=packing)
    ready = prepare_language_model(raw, tokenizer, config, seed=1, cache_dir=tmp_path / "tokens")
    length = ready.mixture.epoch_length
    drawn = ready.train.select(ready.mixture.order(0, length, seed=1))
    rows = {"a": 0, "b": 0}
    for item in drawn:
        ids = item["input_ids"]
        lengths, at, names = item.get("seq_lengths") or [len(ids)], 0, set()
        for one in lengths:
            names.add(tokenizer.decode(ids[at : at + one], skip_special_tokens=True).strip()[0])
            at += one
        assert len(names) == 1, "a sequence holds rows of one source"
        rows[names.pop()] += len(lengths)
    largest = 48 if packing else 1
    assert abs(rows["a"] - sum(rows.values()) / 3) <= largest
    assert rows["a"] == pytest.approx(201, abs=largest) and (ready.report["packed_sequences"] > 0) == packing
    again = prepare_language_model(raw, tokenizer, config, seed=1, cache_dir=tmp_path / "tokens")
    assert np.array_equal(again.mixture.order(0, length, seed=1), ready.mixture.order(0, length, seed=1))


def test_dropped_rows_move_the_borders_and_a_source_without_any_is_named(tmp_path, tokenizer):
    """Rows that were cut before their completion are no rows of the source."""
    for name, cut in (("a", {0, 1, 5}), ("b", {3}), ("c", set(range(8)))):
        rows = [{"prompt": f"{name} " + "long " * 90 * (i in cut), "completion": f"{name}{i}"} for i in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parts = [{"path": str(tmp_path / f"{name}.jsonl"), "rows": 7} for name in "abc"]
    config, raw = load(parts[:2], max_length=32)
    ready = prepare_language_model(raw, tokenizer, config, seed=1, cache_dir=tmp_path / "tokens")
    assert [part.rows for part in ready.mixture.mixing.parts] == [5, 7]
    drawn = ready.train.select(ready.mixture.order(0, 14, seed=1))["input_ids"][:]
    assert [sum(tokenizer.decode(ids[1:]).startswith(name) for ids in drawn) for name in "ab"] == [7, 7]
    for packing in (False, True):
        config, raw = load(parts, max_length=32, packing=packing)
        with pytest.raises(UserError, match=r"no row of '.*c\.jsonl' has a token that counts"):
            prepare_language_model(raw, tokenizer, config, seed=1, cache_dir=tmp_path / "tokens")


def test_classes_are_known_over_all_sources(tmp_path, stories260k, tokenizer):
    paths = files(tmp_path, a=9, b=4)
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "c", "label": 7}))
    parts = [
        *({"path": path, "weight": 1} for path in paths.values()),
        {"path": str(tmp_path / "c.jsonl"), "weight": 2},
    ]
    config, raw = load(parts, "sequence_classification")
    assert raw.label_names == ["0", "1", "7"]
    ready = prepare_classification(raw, tokenizer, config, seed=1, cache_dir=tmp_path / "tokens")
    assert ready.mixture.epoch_length == 36
    labels = ready.train.select(ready.mixture.order(0, 36, seed=1))["labels"][:]
    assert labels.count(2) == 18


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([{"path": "a", "weight": 1}, "b"], "'b' has no weight and no rows"),
        ([{"path": "a", "weight": 1}, {"path": "b", "rows": 5}], "some entries have a weight and others rows"),
        ([{"path": "a", "weight": 1, "rows": 5}], "data.train[0] has a weight and rows"),
        ([{"path": "a", "wieght": 1}], "unknown key 'wieght' in data.train[0]. Did you mean 'weight'?"),
        ([{"weight": 1}], "data.train[0].path is None"),
        (["a", {"path": 3}], "data.train[1].path is 3"),
        *(([{"path": "a", "weight": bad}], "must be a positive number") for bad in (0, -1, float("nan"), "3", True)),
        *(([{"path": "a", "rows": bad}], "must be a whole number from 1") for bad in (0, 1.5, "3", True)),
        ([], "data.train needs at least one file or hub id"),
        ([3], "data.train: "),
        ({"path": "a", "weight": 1}, "data.train: "),
    ],
)
def test_entries_that_say_something_else_are_one_line(tmp_path, train, message):
    config = tmp_path / "config.yaml"
    config.write_text(
        json.dumps({"model": {"model_name_or_path": "m"}, "data": {"train": train}, "training": {"output_dir": "o"}})
    )
    with pytest.raises(UserError) as error:
        load_config(config)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_evaluation_rows_are_not_mixed():
    with pytest.raises(UserError, match=r"weights and rows are for data\.train"):
        DataConfig(train="a", eval=[{"path": "b", "weight": 1}])


def test_entries_without_amounts_are_joined(tmp_path):
    paths = files(tmp_path, a=3, b=2)
    _, raw = load([paths["a"], {"path": paths["b"]}], format="text")
    assert raw.mixing is None and [text[0] for text in raw.train["text"][:]] == list("aaabb")
