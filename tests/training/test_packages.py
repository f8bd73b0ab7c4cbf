"""Packages, places and weights that a config needs are looked for before the base model is loaded."""

import pytest

from adalora_scale.cli import train_main
from adalora_scale.config import load_config
from adalora_scale.engines.replicated import Ddp
from adalora_scale.engines.zero_place import Zero2
from adalora_scale.errors import UserError
from adalora_scale.training.arguments import check_training_section
from adalora_scale.training.packages import check_packages
from tests.conftest import ROOT

RECIPE = ROOT / "configs" / "recipes" / "sgd_chat_stories260k.yaml"


def check(*overrides, engine=Ddp):
    config = load_config(RECIPE, list(overrides))
    check_packages(config, check_training_section(config), engine())


@pytest.mark.parametrize(
    ("override", "install"),
    [
        ("training.report_to=wandb", "wandb"),
        ("training.report_to=[trackio]", "trackio"),
        ("training.report_to=comet_ml", "comet-ml and set COMET_API_KEY"),
        ("training.optim=galore_adamw", "galore-torch"),
        ("training.optim=lomo", "lomo-optim"),
        ("training.optim=adamw_torch_8bit", "torchao"),
        ("training.use_liger_kernel=true", "liger-kernel"),
        ("model.attn_implementation=flash_attention_2", "flash-attn"),
        ("model.attn_implementation=kernels-community/flash-attn2", "kernels"),
    ],
)
def test_a_package_that_is_not_there_is_named_with_its_key(override, install):
    """Else transformers says so after the base model has been loaded, over ten lines, or not at all."""
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=f"{key}=.* needs a package .* pip install {install}"):
        check(override)


@pytest.mark.parametrize(
    "override",
    ["training.report_to=none", "training.report_to=all", "training.optim=paged_adamw_32bit",
     "model.attn_implementation=sdpa", "model.load_in_4bit=true"],
)  # fmt: skip
def test_what_is_there_is_not_refused(override):
    """Else the check itself ends runs that would work."""
    check(override)
    check(override, engine=Zero2)


def test_a_tracker_that_does_not_exist_is_refused():
    """Else a misspelt tracker is found after loading."""
    with pytest.raises(UserError, match=r"training.report_to=wanbd is no tracker\. Did you mean .wandb"):
        check("training.report_to=wanbd")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.optim=adamw_bnb_8bit"], "training.optim=adamw_bnb_8bit keeps 8-bit codes"),
        (["training.report_to=wandb"], "training.report_to=wandb needs a package"),
        (["model.model_name_or_path=someone/not-here"], "hf download someone/not-here"),
    ],
)
def test_the_command_ends_with_one_line_and_code_2(overrides, said, stories260k, data_dir, tmp_path, capfd):
    """Else a queue's log shows a traceback, or a run that starts and fails hours later."""
    words = [
        "--config", str(RECIPE), f"model.model_name_or_path={stories260k}", "data.eval=null",
        f"data.train={data_dir}/sgd_chat/train.jsonl", f"training.output_dir={tmp_path / 'out'}", *overrides,
    ]  # fmt: skip
    capfd.readouterr()
    code, printed = train_main(words), capfd.readouterr().err
    lines = [line for line in printed.splitlines() if line.startswith("error")]
    assert code == 2 and len(lines) == 1 and said in lines[0], printed[-3000:]
    assert not (tmp_path / "out" / "run.json").exists()
