"""Reading rows: every layout is recognised in real files, and every kind of damage is one line naming file and row."""

import csv
import json
from pathlib import Path

import datasets
import pytest

from adalora_scale.config import DataConfig
from adalora_scale.data.rows import load_raw, loss_target
from adalora_scale.errors import UserError
from adalora_scale.tasks.registry import find_task, wanted_rows

DATA = Path(__file__).parents[2].parent / "shared" / "data"
GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def real(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {name} beside the project (../shared/data)")
    return str(path)


def lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def load(train, task="causal_lm", **options):
    return load_raw(DataConfig(train=train, **options), wanted_rows(find_task(task)), seed=1)


def refusal(train, task="causal_lm", **options):
    with pytest.raises(UserError) as error:
        load(train, task, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_conversations_are_recognised():
    raw = load(real("sgd_chat/train.jsonl"), eval=real("sgd_chat/dev.jsonl"), max_eval_samples=5)
    assert (raw.layout, raw.train.num_rows, raw.eval.num_rows) == ("messages", 420, 5)
    assert raw.train.column_names == ["messages"]
    assert raw.train[0]["messages"][0] == {"role": "user", "content": "I want to find some movies online."}


def test_named_prompt_columns_become_prompt_and_completion():
    names = {"prompt_column": "question", "completion_column": "answer"}
    raw = load(real("gsm8k/train.jsonl"), eval=real("gsm8k/test.jsonl"), **names)
    assert (raw.layout, raw.train.num_rows, raw.eval.num_rows) == ("prompt_completion", 7473, 1319)
    assert raw.train[0]["completion"].endswith("#### 72")


def test_csv_fields_with_commas_are_read_as_written():
    path = real("e2e_nlg/devel-fixed.no-ol.csv")
    raw = load(path, prompt_column="mr", completion_column="ref")
    with open(path, encoding="utf-8", newline="") as file:
        expected = [(row["mr"], row["ref"]) for row in csv.DictReader(file)]
    assert list(zip(raw.train["prompt"], raw.train["completion"], strict=True)) == expected


def test_classes_are_sorted_and_shared_with_eval():
    raw = load(
        real("banking77/train.csv"), "sequence_classification", eval=real("banking77/test.csv"), label_column="category"
    )
    assert (raw.layout, len(raw.label_names), raw.train.num_rows, raw.eval.num_rows) == (
        "classification",
        77,
        10003,
        3080,
    )
    assert raw.label_names == sorted(raw.label_names)
    assert raw.label_names[raw.train[0]["label"]] == raw.label_names[raw.eval[0]["label"]] == "card_arrival"


def test_classes_outside_the_first_rows_are_still_known():
    raw = load(
        real("banking77/train.csv"),
        "sequence_classification",
        eval=real("banking77/test.csv"),
        label_column="category",
        max_train_samples=50,
    )
    assert raw.train.num_rows == 50 and len(raw.label_names) == 77


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_each_file_format_gives_the_same_rows(tmp_path, suffix):
    rows = [{"text": "one", "label": 10}, {"text": "NA", "label": 9}, {"text": "12", "label": 10}]
    path = tmp_path / f"rows[1].{suffix}"  # brackets are a glob pattern to the library underneath
    match suffix:
        case "jsonl":
            lines(path, rows)
        case "json":
            path.write_text(json.dumps(rows, indent=1))
        case "csv":
            datasets.Dataset.from_list(rows).to_csv(path)
        case _:
            datasets.Dataset.from_list(rows).to_parquet(path)
    raw = load(str(path), "sequence_classification")
    assert raw.train.to_list() == [{"text": r["text"], "label": int(r["label"] == 10)} for r in rows]
    assert raw.label_names == ["9", "10"], "numbers sort as numbers"


def test_files_of_a_list_are_joined_in_order(tmp_path):
    one = lines(tmp_path / "a.jsonl", [{"text": "first", "extra": 1}])
    two = tmp_path / "b.csv"
    two.write_text("other,text\nx,second\n")
    assert load([one, str(two)]).train["text"][:] == ["first", "second"]


def test_held_out_rows_follow_the_seed(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": f"row {i}"} for i in range(20)])
    raws = [
        load_raw(DataConfig(train=path, eval_fraction=0.2), wanted_rows(find_task("causal_lm")), seed=s)
        for s in (1, 1, 2)
    ]
    first, same, other = (raw.eval["text"][:] for raw in raws)
    assert first == same != other and len(first) == 4
    assert set(first) | set(raws[0].train["text"]) == {f"row {i}" for i in range(20)}
    assert "eval_fraction" in refusal(lines(tmp_path / "b.jsonl", [{"text": "only"}]), eval_fraction=0.5)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([GOOD, '{"messages": [{"role": "us'], ":2: broken JSON"),
        ([GOOD, "", [1, 2]], ":3: a row must be a JSON object"),
        ([GOOD, {"other": 1}], ":2: column 'messages' is missing"),
        ([GOOD, {"messages": None}], ":2: column 'messages' is missing"),
        ([GOOD, {"messages": "hi"}], ":2: column 'messages' must be a non-empty list of {role, content}, not 'hi'"),
        ([GOOD, {"messages": []}], ":2: column 'messages' must be a non-empty list"),
        ([GOOD, {"messages": [{"role": "user"}]}], ":2: column 'messages' turn 1 must be {role, content}"),
        ([GOOD, {"messages": [*GOOD["messages"], {"role": "user", "content": 3}]}], ":2: column 'messages' turn 3"),
    ],
)
def test_a_bad_conversation_is_named_by_line(tmp_path, rows, expected):
    path = lines(tmp_path / "chat.jsonl", rows)
    assert path + expected in refusal(path)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 3}],
            ":2: column 'completion' must be text",
        ),
        ([{"prompt": "a", "completion": 3}], ":1: column 'completion' must be text, not int"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], ":2: column 'completion' is missing"),
    ],
)
def test_a_bad_prompt_row_is_named_by_line(tmp_path, rows, expected):
    path = lines(tmp_path / "pairs.jsonl", rows)
    assert path + expected in refusal(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("text,label\nfine,a\none,two,three\n", ":3: the row has 3 fields, the header has 2"),
        ('text,label\n"two\nlines",a\nshort\n', ":4: the row has 1 fields, the header has 2"),
        ("text,label\none,two,three\nfour,five,six\n", ":2: the row has 3 fields"),  # pandas would shift them silently
        ("text,label\nfine,a\nfine,\n", ":3: column 'label' must be a class name"),
    ],
)
def test_a_bad_csv_row_is_named_by_line(tmp_path, text, expected):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    assert str(path) + expected in refusal(str(path), "sequence_classification")


def test_text_that_is_not_utf8_is_named_by_line(tmp_path):
    for name in ("rows.csv", "rows.jsonl"):
        path = tmp_path / name
        head = b"text\nfine\n" if name.endswith("csv") else b'{"text": "fine"}\n{"text": "fine"}\n'
        path.write_bytes(head + (b"caf\xe9\n" if name.endswith("csv") else b'{"text": "caf\xe9"}\n'))
        assert f"{path}:3: not UTF-8" in refusal(str(path))


def test_a_bad_row_of_a_json_array_or_parquet_file_is_counted(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"text": "a"}, {"text": 7}]')
    assert f"{path} row 2: column 'text' must be text" in refusal(str(path))
    path.write_text('[{"text": "a"},\n {"text": }]')
    assert f"{path}:2: broken JSON" in refusal(str(path))
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"text": ["a", None]}).to_parquet(path)
    assert f"{path} row 2: column 'text' is missing" in refusal(str(path))
    path.write_bytes(b"not parquet")
    assert f"{path} is not a Parquet file" in refusal(str(path))


def test_missing_empty_and_unknown_files_are_named(tmp_path):
    assert "does not exist" in refusal(str(tmp_path / "none.jsonl"))
    assert "does not exist" in refusal("./rows.txt")
    (tmp_path / "rows.txt").write_text("hi")
    assert "supported: .jsonl, .json, .ndjson, .csv, .tsv, .parquet" in refusal(str(tmp_path / "rows.txt"))
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl is empty" in refusal(str(tmp_path / "empty.jsonl"))
    (tmp_path / "header.csv").write_text("text,label\n")
    assert "no rows" in refusal(str(tmp_path / "header.csv"))
    (tmp_path / "none.json").write_text("[]")
    assert "none.json" in refusal(str(tmp_path / "none.json"))


def test_unknown_columns_name_the_keys_that_help(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    message = refusal(path)
    assert "question, answer" in message and "data.prompt_column and data.completion_column" in message
    assert "no column 'answers' (it has question, answer); set data.completion_column" in refusal(
        path, format="prompt_completion", prompt_column="question", completion_column="answers"
    )


def test_the_layout_must_fit_the_task(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": "t", "label": "x"}])
    assert "data.format=text" in refusal(path)
    assert load(path, format="text").train.column_names == ["text"]
    assert "needs text and label" in refusal(path, "sequence_classification", format="text")
    assert "data.label_column" in refusal(path, "sequence_classification", label_column="class")
    assert "data.loss_on=assistant does not fit text rows" in refusal(path, format="text", loss_on="assistant")
    assert loss_target(DataConfig(train="x", loss_on="all"), "messages") == "all"


def test_an_eval_label_unknown_to_training_is_named_by_line(tmp_path):
    train = lines(tmp_path / "train.jsonl", [{"text": "t", "label": "a"}, {"text": "t", "label": "b"}])
    eval_files = [
        lines(tmp_path / "e1.jsonl", [{"text": "t", "label": "a"}]),
        lines(tmp_path / "e2.jsonl", [{"text": "t", "label": "b"}, {"text": "t", "label": "c"}]),
    ]
    message = refusal(train, "sequence_classification", eval=eval_files)
    assert f"{eval_files[1]}:2: column 'label': label 'c'" in message


def test_hub_ids_are_loaded_by_name_and_split(monkeypatch):
    calls = []

    def hub(path, name=None, *, split):
        calls.append((path, name, split))
        return datasets.Dataset.from_dict({"question": ["q"], "answer": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    raw = load(
        "org/maths",
        eval="org/maths",
        name="main",
        eval_split="dev",
        prompt_column="question",
        completion_column="answer",
    )
    assert calls == [("org/maths", "main", "train"), ("org/maths", "main", "dev")]
    assert raw.eval.to_list() == [{"prompt": "q", "completion": "a"}]


def test_a_failing_hub_load_is_one_line(monkeypatch):
    def hub(path, name=None, *, split):
        raise ConnectionError("Couldn't reach the hub\nlong traceback")

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert "cannot load the hub data set 'org/maths'" in refusal("org/maths")
