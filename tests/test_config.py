"""One line that names the key, whatever is wrong with the options."""

import math

import pytest

from adalora_scale.config import AdaLoraConfig, adalora_config_from_dict, check_value, load_config
from adalora_scale.errors import UserError

MINIMAL = """
model: {model_name_or_path: base}
data: {train: rows.jsonl}
training: {output_dir: out}
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def message_of(path, *overrides):
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_minimal_file_gets_the_documented_defaults(write):
    """A default that moved would change every user's run."""
    config = load_config(write(MINIMAL))
    assert config.adalora == AdaLoraConfig()
    assert (config.adalora.init_r, config.adalora.target_r, config.adalora.lora_alpha) == (16, 8, 16)
    assert (config.task, config.engine.name, config.model.torch_dtype) == ("causal_lm", "auto", "auto")
    assert config.to_dict()["training"] == {"output_dir": "out"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("modle.revision=x", ["'modle'", "'model'"]),
        ("model.revison=x", ["'model.revison'", "'revision'"]),
        ("adalora.inti_r=8", ["'adalora.inti_r'", "'init_r'"]),
        ("data.max_lenght=8", ["'data.max_lenght'", "'max_length'"]),
        ("engine.nam=ddp", ["'engine.nam'", "'name'"]),
        ("adalora.qqqqqq=1", ["'adalora.qqqqqq'", "Known:", "target_r"]),
        ("learning_rate=1e-3", ["'learning_rate'", "'training.learning_rate'"]),  # of another section
        ("num_train_epoch=1", ["'num_train_epoch'", "'training.num_train_epochs'"]),
        ("max_length=8", ["'max_length'", "'data.max_length'?"]),  # not TRL's, which is set through it
        ("model.lora_alpha=8", ["'model.lora_alpha'", "'adalora.lora_alpha'"]),
    ],
)
def test_unknown_key_is_named_with_the_nearest_one(write, override, expected):
    """A misspelt key would be dropped and the run trained with a default."""
    message = message_of(write(MINIMAL), override)
    assert all(part in message for part in expected), message


def test_unknown_key_is_named_before_the_key_it_was_meant_to_be(write):
    """A misspelt required key would be reported as missing, which sends the user to look elsewhere."""
    text = MINIMAL.replace("model_name_or_path", "model_name_or_pth")
    message = message_of(write(text))
    assert "unknown key 'model.model_name_or_pth'" in message
    assert "'model_name_or_path'" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adalora.init_r=three", "adalora.init_r: "),
        ("adalora.init_r=8.5", "adalora.init_r: "),
        ("adalora.tinit=soon", "adalora.tinit: "),
        ("adalora.target_modules=7", "adalora.target_modules: "),
        ("adalora.preset=3", "adalora.preset: "),
        ("data.train=[1, 2]", "data.train: "),
        ("model.load_in_4bit=perhaps", "model.load_in_4bit: "),
        ("model.torch_dtype=fp32", "model.torch_dtype: "),
        ("engine.config=3", "engine.config: "),
        ("task=regression", "task: "),
        ("task=causal_ml", "task: "),
        ("model=3", "model: "),
        ("adalora=", "adalora: "),
        ("training=3", "training: "),
    ],
)
def test_wrong_type_names_the_key_and_the_value(write, override, expected):
    """pydantic's own text names internal branches (`tinit.int`), not the user's key."""
    message = message_of(write(MINIMAL), override)
    assert message.startswith(expected), message
    assert "got " in message


def test_unknown_preset_is_named_with_the_nearest_one(write):
    """A misspelt score would be found after the base model is loaded."""
    message = message_of(write(MINIMAL), "adalora.preset=papper")
    assert "adalora.preset is 'papper'" in message
    assert "Did you mean 'paper'?" in message


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("adalora.target_r=0", "adalora.target_r"),
        ("adalora.init_r=4", "adalora.init_r"),
        ("adalora.deltaT=0", "adalora.deltaT"),
        ("adalora.lora_dropout=1.0", "adalora.lora_dropout"),
        ("adalora.lora_dropout=-0.1", "adalora.lora_dropout"),
        ("adalora.lora_alpha=0", "adalora.lora_alpha"),
        ("adalora.lora_alpha=.inf", "adalora.lora_alpha"),
        ("adalora.lora_alpha=.nan", "adalora.lora_alpha"),
        ("adalora.init_std=0", "adalora.init_std"),
        ("adalora.init_std=.inf", "adalora.init_std"),
        ("adalora.orth_reg_weight=-1", "adalora.orth_reg_weight"),
        ("adalora.orth_reg_weight=.inf", "adalora.orth_reg_weight"),
        ("adalora.beta1=1", "adalora.beta1"),
        ("adalora.beta2=0", "adalora.beta2"),
        ("adalora.beta2=.nan", "adalora.beta2"),
        ("adalora.tinit=1.5", "adalora.tinit"),
        ("adalora.tinit=-1", "adalora.tinit"),
        ("adalora.tfinal=.nan", "adalora.tfinal"),
        ("data.max_length=1", "data.max_length"),
        ("data.eval_fraction=1", "data.eval_fraction"),
        ("data.max_train_samples=0", "data.max_train_samples"),
        ("training.output_dir=", "training.output_dir"),
    ],
)
def test_value_out_of_range_names_the_key(write, override, key):
    """The value would reach the training loop and fail there, or give NaN."""
    assert key in message_of(write(MINIMAL), override)


def test_contradicting_values_name_both_keys(write):
    """Neither value alone is wrong, so only naming both helps."""
    message = message_of(write(MINIMAL), "adalora.tinit=0.6", "adalora.tfinal=0.5")
    assert "adalora.tinit" in message
    assert "adalora.tfinal" in message
    message = message_of(write(MINIMAL), "data.eval=x.jsonl", "data.eval_fraction=0.1")
    assert "data.eval " in message
    assert "data.eval_fraction" in message


def test_missing_key_is_named(write):
    """pydantic would call it an argument."""
    assert "missing key 'model.model_name_or_path'" in message_of(
        write(MINIMAL.replace("model_name_or_path: base", ""))
    )
    assert "missing key 'data'" in message_of(write("model: {model_name_or_path: b}\ntraining: {output_dir: o}"))


def test_overrides_are_yaml_and_the_last_one_wins(write):
    """`init_r=16` as the text '16', or a first value that sticks, would surprise."""
    config = load_config(
        write(MINIMAL),
        [
            "adalora.init_r=20",
            "adalora.init_r=16",
            "adalora.target_modules=[q_proj, v_proj]",
            "adalora.tinit=5",
            "adalora.tfinal=0.25",
            "adalora.orth_reg_weight=1e-3",
            "model.load_in_4bit=true",
            "training.learning_rate=2.0e-4",
            "training.gradient_checkpointing_kwargs.use_reentrant=false",
            "engine.config.zero_optimization.stage=3",
            "data.chat_template=a=b",
        ],
    )
    assert (config.adalora.init_r, config.adalora.target_modules) == (16, ["q_proj", "v_proj"])
    assert (config.adalora.tinit, config.adalora.tfinal) == (5, 0.25)
    assert isinstance(config.adalora.tinit, int)
    assert config.adalora.orth_reg_weight == 1e-3
    assert config.model.load_in_4bit is True
    assert config.training["learning_rate"] == 2e-4
    assert config.training["gradient_checkpointing_kwargs"] == {"use_reentrant": False}
    assert config.engine.config == {"zero_optimization": {"stage": 3}}
    assert config.data.chat_template == "a=b"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adalora.init_r", "section.key=value"),
        ("=3", "section.key=value"),
        ("adalora.init_r=[", "not valid YAML"),
        ("model.model_name_or_path.x=3", "'model_name_or_path' holds a plain value"),
    ],
)
def test_malformed_override_is_quoted_back(write, override, expected):
    """The user could not tell which of many overrides is wrong."""
    message = message_of(write(MINIMAL), override)
    assert expected in message
    assert override in message


def test_yaml_error_names_the_file_and_the_line(write):
    """Without the line a 60-line recipe is searched by eye."""
    path = write(MINIMAL + "adalora:\n  init_r: 8\n\ttarget_r: 4\n")
    message = message_of(path)
    assert str(path) in message
    assert "line 7" in message


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text"])
def test_file_that_is_no_mapping_is_told_the_sections(write, text):
    """An empty or wrong file must not fail with an attribute error."""
    message = message_of(write(text))
    assert "model, data, adalora, training, engine, task" in message


def test_keys_that_are_not_text_are_an_error(write):
    """YAML reads `on:` as the boolean true."""
    assert "Keys should be strings" in message_of(write(MINIMAL + "on: 3\n"))
    assert "adalora: Keys should be strings" in message_of(write(MINIMAL + "adalora: {1: 2}\n"))


def test_unreadable_files_are_named(tmp_path):
    """A traceback of pathlib would be shown for a mistyped --config."""
    missing = tmp_path / "none.yaml"
    assert str(missing) in message_of(missing)
    assert str(tmp_path) in message_of(tmp_path)  # a folder
    binary = tmp_path / "model.safetensors"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    assert str(binary) in message_of(binary)


def test_dictionary_gets_the_checks_of_the_file():
    """The Python way in would accept what the command line refuses."""
    assert adalora_config_from_dict({"init_r": 6, "target_r": 3}).target_r == 3
    with pytest.raises(UserError, match=r"unknown key 'adalora\.intr'"):
        adalora_config_from_dict({"intr": 6})
    with pytest.raises(UserError, match=r"^adalora\.deltaT: "):
        adalora_config_from_dict({"deltaT": "often"})
    with pytest.raises(UserError, match=r"adalora\.init_r \(2\)"):
        adalora_config_from_dict({"init_r": 2})


def test_replace_checks_again():
    """`replace` would let a contradiction in by the back door."""
    config = AdaLoraConfig(init_r=6, target_r=4)
    assert config.replace(target_r=2).target_r == 2
    assert config.target_r == 4
    with pytest.raises(UserError, match="init_r"):
        config.replace(init_r=3)


def test_phase_steps_of_fractions_and_steps():
    """A fraction rounded the wrong way moves the freeze by a step against PEFT's schedule."""
    assert AdaLoraConfig(tinit=0.1, tfinal=0.3).phase_steps(1000) == (100, 300)
    assert AdaLoraConfig(tinit=7, tfinal=0.25).phase_steps(40) == (7, 10)
    assert AdaLoraConfig(tinit=0, tfinal=0).phase_steps(1) == (0, 0)
    with pytest.raises(UserError, match=r"tinit \(20 steps\) \+ adalora\.tfinal \(20 steps\)"):
        AdaLoraConfig(tinit=20, tfinal=20).phase_steps(40)
    with pytest.raises(UserError, match="total_step is 0"):
        AdaLoraConfig().phase_steps(0)


def test_check_value_converts_or_names_the_key():
    """TrainingArguments' values would be passed on as text."""
    assert check_value("training.learning_rate", "1e-3", float) == 1e-3
    assert math.isinf(check_value("training.x", "inf", float))
    with pytest.raises(UserError, match=r"^training\.max_steps: .*got 'many'"):
        check_value("training.max_steps", "many", int)


def test_a_misspelt_choice_is_answered_with_the_nearest(write):
    """Else the user has to find the letter that differs among the choices."""
    assert message_of(write(MINIMAL), "task=causal_ml").endswith("Did you mean 'causal_lm'?")
    assert message_of(write(MINIMAL), "adalora.preset=papper").endswith("Did you mean 'paper'?")
    assert "Did you mean" not in message_of(write(MINIMAL), "adalora.preset=zzz")
