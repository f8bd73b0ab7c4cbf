"""xLAM's and Glaive's rows: tokens and loss as the template itself gives them for the same conversation as turns."""

import json

import pytest
from transformers import AutoTokenizer

from adalora_scale.config import DataConfig
from adalora_scale.data.chat_templates import resolve_chat_template
from adalora_scale.data.rows import load_raw
from adalora_scale.data.tokenization import prepare_language_model
from adalora_scale.errors import UserError
from adalora_scale.tasks.registry import find_task, wanted_rows
from tests.conftest import ROOT

TOOL = {
    "name": "get_rate",
    "description": 'The rate {of} two "currencies".',
    "parameters": {"type": "object", "properties": {"base": {"type": "string"}}},
}
OTHER = {"name": "give_giraffe", "description": "x", "parameters": {"leaf": {"type": "str", "default": "it's"}}}
SYSTEM = "You are a helpful assistant with access to the following functions. Use them if required -"
CHAT = (
    "USER: Can you book a flight?\nTo: Bern.\n\n\nASSISTANT: I cannot.\n\nSorry. <|endoftext|>\n\n\n"
    "USER: The rate of USD?\n\n\n"
    """ASSISTANT: <functioncall> {"name": "get_rate", "arguments": '{"base": "USD", "n": 0.30}'} <|endoftext|>\n\n\n"""
    'FUNCTION RESPONSE: {"rate": 0.92}\n\n\nASSISTANT: It is 0.92. <|endoftext|>\n\n\n'
)
TURNS = [
    {"role": "user", "content": "Can you book a flight?\nTo: Bern."},
    {"role": "assistant", "content": "I cannot.\n\nSorry."},
    {"role": "user", "content": "The rate of USD?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "get_rate", "arguments": {"base": "USD", "n": 0.3}}}],
    },
    {"role": "tool", "content": '{"rate": 0.92}'},
    {"role": "assistant", "content": "It is 0.92."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "launch" / "quickstart" / "base_model")


@pytest.fixture
def prepare(tmp_path, tokenizer):
    def run(*rows, **options):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"chat_template": "chatml", "max_length": 4096} | options
        config = DataConfig(train=str(tmp_path / "rows.jsonl"), **options)
        raw = load_raw(config, wanted_rows(find_task("causal_lm")), seed=1)
        return prepare_language_model(raw, tokenizer, config, seed=1, cache_dir=tmp_path / "tokens").train.to_list()

    return run


@pytest.fixture
def refusal(prepare):
    def run(row, good=None, **options):
        with pytest.raises(UserError) as error:
            prepare(good or row, row, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    return run


def chatml(tokenizer, turns, *tools):
    template = resolve_chat_template(tokenizer, DataConfig(train="x", chat_template="chatml"))
    out = tokenizer.apply_chat_template(
        turns, tools=[{"type": "function", "function": tool} for tool in tools] or None, chat_template=template,
        return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    labels = [t if bit else -100 for t, bit in zip(out["input_ids"], out["assistant_masks"], strict=True)]
    return {"input_ids": out["input_ids"], "labels": labels}


def calls(*arguments):
    return [{"type": "function", "function": {"name": "get_rate", "arguments": each}} for each in arguments]


def xlam(**changes):
    answers = [{"name": "get_rate", "arguments": {"base": "USD"}}, {"name": "get_rate", "arguments": {"base": "it's"}}]
    row = {"id": 7, "query": "Rates?", "tools": json.dumps([TOOL, OTHER]), "answers": json.dumps(answers)}
    return row | changes


@pytest.mark.parametrize("as_text", [True, False])
def test_xlam(as_text, prepare, tokenizer):
    """Both calls are one turn, and both tools stand before it."""
    row = xlam() if as_text else {k: json.loads(v) if k in ("tools", "answers") else v for k, v in xlam().items()}
    turns = [{"role": "user", "content": "Rates?"}]
    turns += [{"role": "assistant", "content": "", "tool_calls": calls({"base": "USD"}, {"base": "it's"})}]
    (ready,) = prepare(row)
    assert ready == chatml(tokenizer, turns, TOOL, OTHER)
    assert any(label != -100 for label in ready["labels"])


@pytest.mark.parametrize("answers", ["[]", "Paris", ["Paris"], "[{]", None, '[{"arguments": {}}]', "{}", [[]]])
def test_answers_that_are_no_calls_are_refused(answers, refusal):
    """A set of questions with answers in words has these columns, too."""
    assert "rows.jsonl:2: column 'answers'" in refusal(xlam(answers=answers), xlam())


def test_questions_without_tools_are_not_taken_for_xlam(refusal):
    assert "no known layout" in refusal({"query": "q", "answers": ["a"]})


def glaive(**changes):
    functions = f"{json.dumps(TOOL, indent=4)}\n\n{json.dumps(OTHER)}"
    return {"system": f"SYSTEM: {SYSTEM}\n{functions}\n\n", "chat": CHAT} | changes


def test_glaive(prepare, tokenizer):
    """Calls in single quotes, text in front of a call, a system text without functions, no end token at the end."""
    plain = {"system": "SYSTEM: You have no functions.\n", "chat": "USER: Hi\n\n\nASSISTANT: Hello <|endoftext|>"}
    none = {"system": None, "chat": "USER: Hi\n \nASSISTANT: Hello"}
    ready = prepare(glaive(), plain, none)
    assert ready[0] == chatml(tokenizer, [{"role": "system", "content": SYSTEM}, *TURNS], TOOL, OTHER)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert ready[1] == chatml(tokenizer, [{"role": "system", "content": "You have no functions."}, *talk])
    assert ready[2] == chatml(tokenizer, talk)


@pytest.mark.parametrize(
    ("call", "content", "arguments"),
    [
        ("""{"name": "get_rate", "arguments": '{"base": "it's"}'}""", None, {"base": "it's"}),
        ("""{"name": "get_rate", "arguments": '{"base": "it\\'s"}'}""", None, {"base": "it's"}),
        ("""{"name": "get_rate", "arguments": {"base": "a"}}""", None, {"base": "a"}),
        ('{"name": "get_rate", "arguments": "{\\"base\\": \\"a\\\\nb\\"}"}', None, {"base": "a\nb"}),
        ("""{"name": "get_rate", "arguments": '{"base":\n "a"}'}""", None, {"base": "a"}),
        ("""{"name": "get_rate", "arguments": '{}'}""", None, {}),
    ],
)
@pytest.mark.parametrize("before", ["", "I look."])
def test_a_call_of_glaive(call, content, arguments, before, prepare, tokenizer):
    (ready,) = prepare(glaive(chat=f"USER: q\n\n\nASSISTANT: {before} <functioncall> {call} <|endoftext|>\n\n\n"))
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "q"}]
    turns += [{"role": "assistant", "content": before or None, "tool_calls": calls(arguments)}]
    assert ready == chatml(tokenizer, turns, TOOL, OTHER)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chat": "Hi\n\n\nASSISTANT: Hello"}, "column 'chat' must begin with one of USER:, ASSISTANT:"),
        ({"chat": "Hi"}, "column 'chat' must begin with"),
        ({"chat": ["Hi"]}, "column 'chat' must be text"),
        ({"chat": "USER: a\nASSISTANT: b"}, "turn 1 has a line that begins with ASSISTANT: and no empty line"),
        ({"chat": "USER: a\n\n\nASSISTANT: b <|endoftext|> c"}, "turn 2 has <|endoftext|> inside it"),
        ({"chat": "USER: a\n\n\nASSISTANT: <functioncall> get_rate(1)"}, "turn 2 has a call that is not"),
        (
            {"chat": """USER: a\n\n\nASSISTANT: <functioncall> {"name": "f", "arguments": '{'} <|endoftext|>"""},
            "turn 2 has a call that is not",
        ),
        (
            {"chat": """USER: a\n\n\nASSISTANT: <functioncall> {"name": "f"} <functioncall> {"name": "g"}"""},
            "turn 2 has a call that is not",
        ),
        (
            {"chat": """USER: a\n\n\nASSISTANT: <functioncall> {"name": "f", "arguments": '{}'} and more"""},
            "turn 2 has a call that is not",
        ),
        ({"system": 'SYSTEM: Use them -\n{"name": "f"'}, "column 'system' has functions that are not JSON"),
        ({"system": 'SYSTEM: Use them -\n{"title": "f"}'}, "column 'system' tool 1 must have a name"),
        ({"tools": [TOOL]}, "column 'system' holds functions, and so does 'tools'"),
    ],
)
def test_another_form_is_refused(changes, said, refusal):
    """A wrong border between turns would train on what a user said."""
    message = refusal(glaive(**changes), glaive())
    assert "rows.jsonl:2: " in message and said in message
