"""Every option a user can set, and reading them from one YAML file."""

from adalora_scale.config.options import (
    SCORES,
    AdaLoraConfig,
    DataConfig,
    EngineConfig,
    Fsdp2Config,
    ModelConfig,
    RunConfig,
)
from adalora_scale.config.presets import PRESETS
from adalora_scale.config.reading import (
    adalora_config_from_dict,
    apply_override,
    check_value,
    config_from_tree,
    fsdp2_config_from_dict,
    load_config,
    read_tree,
)
from adalora_scale.config.yaml_text import read_yaml

__all__ = [
    "PRESETS",
    "SCORES",
    "AdaLoraConfig",
    "DataConfig",
    "EngineConfig",
    "Fsdp2Config",
    "ModelConfig",
    "RunConfig",
    "adalora_config_from_dict",
    "apply_override",
    "check_value",
    "config_from_tree",
    "fsdp2_config_from_dict",
    "load_config",
    "read_tree",
    "read_yaml",
]
