"""Chat templates: assistant turns are marked with their end token; what cannot be marked is refused with a way out."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer
from trl.chat_template_utils import is_chat_template_stop_token_trained, qwen2_5_chat_template

from adalora_scale.config import DataConfig
from adalora_scale.data.chat_templates import builtin_chat_templates, resolve_chat_template
from adalora_scale.errors import UserError

MODEL = Path(__file__).parents[2].parent / "shared" / "models" / "stories260k"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One fish?"},
    {"role": "assistant", "content": "Two fish."},
    {"role": "user", "content": "Red fish?"},
    {"role": "assistant", "content": "Blue fish."},
]


@pytest.fixture
def tokenizer():
    if not MODEL.exists():
        pytest.skip("no stories260k beside the project (../shared/models)")
    return AutoTokenizer.from_pretrained(MODEL)


def resolve(tokenizer, name=None, **options):
    return resolve_chat_template(tokenizer, DataConfig(train="x", chat_template=name, **options))


def refusal(tokenizer, name=None, **options):
    with pytest.raises(UserError) as error:
        resolve(tokenizer, name, **options)
    return str(error.value)


def trained_text(tokenizer, template):
    out = tokenizer.apply_chat_template(
        CHAT, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(out["input_ids"], out["assistant_masks"], strict=True)
    return tokenizer.decode([token for token, marked in pairs if marked])


def test_plain_renders_roles_as_words(tokenizer):
    text = tokenizer.apply_chat_template(CHAT, chat_template=resolve(tokenizer, "plain"), tokenize=False)
    assert text == (
        "<s>System: Be brief.\nUser: One fish?\nAssistant: Two fish.</s>\nUser: Red fish?\nAssistant: Blue fish.</s>\n"
    )


def test_chatml_renders_headers_and_the_tokenizers_end_token(tokenizer):
    text = tokenizer.apply_chat_template(CHAT[1:3], chat_template=resolve(tokenizer, "chatml"), tokenize=False)
    assert text == "<s><|im_start|>user\nOne fish?</s>\n<|im_start|>assistant\nTwo fish.</s>\n"


@pytest.mark.parametrize("name", builtin_chat_templates())
def test_builtin_templates_train_on_answers_and_their_end(tokenizer, name):
    template = resolve(tokenizer, name)
    assert trained_text(tokenizer, template).replace(" ", "") == "Twofish.</s>Bluefish.</s>"
    assert is_chat_template_stop_token_trained(tokenizer, chat_template=template)


@pytest.mark.parametrize("name", builtin_chat_templates())
def test_the_generation_prompt_is_a_token_prefix_of_the_answered_turn(tokenizer, name):
    # If it were not, the model would be trained on a context it never sees when it answers.
    render = {"chat_template": resolve(tokenizer, name), "tokenize": True, "return_dict": True}
    prompt = tokenizer.apply_chat_template(CHAT[:4], add_generation_prompt=True, **render)["input_ids"]
    whole = tokenizer.apply_chat_template(CHAT, **render)["input_ids"]
    assert whole[: len(prompt)] == prompt


@pytest.mark.parametrize("name", builtin_chat_templates())
def test_builtin_templates_do_without_a_start_token(tokenizer, name):
    tokenizer.bos_token = None
    text = tokenizer.apply_chat_template(CHAT[1:], chat_template=resolve(tokenizer, name), tokenize=False)
    assert "<s>" not in text and text.startswith(("User:", "<|im_start|>user"))


def test_a_tokenizer_saved_with_the_template_renders_the_same(tokenizer, tmp_path):
    tokenizer.chat_template = resolve(tokenizer, "plain")
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template == resolve(again)


def test_a_tokenizer_without_a_template_is_offered_a_builtin_one(tokenizer):
    assert "data.chat_template=plain" in refusal(tokenizer)


def test_an_unmarked_template_is_replaced_by_its_marked_twin(tokenizer):
    tokenizer.chat_template = qwen2_5_chat_template
    assert "{%- generation" in resolve(tokenizer).replace("{% generation", "{%- generation")
    assert resolve(tokenizer, loss_on="all") == qwen2_5_chat_template
    assert tokenizer.chat_template == qwen2_5_chat_template, "the caller decides when to change the tokenizer"


def test_an_unmarked_template_that_nobody_knows_is_refused(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    message = refusal(tokenizer)
    assert "{% generation %}" in message and "data.loss_on=all" in message and "data.chat_template=plain" in message
    assert resolve(tokenizer, loss_on="all") == tokenizer.chat_template


def test_a_template_file_is_read_and_checked(tokenizer, tmp_path, caplog):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert "does not mark assistant turns" in refusal(tokenizer, str(path))
    path.write_text("{% for m in messages %}\n{% if %}{% endfor %}")
    assert f"{path}:2: not a Jinja template" in refusal(tokenizer, str(path))
    path.write_text(
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}{% endfor %}"
    )
    assert resolve(tokenizer, str(path)) == path.read_text()
    assert "learn to stop" in caplog.text


def test_an_unknown_name_suggests_the_nearest(tokenizer):
    message = refusal(tokenizer, "plane")
    assert "Did you mean 'plain'?" in message and "Built-in: chatml, plain." in message


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer):
    tokenizer.eos_token = None
    assert "eos_token" in refusal(tokenizer, "plain")


def test_rows_without_turns_take_no_template(tokenizer):
    assert resolve_chat_template(tokenizer, DataConfig(train="x"), layout="text") is None
    with pytest.raises(UserError, match="applies to messages rows"):
        resolve_chat_template(tokenizer, DataConfig(train="x", chat_template="plain"), layout="prompt_completion")
