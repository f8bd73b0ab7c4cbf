"""The optional packages that a config asks for, looked for before anything is loaded.

transformers looks for most of them when the trainer is made, which is after the base model has been loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from transformers.integrations import integration_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import import_utils

from adalora_scale.config import RunConfig
from adalora_scale.engines.engine import Engine
from adalora_scale.errors import UserError, nearest

Looks = Callable[[], bool]

_TRACKERS: dict[str, tuple[Looks, str]] = {
    "azure_ml": (integration_utils.is_azureml_available, "azureml-core"),
    "clearml": (integration_utils.is_clearml_available, "clearml"),
    "codecarbon": (integration_utils.is_codecarbon_available, "codecarbon"),
    "comet_ml": (integration_utils.is_comet_available, "comet-ml"),
    "dagshub": (integration_utils.is_dagshub_available, "dagshub mlflow"),
    "dvclive": (integration_utils.is_dvclive_available, "dvclive"),
    "flyte": (integration_utils.is_flytekit_available, "flytekit"),
    "mlflow": (integration_utils.is_mlflow_available, "mlflow"),
    "neptune": (integration_utils.is_neptune_available, "neptune"),
    "swanlab": (integration_utils.is_swanlab_available, "swanlab"),
    "tensorboard": (integration_utils.is_tensorboard_available, "tensorboard"),
    "trackio": (integration_utils.is_trackio_available, "trackio"),
    "wandb": (integration_utils.is_wandb_available, "wandb"),
}
_HINTS = {"comet_ml": " and set COMET_API_KEY"}

_BITSANDBYTES: tuple[Looks, str] = (import_utils.is_bitsandbytes_available, "bitsandbytes")
_GALORE: tuple[Looks, str] = (import_utils.is_galore_torch_available, "galore-torch")
_APOLLO: tuple[Looks, str] = (import_utils.is_apollo_torch_available, "apollo-torch")
_LOMO: tuple[Looks, str] = (import_utils.is_lomo_available, "lomo-optim")
_SCHEDULE_FREE: tuple[Looks, str] = (import_utils.is_schedulefree_available, "schedulefree")
_TORCHAO: tuple[Looks, str] = (import_utils.is_torchao_available, "torchao")

_OPTIMIZERS: dict[str, tuple[Looks, str]] = {
    "adalomo": _LOMO,
    "adamw_8bit": _BITSANDBYTES,
    "adamw_bnb_8bit": _BITSANDBYTES,
    "adamw_torch_4bit": _TORCHAO,
    "adamw_torch_8bit": _TORCHAO,
    "adamw_torch_npu_fused": (import_utils.is_torch_npu_available, "torch-npu"),
    "adamw_torch_xla": (import_utils.is_torch_xla_available, "torch-xla"),
    "ademamix": _BITSANDBYTES,
    "ademamix_8bit": _BITSANDBYTES,
    "apollo_adamw": _APOLLO,
    "apollo_adamw_layerwise": _APOLLO,
    "galore_adafactor": _GALORE,
    "galore_adafactor_layerwise": _GALORE,
    "galore_adamw": _GALORE,
    "galore_adamw_8bit": _GALORE,
    "galore_adamw_8bit_layerwise": _GALORE,
    "galore_adamw_layerwise": _GALORE,
    "grokadamw": (import_utils.is_grokadamw_available, "grokadamw"),
    "lion_32bit": _BITSANDBYTES,
    "lion_8bit": _BITSANDBYTES,
    "lomo": _LOMO,
    "paged_adamw_32bit": _BITSANDBYTES,
    "paged_adamw_8bit": _BITSANDBYTES,
    "paged_ademamix_32bit": _BITSANDBYTES,
    "paged_ademamix_8bit": _BITSANDBYTES,
    "paged_lion_32bit": _BITSANDBYTES,
    "paged_lion_8bit": _BITSANDBYTES,
    "rmsprop_bnb": _BITSANDBYTES,
    "rmsprop_bnb_32bit": _BITSANDBYTES,
    "rmsprop_bnb_8bit": _BITSANDBYTES,
    "schedule_free_adamw": _SCHEDULE_FREE,
    "schedule_free_radam": _SCHEDULE_FREE,
    "schedule_free_sgd": _SCHEDULE_FREE,
    "stable_adamw": (import_utils.is_torch_optimi_available, "torch-optimi"),
}

# Without the package itself transformers takes a kernel from the hub, where `kernels` is installed.
_ATTENTION: dict[str, tuple[Looks, str]] = {
    "flash_attention_2": (import_utils.is_flash_attn_2_available, "flash-attn"),
    "flash_attention_3": (import_utils.is_flash_attn_3_available, "flash-attn-3"),
    "flash_attention_4": (import_utils.is_flash_attn_4_available, "flash-attn-4"),
}


def check_packages(config: RunConfig, training: dict[str, Any], engine: Engine) -> None:
    """See that the packages are there that the config's values need.

    Args:
        config: the run's.
        training: its training section, converted.
        engine: what holds the parameters.

    Raises:
        UserError: naming the key and what to install.
    """
    for tracker in _listed(training.get("report_to")):
        if tracker not in _TRACKERS and tracker not in ("none", "all", *integration_utils.INTEGRATION_TO_CALLBACK):
            raise UserError(
                f"training.report_to={tracker} is no tracker.{nearest(tracker, _TRACKERS)} Known: "
                f"{', '.join(sorted(_TRACKERS))}, all and none."
            )
        _require(f"training.report_to={tracker}", _TRACKERS.get(tracker), _HINTS.get(tracker, ""))
    optimizer = training.get("optim")
    name = str(getattr(optimizer, "value", optimizer))
    _require(f"training.optim={name}", _OPTIMIZERS.get(name))
    if attention := config.model.attn_implementation:
        known = sorted({"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys(), *_ATTENTION})
        if "/" not in attention and attention.removeprefix("paged|") not in known:
            raise UserError(
                f"model.attn_implementation={attention} is unknown.{nearest(attention, known)} Known: "
                f"{', '.join(name for name in known if '|' not in name)}, or a kernel's repository on the hub."
            )
        from_hub = "/" in attention or attention in _ATTENTION
        if not (from_hub and import_utils.is_kernels_available()):
            hub_only = (import_utils.is_kernels_available, "kernels") if "/" in attention else None
            _require(f"model.attn_implementation={attention}", _ATTENTION.get(attention, hub_only))
    if training.get("use_liger_kernel"):
        _require("training.use_liger_kernel=true", (import_utils.is_liger_kernel_available, "liger-kernel"))
    if (package := engine.package) is not None:
        _require(f"engine.name={engine.name}", (lambda: find_spec(package) is not None, package))
    if config.model.load_in_4bit:
        _require("model.load_in_4bit=true", _BITSANDBYTES)


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _require(key: str, package: tuple[Looks, str] | None, hint: str = "") -> None:
    if package is not None and not package[0]():
        raise UserError(f"{key} needs a package that is not usable here: pip install {package[1]}{hint}.")
