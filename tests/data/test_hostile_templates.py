"""Chat templates are programs of strangers: they may not loop, double or take the process with them."""

import pickle
import signal
import time
from pathlib import Path

import datasets
import psutil
import pytest
from transformers import AutoTokenizer
from trl.chat_template_utils import get_training_chat_template

from adalora_scale.config import DataConfig
from adalora_scale.data.chat_templates import builtin_chat_templates, resolve_chat_template
from adalora_scale.data.rendering import LimitReached, Renderer, is_known
from adalora_scale.data.rows import load_raw
from adalora_scale.data.tokenization import prepare_language_model
from adalora_scale.errors import UserError
from adalora_scale.tasks.registry import find_task, wanted_rows

MARKED = (
    "{% for m in messages %}{{ m['role'] }}: "
    "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% endfor %}"
)
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
HOSTILE = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a constant tower": "{{ 10 ** (10 ** 10) }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "doubling a list": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x * 2 %}{% endfor %}",
    "one multiplication": "{{ 'a' * 10 ** 12 }}",
    "padding": "{{ '%99999999999d' % 1 }}",
    "much": "{{ 'a' * 20000000 }}",
    "much in pieces": "{% for i in range(50000) %}{{ 'x' * 100000 }}{% endfor %}",
}
WRONG = {
    "range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
    "nesting": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
    "types": ("{{ 1 + 'a' }}", "TypeError"),
    "division": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "refusal": ("{{ raise_exception('roles must \x1b alternate') }}", "roles must"),
    "insides": ("{{ messages.__class__.__mro__ }}", "unsafe"),
}


@pytest.fixture
def tokenizer():
    path = Path(__file__).parents[2].parent / "shared" / "models" / "stories260k"
    if not path.exists():
        pytest.skip("no models/stories260k beside the project (../shared)")
    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_without_end_is_named(name):
    """Jinja's own limit, 100,000 steps of one loop, is none: loops nest, and texts double."""
    start = time.monotonic()
    with Renderer(HOSTILE[name], {}) as renderer, pytest.raises(LimitReached, match=r"on row 7 it "):
        renderer.render([{"messages": CHAT}], ["row 7"])
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("name", WRONG)
def test_what_a_template_does_wrong_is_one_line(name):
    template, message = WRONG[name]
    with Renderer(template, {}) as renderer, pytest.raises(UserError, match=message):
        renderer.render([{"messages": CHAT}], ["row 7"])


def test_the_row_that_a_template_waits_for_is_named():
    """A sample of rows proves nothing: every row is rendered under the limits, and the next batch goes on."""
    template = "{% if messages[0]['content'] == 'now' %}" + HOSTILE["nested loops"] + "{% endif %}x"
    rows = [CHAT, CHAT, [{"role": "user", "content": "now"}], CHAT]
    with Renderer(template, {}) as renderer:
        with pytest.raises(LimitReached, match=r"on row 3 it computes for more than"):
            renderer.render([{"messages": row} for row in rows], [f"row {i}" for i in range(1, 5)])
        assert renderer.render([{"messages": CHAT}], ["row 1"]) == [("x", [])]


def test_the_process_is_gone_afterwards_and_signals_are_left_alone():
    alarm = signal.getsignal(signal.SIGALRM)
    before = set(psutil.Process().children())
    with Renderer(MARKED, {"eos_token": "</s>"}) as renderer:
        assert renderer.render([{"messages": CHAT}] * 2, ["a", "b"])[1] == (
            "user: hi</s>assistant: there</s>",
            [(6, 12), (23, 32)],
        )
        copy = pickle.loads(pickle.dumps(renderer))  # as workers of `datasets.map` get it
        with copy:
            assert copy.render([{"messages": CHAT}], ["a"]) == renderer.render([{"messages": CHAT}], ["a"])
        assert len(set(psutil.Process().children()) - before) == 1
    assert set(psutil.Process().children()) == before and signal.getsignal(signal.SIGALRM) == alarm


@pytest.mark.parametrize("workers", [None, 2])
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_tokens_are_those_of_apply_chat_template(tokenizer, tmp_path, workers, loss_on, monkeypatch):
    """The way through another process must not change a token or a mask, in this process or in workers."""
    path = tmp_path / "rows.jsonl"
    datasets.Dataset.from_list([{"messages": CHAT * n} for n in range(1, 6)]).to_json(path)
    (tmp_path / "own.jinja").write_text(MARKED)
    assert not is_known(MARKED)
    options = {"chat_template": str(tmp_path / "own.jinja"), "loss_on": loss_on, "preprocessing_num_workers": workers}
    config = DataConfig(train=str(path), **options)
    raw = load_raw(config, wanted_rows(find_task("causal_lm")), seed=0)
    prepared = prepare_language_model(raw, tokenizer, config, seed=0, cache_dir=tmp_path / "cache")
    whole = tokenizer.apply_chat_template(
        raw.train["messages"][:], chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    assert prepared.train["input_ids"][:] == whole["input_ids"]
    for row, ids, mask in zip(prepared.train["labels"][:], whole["input_ids"], whole["assistant_masks"], strict=True):
        expected = ids if loss_on == "all" else [i if bit else -100 for i, bit in zip(ids, mask, strict=True)]
        assert row == expected


@pytest.mark.parametrize("workers", [None, 2])
def test_a_hostile_template_beside_a_model_ends_in_one_line(tokenizer, tmp_path, workers):
    """The whole way, as `train` goes it."""
    path = tmp_path / "rows.jsonl"
    datasets.Dataset.from_list([{"messages": CHAT}, {"messages": CHAT * 2}]).to_json(path)
    waiting = MARKED + "{% if messages|length == 4 %}" + HOSTILE["nested loops"] + "{% endif %}"
    config = DataConfig(train=str(path), preprocessing_num_workers=workers)
    raw = load_raw(config, wanted_rows(find_task("causal_lm")), seed=0)
    tokenizer.chat_template = waiting
    with pytest.raises(UserError, match=r"on row 2 it computes for more than"):
        prepare_language_model(raw, tokenizer, config, seed=0, cache_dir=tmp_path / "cache")
    tokenizer.chat_template = MARKED + HOSTILE["nested loops"]
    with pytest.raises(LimitReached, match=r"a conversation of three short turns"):
        resolve_chat_template(tokenizer, config)


def test_templates_that_people_have_read_cost_nothing(tokenizer):
    """Those of this package and of TRL start no process."""
    for name in builtin_chat_templates():
        template = resolve_chat_template(tokenizer, DataConfig(train="x", chat_template=name))
        assert template is not None and is_known(template)
    import trl.chat_template_utils as known

    tokenizer.chat_template = known.qwen3_chat_template
    assert is_known(known.qwen3_chat_template) and is_known(get_training_chat_template(tokenizer))


@pytest.mark.parametrize("content", [b"\xff", b"a\0b", b"{{ a }}" * 200_000, b"{{ " + b"(" * 5000])
def test_a_template_file_that_is_none(content, tokenizer, tmp_path):
    (tmp_path / "own.jinja").write_bytes(content)
    config = DataConfig(train="x", chat_template=str(tmp_path / "own.jinja"), loss_on="all")
    with pytest.raises(UserError, match=r"own\.jinja"):
        resolve_chat_template(tokenizer, config)


@pytest.mark.parametrize("template", ["x" * 2_000_000, {"default": 7}])
def test_a_tokenizer_whose_template_is_none(template, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="is no text of at most"):
        resolve_chat_template(tokenizer, DataConfig(train="x", loss_on="all"))
