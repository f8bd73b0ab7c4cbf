"""Each layout: rows in, tokens and loss mask out, beside the tokenizer's own rendering of what the row says."""

import json
import logging
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from adalora_scale.config import DataConfig
from adalora_scale.data.chat_templates import resolve_chat_template
from adalora_scale.data.end_tokens import prompt_tokens
from adalora_scale.data.rows import load_raw
from adalora_scale.data.tokenization import prepare_classification, prepare_language_model
from adalora_scale.errors import UserError
from adalora_scale.tasks.registry import find_task, wanted_rows

TOKENIZER = Path(__file__).parents[2] / "launch" / "quickstart" / "base_model"
HI = {"role": "user", "content": "Hi there."}
HELLO = {"role": "assistant", "content": "Hello, friend."}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def call(arguments, name="get_weather"):
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


def asks(arguments):
    return [
        {"role": "user", "content": "Weather in Bern?"},
        {"role": "assistant", "content": None, "tool_calls": [call(arguments)]},
        {"role": "tool", "tool_call_id": "c1", "name": "get_weather", "content": '{"t": 0.3}'},
        {"role": "assistant", "content": "0.3 degrees."},
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture
def prepare(tmp_path, tokenizer):
    """Tokenise rows (a JSONL file, or a file that exists) and return the data set with tokens and labels."""

    def run(rows, own=tokenizer, **options):
        path = rows if isinstance(rows, Path) else tmp_path / "rows.jsonl"
        if path is not rows:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(train=str(path), **options)
        raw = load_raw(config, wanted_rows(find_task("causal_lm")), seed=1)
        return prepare_language_model(raw, own, config, seed=1, cache_dir=tmp_path / "tokens").train

    return run


@pytest.fixture
def refusal(prepare):
    def run(rows, *args, **options):
        with pytest.raises(UserError) as error:
            prepare(rows, *args, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    return run


def trained(tokenizer, row):
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def chatml(tokenizer, turns, **options):
    template = resolve_chat_template(tokenizer, DataConfig(train="x", chat_template="chatml"))
    out = tokenizer.apply_chat_template(
        turns, chat_template=template, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    labels = [t if bit else -100 for t, bit in zip(out["input_ids"], out["assistant_masks"], strict=True)]
    return {"input_ids": out["input_ids"], "labels": labels}


# ---- values decide --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "turns",
    [
        [{**HI, "name": "bob"}, HELLO],
        [HI, {**HELLO, "weight": 1}],
        [{**HI, "tool_calls": None, "x": [1, {"a": "b"}]}, {**HELLO, "tool_calls": []}],
        [{"role": "system", "content": ""}, HI, HELLO],
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there."}]}, HELLO],
        asks({"city": "Bern"}),
        asks('{"city": "Bern"}'),
    ],
)
def test_turns_with_further_keys_in_some_rows_are_tokenised_as_they_are(tokenizer, prepare, turns):
    """A reader that guesses one type for a column refuses the row, or gives every other turn the keys of this one."""
    ready = prepare([{"messages": [HI, HELLO]}, {"messages": turns}, {"messages": [HI, HELLO]}], chat_template="chatml")
    expected = [dict(turn) for turn in turns]
    for turn in expected:
        if isinstance(turn["content"], list):
            turn["content"] = "Hi there."
        if turn.get("tool_calls"):
            turn["tool_calls"] = [call({"city": "Bern"})]
    assert ready.to_list()[1] == chatml(tokenizer, expected)
    assert ready.to_list()[0] == ready.to_list()[2] == chatml(tokenizer, [HI, HELLO])


def test_texts_that_look_like_something_else_stay_texts(tokenizer, prepare, tmp_path):
    """JSON readers make a date of 2024-01-01, and CSV readers a number of 007."""
    answers = ["2024-01-01", "2024-01-01T10:00:00", "007", "1.50", "true", "null", "NA", "1e5", "nan", " 12 "]
    rows = [{"prompt": "Q:", "completion": answer} for answer in answers]
    table = tmp_path / "rows.csv"
    table.write_text("prompt,completion\n" + "".join(f"Q:,{answer}\n" for answer in answers))
    arrow = pa.table({"prompt": ["Q:"] * len(answers), "completion": answers})
    pq.write_table(
        arrow.cast(pa.schema([("prompt", pa.large_string()), ("completion", pa.string_view())])),
        tmp_path / "rows.parquet",
    )
    for source in (rows, table, tmp_path / "rows.parquet"):
        assert [trained(tokenizer, row) for row in prepare(source)] == [f"{answer}</s>" for answer in answers]


def test_numbers_inside_calls_are_not_rounded(tokenizer, prepare):
    """The parser of the datasets library reads 0.3 as 0.30000000000000004."""
    (row,) = prepare([{"messages": asks({"x": 0.3, "y": 12345678901234567890, "z": None})}], chat_template="chatml")
    assert '{"x": 0.3, "y": 12345678901234567890, "z": null}' in trained(tokenizer, row)


def test_keys_that_a_table_fills_with_null_are_absent_again(tokenizer, prepare, tmp_path):
    """In a Parquet file every struct has all keys; a call's arguments would get those of other rows."""
    rows = [{"messages": asks({"city": "Bern"})}, {"messages": asks({"town": "Thun"})}, {"messages": [HI, HELLO]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    ready = prepare(tmp_path / "rows.parquet", chat_template="chatml").to_list()
    assert ready == [chatml(tokenizer, row["messages"]) for row in rows]


def test_keys_that_begin_late_in_a_large_file_are_read(prepare, tmp_path):
    rows = [{"messages": [HI, HELLO]}] * 3000 + [{"messages": [{**HI, "name": "bob"}, HELLO], "tools": [TOOL]}]
    ready = prepare(rows, chat_template="chatml")
    assert len(ready) == 3001 and len(ready[-1]["input_ids"]) > 2 * len(ready[0]["input_ids"])


def test_labels_of_mixed_types_are_classes(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "a b", "label": label}) + "\n" for label in (1, "spam", "1", 2.0)))
    raw = load_raw(DataConfig(train=str(path)), wanted_rows(find_task("sequence_classification")), seed=1)
    assert raw.label_names == ["1", "2", "spam"] and raw.train["label"][:] == [0, 2, 0, 1]


# ---- nothing is dropped ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tools",
    [[TOOL], json.dumps([TOOL]), [TOOL["function"]], [json.dumps(TOOL)], TOOL],
    ids=["objects", "JSON text", "bare functions", "texts", "one"],
)
def test_a_conversation_with_tools_trains_on_the_assistants_tokens_calls_included(tokenizer, prepare, tools):
    row = prepare([{"messages": asks('{"city": "Bern"}'), "tools": tools}], chat_template="chatml").to_list()[0]
    assert row == chatml(tokenizer, asks({"city": "Bern"}), tools=[TOOL])
    assert trained(tokenizer, row).split("</s>") == [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>',
        "0.3 degrees.",
        "",
    ]
    assert '"Weather of a city."' in tokenizer.decode(row["input_ids"])


def test_what_a_template_does_not_show_is_refused(refusal, tmp_path):
    shown = refusal([{"messages": [HI, HELLO], "tools": [TOOL]}], chat_template="plain")
    assert (
        "row 1: the chat template does not show the tool 'get_weather'" in shown and "data.tools_column=null" in shown
    )
    assert "leaves out the call of 'get_weather' in turn 2" in refusal([{"messages": asks({})}], chat_template="plain")
    documents = [{"title": "Bern", "text": "A city."}]
    assert "data.documents_column=null" in refusal(
        [{"messages": [HI, HELLO], "documents": documents}], chat_template="chatml"
    )
    half = tmp_path / "half.jinja"
    half.write_text(
        "{% for m in messages %}{% generation %}{{ m['content'][:5] }}{{ eos_token }}{% endgeneration %}{% endfor %}"
    )
    assert "row 1: the chat template leaves out the text of turn 2" in refusal(
        [{"messages": [HI, HELLO]}], chat_template=str(half)
    )
    outside = tmp_path / "outside.jinja"
    outside.write_text(
        "{% for m in messages %}{{ m['tool_calls'] | tojson if m['tool_calls'] }}"
        "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% endfor %}"
    )
    assert "does not mark the call of 'get_weather'" in refusal(
        [{"messages": asks({"city": "Bern"})}], chat_template=str(outside)
    )


def test_columns_and_keys_that_nobody_reads_are_named_once(prepare, caplog):
    rows = [{"messages": [{**HI, "mood": "good"}, HELLO], "idx": i, "source": "x"} for i in range(3)]
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            prepare(rows, chat_template="chatml")
        said = [record.getMessage() for record in caplog.records]
        assert (
            [line for line in said if "idx" in line] == [line for line in said if "columns idx, source" in line] != []
        )
        assert [line for line in said if "mood" in line] == [
            "data: train: the chat template does not use a turn's 'mood' (row 1 and 2 more)"
        ]


THINKS = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{% if loop.last and m.reasoning_content %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n' }}{% endif %}"
    "{{ m['content'].split('</think>')[-1] if not loop.last else m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "turn", [{**HELLO, "reasoning_content": "Be kind."}, {**HELLO, "content": "<think>Be kind.</think>Hello, friend."}]
)
def test_reasoning_of_earlier_turns_is_the_templates_to_leave_out(tokenizer, prepare, turn, tmp_path, caplog):
    """Qwen 3 and DeepSeek do so on purpose: named, not refused."""
    (tmp_path / "thinks.jinja").write_text(THINKS)
    last = json.loads(json.dumps(turn).replace("kind", "brief"))
    (row,) = prepare([{"messages": [HI, turn, HI, last]}], chat_template=str(tmp_path / "thinks.jinja"))
    said = trained(tokenizer, row)
    assert said.count("Be brief.") == 1 and said.count("Be kind.") == 0 and said.count("Hello, friend.</s>") == 2
    assert caplog.text.count("leaves out reasoning of assistant turns") == 1


@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_turns_of_weight_0_are_not_trained_on(tokenizer, prepare, flag, tmp_path):
    turns = [HI, {**HELLO, **flag}, HI, {"role": "assistant", "content": "Yes."}, HI, HELLO]
    (row,) = prepare([{"messages": turns}], chat_template="chatml")
    assert trained(tokenizer, row) == "Yes.</s>Hello, friend.</s>"
    split = tmp_path / "split.jinja"  # two marks a turn
    split.write_text(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% generation %}{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    (row,) = prepare([{"messages": turns}], chat_template=str(split))
    assert trained(tokenizer, row) == "Yes.</s>Hello, friend.</s>"


def test_other_weights_are_refused(refusal):
    for flag, said in (
        ({"weight": 0.5}, "weight 0.5"),
        ({"weight": "1"}, "weight '1'"),
        ({"weight": 1, "train": False}, "contradict"),
    ):
        shown = refusal([{"messages": [HI, {**HELLO, **flag}]}], chat_template="chatml")
        assert ":1: column 'messages' turn 2 has" in shown and said in shown
    assert "data.loss_on=assistant" in refusal(
        [{"messages": [HI, {**HELLO, "weight": 0}]}], chat_template="chatml", loss_on="all"
    )


def test_templates_get_what_they_take(tokenizer, prepare, tmp_path):
    """Parts where they go over parts, arguments as JSON text where they write it, system where developer is unknown."""
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' }}{% for p in m['content'] %}{% if p['type'] == 'text' %}"
        "{% generation %}{{ p['text'] }}{% endgeneration %}{% endif %}{% endfor %}{{ eos_token }}{% endfor %}"
    )
    (row,) = prepare(
        [{"messages": [{"role": "developer", "content": "Be brief."}, HI, HELLO]}], chat_template=str(path)
    )
    assert tokenizer.decode(row["input_ids"]) == "system: Be brief.</s>user: Hi there.</s>assistant: Hello, friend.</s>"
    path.write_text(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% for c in m['tool_calls'] %}{{ c['function']['name'] + '(' + c['function']['arguments'] + ')' }}{% endfor %}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    for arguments in ({"city": "Bern"}, '{"city": "Bern"}'):
        (row,) = prepare([{"messages": asks(arguments)}], chat_template=str(path))
        assert trained(tokenizer, row) == 'get_weather({"city": "Bern"})</s>0.3 degrees.</s>'


# ---- layouts --------------------------------------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "Be brief."}
SHAREGPT = [{"from": "human", "value": "Hi there."}, {"from": "gpt", "value": "Hello, friend."}]


@pytest.mark.parametrize(
    ("row", "turns", "tools"),
    [
        ({"conversations": SHAREGPT}, [HI, HELLO], None),
        ({"conversations": [{"from": "system", "value": "Be brief."}, *SHAREGPT]}, [SYSTEM, HI, HELLO], None),
        ({"conversations": SHAREGPT, "system": "Be brief."}, [SYSTEM, HI, HELLO], None),
        ({"conversations": json.dumps(SHAREGPT)}, [HI, HELLO], None),
        ({"messages": {"role": ["user", "assistant"], "content": ["Hi there.", "Hello, friend."]}}, [HI, HELLO], None),
        ({"conversations": [{"role": "user", "content": "Hi there."}, HELLO]}, [HI, HELLO], None),
        ({"messages": [{"role": "User", "content": "Hi there."}, {**HELLO, "role": "Assistant"}]}, [HI, HELLO], None),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Weather in Bern?"},
                    {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Bern"}}'},
                    {"from": "observation", "value": '{"t": 0.3}'},
                    {"from": "gpt", "value": "0.3 degrees."},
                ],
                "tools": json.dumps([TOOL["function"]]),
            },
            asks({"city": "Bern"}),
            [TOOL],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Weather in Bern?"},
                    {"role": "assistant", "function_call": {"name": "get_weather", "arguments": '{"city": "Bern"}'}},
                    {"role": "function", "name": "get_weather", "content": {"t": 0.3}},
                    {"role": "assistant", "content": "0.3 degrees."},
                ],
                "functions": [TOOL["function"]],
            },
            asks({"city": "Bern"}),
            [TOOL],
        ),
    ],
)
def test_conversations_of_other_names_are_tokenised_as_openais(tokenizer, prepare, row, turns, tools):
    (found,) = prepare([row], chat_template="chatml")
    assert found == chatml(tokenizer, turns, tools=tools)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SYSTEM, HI], "completion": [HELLO]},
        {"prompt": [SYSTEM, HI], "chosen": [HELLO], "rejected": [{**HELLO, "content": "No."}]},
        {"chosen": [SYSTEM, HI, HELLO], "rejected": [SYSTEM, HI, {**HELLO, "content": "No."}]},
        {"prompt": "Hi there.", "system": "Be brief.", "chosen": [HI, HELLO], "rejected": [HI, HELLO], "score": 1},
        {"instruction": "Hi there.", "input": "", "output": "Hello, friend.", "system": "Be brief."},
    ],
    ids=["prompt and completion", "preference", "implicit prompt", "prompt as text", "alpaca"],
)
def test_prompts_of_turns_train_on_what_follows_as_trl_does(tokenizer, prepare, row):
    (found,) = prepare([row], chat_template="chatml")
    whole = chatml(tokenizer, [SYSTEM, HI, HELLO])["input_ids"]
    assert found["input_ids"] == whole
    assert trained(tokenizer, found) == "Hello, friend.</s>\n", "what follows the answer's beginning, to the end"


def test_a_completion_with_tools_trains_on_the_assistants_tokens(tokenizer, prepare, tmp_path, caplog):
    turns = asks({"city": "Bern"})
    row = {"prompt": turns[:1], "completion": [*turns[1:3], {**turns[3], "weight": 1}], "tools": [TOOL]}
    (found,) = prepare([row], chat_template="chatml")
    assert found == chatml(tokenizer, turns, tools=[TOOL])
    row["completion"][2]["weight"] = 0
    (found,) = prepare([row], chat_template="chatml")
    assert trained(tokenizer, found).endswith("</tool_call></s>")
    unmarked = tmp_path / "unmarked.jinja"
    unmarked.write_text("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    caplog.clear()
    prepare([{"prompt": [HI], "completion": [HELLO, HI, HELLO]}], chat_template=str(unmarked))
    assert "turns that are not the assistant's, and they count in the loss (row 1)" in caplog.text


def test_texts_of_preferences_and_alpaca_become_prompt_and_completion(tokenizer, prepare, caplog):
    (row,) = prepare([{"prompt": "Q: a?\nA:", "chosen": " b", "rejected": " c"}])
    assert tokenizer.decode(row["input_ids"]).endswith("Q: a?\nA: b</s>") and trained(tokenizer, row) == " b</s>"
    assert caplog.text.count("trains on 'chosen'") == 1
    (row,) = prepare([{"chosen": "Q: a?\nA: b", "rejected": "Q: a?\nA: c"}])
    assert trained(tokenizer, row).strip() == "b</s>"
    (row,) = prepare([{"instruction": "Add.", "context": "1 and 2", "response": "3", "category": "x"}])
    text = tokenizer.decode(row["input_ids"])
    assert text.endswith(
        "further context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
        "### Input:\n1 and 2\n\n### Response:\n3</s>"
    )
    assert trained(tokenizer, row) == "3</s>"
    (row,) = prepare([{"instruction": "Say hi.", "input": "", "output": "hi"}])
    assert "### Input" not in tokenizer.decode(row["input_ids"]) and trained(tokenizer, row) == "hi</s>"


def test_pairs_of_texts_are_classified_as_the_tokenizer_pairs_them(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"premise": "It rains.", "hypothesis": "It is wet.", "label": "yes", "idx": 1}) + "\n")
    for options in ({}, {"text_column": "premise", "text_pair_column": "hypothesis"}):
        config = DataConfig(train=str(path), **options)
        raw = load_raw(config, wanted_rows(find_task("sequence_classification")), seed=1)
        (row,) = prepare_classification(raw, tokenizer, config, seed=1, cache_dir=tmp_path / "tokens").train
        assert row["input_ids"] == tokenizer("It rains.", "It is wet.")["input_ids"]


@pytest.mark.parametrize(("label", "said"), [(["a"], "one label"), (None, "missing"), ("", "class name")])
def test_labels_that_do_not_fit_are_refused_by_line(tmp_path, label, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a", "label": 1}) + "\n" + json.dumps({"text": "a", "label": label}) + "\n")
    with pytest.raises(UserError, match=rf":\d: column 'label' .*{said}"):
        load_raw(DataConfig(train=str(path)), wanted_rows(find_task("sequence_classification")), seed=1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [HI, {"role": "assistant", "content": None}]}, "turn 2 must be {role, content}"),
        (
            {"messages": [HI, {**HELLO, "content": [{"type": "image_url", "image_url": "x"}]}]},
            "part of type 'image_url'",
        ),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "turn 1 is from 'alien'; known are human"),
        ({"messages": [HI, HELLO], "tools": "get_weather"}, "column 'tools' must be a list of tools"),
        ({"messages": [HI, HELLO], "tools": [{"type": "function", "function": {}}]}, "tool 1 must have a name"),
        ({"messages": [HI, HELLO], "documents": ["a"]}, "column 'documents' must be a list of objects"),
        ({"messages": [HI, HELLO], "chat_template_kwargs": {"messages": []}}, "column 'chat_template_kwargs' must be"),
        ({"prompt": [HI], "completion": [HI]}, "column 'completion' has no turn of the assistant's"),
        ({"prompt": [HI], "completion": "text"}, "column 'completion' must be a non-empty list"),
    ],
)
def test_what_cannot_be_used_is_refused_by_line_and_column(refusal, row, said):
    shown = refusal([row], chat_template="chatml")
    assert "rows.jsonl:1: " in shown and said in shown


# ---- one begin and one end token ------------------------------------------------------------------------------------


@pytest.fixture(params=["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def adding(request):
    """A tokenizer that adds none, one or both of the tokens itself."""
    own = AutoTokenizer.from_pretrained(TOKENIZER)
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single=request.param, special_tokens=[("<s>", own.bos_token_id), ("</s>", own.eos_token_id)]
    )
    own.adds_begin = "<s>" in request.param
    return own


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "<s>Q: a\nA:", "completion": " b"},
        {"prompt": "Q: a\nA:", "completion": " b"},
        {"prompt": "<s>Q: a\nA:", "completion": " b</s>"},
        {"prompt": "Q: a\nA:", "completion": " b</s>\n"},
        {"text": "<s>Q: a\nA: b</s>"},
        {"text": "Q: a\nA: b"},
    ],
)
def test_begin_and_end_stand_there_once(adding, prepare, row):
    (found,) = prepare([row], adding)
    text = adding.decode(found["input_ids"])
    assert text == ("<s>" if adding.adds_begin or "<s>" in str(row) else "") + "Q: a\nA: b</s>"
    assert trained(adding, found) == (" b</s>" if "prompt" in row else text)


def test_an_end_token_of_the_rows_own_does_not_double_the_templates(adding, prepare):
    turns = [HI, {**HELLO, "content": "Hello, friend.</s>"}]
    (found,) = prepare([{"messages": turns}], adding, chat_template="chatml")
    assert found == chatml(adding, [HI, HELLO])


def test_prompts_to_answer_have_one_begin_token_and_no_end_token(adding):
    """`evaluate` would let the model go on behind an end token that the tokenizer adds."""
    for prompt in ("<s>Q: a\nA:", "Q: a\nA:"):
        text = adding.decode(prompt_tokens(adding, [prompt])[0])
        assert text == ("<s>" if adding.adds_begin or prompt[0] == "<" else "") + "Q: a\nA:"
