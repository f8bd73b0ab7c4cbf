"""Which keys of PEFT's `adapter_config.json` are understood, and how the others are refused.

What is read here is W + s · B A (or s · B diag(λ) A) of every matrix in the file. A key that says more than that must
stand at its default, or the adapter is refused by the key's name: a key that a later PEFT brings as well, since what it
does cannot be known. Source: peft/tuners/lora/config.py and variants.py (0.21).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from adalora_scale.errors import Unsupported
from adalora_scale.reading.json_text import shown

_READ = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "init_r", "lora_alpha", "rank_pattern",
    "alpha_pattern", "use_rslora", "fan_in_fan_out", "modules_to_save", "target_modules", "lora_dropout", "total_step",
}  # fmt: skip
"""Keys whose value is used."""
_TRAINING = {
    "peft_version", "auto_mapping", "inference_mode", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2",
    "orth_reg_weight", "eva_config", "corda_config", "loftq_config", "lora_ga_config", "velora_config",
    "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config",
}  # fmt: skip
"""Keys that say how the tensors in the file came about, or which matrices have some (the file has them); whatever their
value, the function is in the tensors. VeLoRA has another backward and the same forward. The configs of initialisations
stay where PEFT converted an adapter; `init_lora_weights` decides."""
_MORE = {
    "use_dora": "weights are scaled to learnt norms (DoRA)",
    "bias": "biases are trained too",
    "lora_bias": "the update has a bias",
    "layer_replication": "layers of the base are repeated",
    "trainable_token_indices": "rows of the embedding are trained too",
    "target_parameters": "parameters that are no layer's weight are adapted",
    "alora_invocation_tokens": "the update begins at the invocation tokens only (aLoRA)",
    "use_qalora": "inputs are pooled (QALoRA)",
    "use_bdlora": "the factors are block-diagonal (BD-LoRA)",
    "arrow_config": "updates are chosen by the input (Arrow)",
    "kasa_config": "the base loses singular values (KaSA)",
    "monteclora_config": "the update is drawn at random (MonteCLoRA)",
    "megatron_config": "the layers are Megatron's",
    "ensure_weight_tying": "adapters of tied layers are tied",
}
"""Keys under which the function is more than W + s · B A of the matrices in the file."""
_NEUTRAL: dict[str, Any] = {"bias": "none"}
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base as it was."""
_CHANGES_BASE = ("pissa", "corda", "olora", "lora_ga")
"""Beginnings of those that take something out of the base, which PEFT can convert."""


def require_plain(config: Mapping[str, Any], path: Path, *, later: Collection[str] = ()) -> None:
    """See that an adapter is plain LoRA or AdaLoRA over an untouched base.

    Args:
        config: what `adapter_config.json` holds.
        path: where it is, for the message.
        later: keys that are looked at when the weights are open.

    Raises:
        Unsupported: a key says more than that, naming the key, its value, and the way out where there is one.
    """
    for key, value in config.items():
        if key in _READ or key in _TRAINING or _is_neutral(key, value) or key in later:
            continue
        if key in ("init_lora_weights", "init_weights"):
            _require_start(key, value, path)
        elif key in _MORE:
            refuse_more(key, value, path)
        elif not _is_default(key, value, str(config.get("peft_type"))):
            raise Unsupported(
                f"{path} has {_shown(key)}={_shown(value)}, which is not understood here: the adapter may be more than "
                f"plain LoRA. Use PEFT for it, or remove the key if it changes nothing."
            )


def refuse_more(key: str, value: Any, path: Path) -> NoReturn:
    """Refuse one of the keys under which the function is more than that.

    Raises:
        Unsupported: always.
    """
    raise Unsupported(
        f"{path} has {key}={_shown(value)}: {_MORE[key]}. Only plain LoRA and AdaLoRA are read here; merge it with "
        f"PEFT (merge_and_unload) where PEFT can, and begin from the merged model."
    )


def _shown(value: Any) -> str:
    return shown(value).strip("'")


def _require_start(key: str, value: Any, path: Path) -> None:
    said = value.lower() if isinstance(value, str) else value
    if any(said is known or (isinstance(said, str) and said == known) for known in _STARTS):
        return
    name = str(said)
    if name.startswith(_CHANGES_BASE):
        raise Unsupported(
            f"{path} has {key}={_shown(value)}, which changes the base's weights too; convert it with PEFT to plain "
            f"LoRA first: save_pretrained(OUT, path_initial_model_for_weight_conversion=...)."
        )
    if name.startswith("loftq"):
        raise Unsupported(
            f"{path} has {key}={_shown(value)}, which replaces the base's weights by quantised ones; merge it with "
            f"PEFT (merge_and_unload) into the base it was trained on, and begin from the merged model."
        )
    raise Unsupported(
        f"{path} has {key}={_shown(value)}, which is not understood here: it may change the base's weights. Use PEFT "
        f"for this adapter."
    )


def _is_neutral(key: str, value: Any) -> bool:
    """Whether a value says nothing, for keys known and unknown."""
    if key in ("init_lora_weights", "init_weights"):
        return False
    return value is None or value is False or value in ({}, [], "") or (key in _NEUTRAL and value == _NEUTRAL[key])


def _is_default(key: str, value: Any, peft_type: str) -> bool:
    """Whether the PEFT that is installed knows the key, and the value as its default."""
    if find_spec("peft") is None:
        return False
    import peft

    config = peft.AdaLoraConfig if peft_type == "ADALORA" else peft.LoraConfig
    field = next((field for field in dataclasses.fields(config) if field.name == key), None)
    if field is None:
        return False
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return type(default) is type(value) and bool(default == value)
