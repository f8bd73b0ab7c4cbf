"""Sharding-aware AdaLoRA fine-tuning: inject the adapters, attach the allocator, train as usual.

inject_adalora(model, config)
RankAllocator(model, config, total_step=1000).attach(optimizer)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adalora_scale.adalora.injection import coverage, inject_adalora
    from adalora_scale.config import AdaLoraConfig
    from adalora_scale.controller import RankAllocator
    from adalora_scale.export.continual import start_from_adapter
    from adalora_scale.export.in_memory import (
        disable_adapters,
        merge_adapters,
        merge_and_unload,
        unload,
        unmerge_adapters,
    )
    from adalora_scale.export.peft_adalora import load_adapter, save_adapter
    from adalora_scale.export.switching import adapter_names, delete_adapter, set_adapter
    from adalora_scale.training.callback import AdaLoraCallback
    from adalora_scale.training.trainers import AdaLoraSFTTrainer, AdaLoraTrainer

# Names are imported when first used: `adalora-scale --help` need not wait for torch and transformers.
_HOME = {
    "AdaLoraCallback": "training.callback",
    "AdaLoraConfig": "config",
    "AdaLoraSFTTrainer": "training.trainers",
    "AdaLoraTrainer": "training.trainers",
    "RankAllocator": "controller",
    "adapter_names": "export.switching",
    "coverage": "adalora.injection",
    "delete_adapter": "export.switching",
    "disable_adapters": "export.in_memory",
    "inject_adalora": "adalora.injection",
    "load_adapter": "export.peft_adalora",
    "merge_adapters": "export.in_memory",
    "merge_and_unload": "export.in_memory",
    "save_adapter": "export.peft_adalora",
    "set_adapter": "export.switching",
    "start_from_adapter": "export.continual",
    "unload": "export.in_memory",
    "unmerge_adapters": "export.in_memory",
}

__all__ = [
    "AdaLoraCallback",
    "AdaLoraConfig",
    "AdaLoraSFTTrainer",
    "AdaLoraTrainer",
    "RankAllocator",
    "adapter_names",
    "coverage",
    "delete_adapter",
    "disable_adapters",
    "inject_adalora",
    "load_adapter",
    "merge_adapters",
    "merge_and_unload",
    "save_adapter",
    "set_adapter",
    "start_from_adapter",
    "unload",
    "unmerge_adapters",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'adalora_scale' has no attribute '{name}'")
    return getattr(import_module(f"adalora_scale.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
