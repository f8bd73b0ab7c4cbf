"""Streamed rows: the tokens and the order of rows that lie on the disk, read no further than needed."""

import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

from adalora_scale.config import DataConfig
from adalora_scale.data.rows import load_raw
from adalora_scale.data.streaming import StreamedPart, TokenStream
from adalora_scale.data.tokenization import prepare_language_model
from adalora_scale.errors import UserError
from adalora_scale.tasks.registry import find_task, wanted_rows


@pytest.fixture(scope="module")
def tokenizer(stories260k):
    return AutoTokenizer.from_pretrained(stories260k)


def load(train, task="causal_lm", **options):
    config = DataConfig(train=train, **options)
    return config, load_raw(config, wanted_rows(find_task(task)), seed=3)


def prepared(tmp_path, tokenizer, train, **options):
    config, raw = load(train, **options)
    return prepare_language_model(raw, tokenizer, config, seed=3, cache_dir=tmp_path / "tokens")


def file(tmp_path, name, rows):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def texts(name, count):
    return [{"text": f"{name} {i}" + " word" * (i % 7)} for i in range(count)]


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CHATS = [
    {"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": f"say {i}"}]}
    for i in range(5)
] + [
    {
        "messages": [
            {"role": "user", "content": "ask"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "name": "f", "content": "2"},
            {"role": "assistant", "content": "two", "weight": 0},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": "three"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}],
    }
]
WRITTEN = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ m.role }}: "
    "{% generation %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name + c.function.arguments }}{% endfor %}{{ eos_token }}{% endgeneration %}{% endfor %}"
)
"""Shows arguments that are JSON text, and fails on objects."""
KINDS = {
    "text": (texts("a", 20), {}),
    "pairs": ([{"prompt": f"p {i} ", "completion": f"c {i}"} for i in range(20)], {}),
    "chats": (CHATS, {"chat_template": "chatml"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_labels_are_those_of_rows_on_the_disk(tmp_path, tokenizer, kind):
    rows, options = KINDS[kind]
    path = file(tmp_path, "rows", rows)
    lying = prepared(tmp_path, tokenizer, path, **options).train
    stream = prepared(tmp_path, tokenizer, path, streaming=True, shuffle_buffer=1, **options).stream
    for place in range(2 * len(rows) + 3):  # two passes and the beginning of a third
        expected = lying[place % len(rows)]
        assert stream[place] == {key: expected[key] for key in ("input_ids", "labels")}


@pytest.mark.parametrize("template", ["chatml", WRITTEN])
def test_a_call_that_comes_late_is_rendered_as_if_it_were_known(tmp_path, tokenizer, template):
    """Whether arguments are objects or written is found out before training, from rows that had no call yet."""
    if template == WRITTEN:
        (tmp_path / "written.jinja").write_text(WRITTEN)
        template = str(tmp_path / "written.jinja")
    path = file(tmp_path, "rows", [*CHATS[:1] * 1000, CHATS[-1]])
    alone = prepared(tmp_path, tokenizer, file(tmp_path, "alone", CHATS[-1:]), chat_template=template).train[0]
    stream = prepared(tmp_path, tokenizer, path, streaming=True, shuffle_buffer=1, chat_template=template).stream
    assert stream[1000] == {key: alone[key] for key in ("input_ids", "labels")}


@pytest.mark.parametrize("buffer", [1, 4, 100])
def test_a_place_holds_one_row_however_it_is_come_to(tmp_path, tokenizer, buffer):
    """A rank that skips others' rows, or a continued run that skips trained ones, would else read other rows."""
    train = [{"path": file(tmp_path, n, texts(n, c)), "weight": w} for n, c, w in (("a", 30, 3), ("b", 7, 1))]
    fresh = lambda: prepared(tmp_path, tokenizer, train, streaming=True, shuffle_buffer=buffer).stream  # noqa: E731
    stream = fresh()
    whole = [stream[place]["input_ids"] for place in range(200)]
    for places in (range(0, 200, 3), range(150, 200), [199, 3, 77, 76]):
        other = fresh()
        assert [other[place]["input_ids"] for place in places] == [whole[place] for place in places]
    said = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in whole]
    for name, size in (("a", 30), ("b", 7)):
        mine = [text for text in said if text.startswith(name)]
        assert abs(len(mine) - 200 * {"a": 0.75, "b": 0.25}[name]) <= 1
        passes = [mine[at : at + size] for at in range(0, len(mine) - size + 1, size)]
        assert all(len(set(one)) == size for one in passes), "every row once in a pass"
        assert (passes[0] == passes[1]) == (buffer == 1)


def test_no_more_is_read_than_a_window(tmp_path, tokenizer):
    _, raw = load(file(tmp_path, "a", texts("a", 500)), streaming=True)
    [part] = raw.streamed
    read = []

    def rows(wanted):
        for placed in part.sources[0].rows(wanted):
            read.append(placed[0])
            yield placed

    counted = StreamedPart(sources=(replace(part.sources[0], rows=rows),), readers=part.readers)
    tokens = lambda batch, indices: {"input_ids": [[1]], "labels": [[1]], "loss_tokens": [1]}  # noqa: E731
    stream = TokenStream([counted], None, tokens, buffer=50, seed=1)
    assert stream[0] and len(read) == 50
    assert stream[120] and len(read) == 150


def test_a_mixture_is_that_of_rows_on_the_disk_source_by_source(tmp_path, tokenizer):
    train = [{"path": file(tmp_path, n, texts(n, 90)), "weight": w} for n, w in (("a", 5), ("b", 2), ("c", 0.3))]
    lying = prepared(tmp_path, tokenizer, train)
    order = lying.mixture.order(0, 300, seed=3)
    stream = prepared(tmp_path, tokenizer, train, streaming=True).stream
    streamed = [tokenizer.decode(stream[place]["input_ids"][1:])[0] for place in range(300)]
    assert streamed == ["abc"[source] for source in np.asarray(order) // 90]


def test_a_row_that_cannot_be_used_is_named_when_it_is_read(tmp_path, tokenizer, caplog):
    rows = [
        *({"prompt": "p ", "completion": "c"} for _ in range(1200)),
        {"prompt": "p " + "x " * 90, "completion": "c"},
    ]
    path = file(tmp_path, "rows", [*rows, {"prompt": "p", "completion": 3}])
    stream = prepared(tmp_path, tokenizer, path, streaming=True, shuffle_buffer=1, max_length=32).stream
    assert set(stream[1200]["labels"]) == {-100}
    assert "no token counts in the loss" in caplog.text and "1201" in caplog.text
    with pytest.raises(UserError, match=r"rows\.jsonl.*1202.*completion"):
        stream[1201]
    stream.embedding_rows = 3
    with pytest.raises(UserError, match="has no embedding"):
        stream[0]


def test_first_rows_are_checked_before_training_and_counted_as_such(tmp_path, tokenizer):
    path = file(tmp_path, "a", [*texts("a", 1500), {"text": 3}])
    ready = prepared(tmp_path, tokenizer, path, streaming=True)
    assert ready.report["first_rows_examples"] == 1000 and "train_examples" not in ready.report
    path = file(tmp_path, "b", [*texts("b", 900), {"text": 3}])
    with pytest.raises(UserError, match="901"):
        load(path, streaming=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle_buffer": 5}, "no effect without data.streaming=true"),
        ({"streaming": True, "shuffle_buffer": 0}, "data.shuffle_buffer is 0"),
        ({"streaming": True, "packing": True}, "data.packing=True does not go with"),
        ({"streaming": True, "eval_fraction": 0.1}, "name data.eval"),
        ({"streaming": True, "max_train_samples": 5}, "training.max_steps says"),
        ({"streaming": True, "preprocessing_num_workers": 2}, "data.preprocessing_num_workers=2 does not go with"),
        ({"streaming": True}, "'some/hub_id' is a hub id"),
    ],
)
def test_what_does_not_go_with_streaming_is_refused_by_name(options, message):
    with pytest.raises(UserError) as error:
        load("some/hub_id", **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_classes_are_not_streamed(tmp_path):
    path = file(tmp_path, "a", [{"text": "a", "label": 1}])
    with pytest.raises(UserError, match="does not go with classification"):
        load(path, "sequence_classification", streaming=True)
