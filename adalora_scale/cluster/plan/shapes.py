"""A model's shape: its config.json, or one shipped here under the name of its hub id."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from adalora_scale.config import ModelConfig
from adalora_scale.errors import UserError

_FOLDER = Path(__file__).with_name("shapes")
SHAPES = {
    "meta-llama/Meta-Llama-3-70B": "llama3_70b",
    "meta-llama/Meta-Llama-3-70B-Instruct": "llama3_70b",
    "meta-llama/Meta-Llama-3-8B": "llama3_8b",
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama3_8b",
    "meta-llama/Llama-2-70b-hf": "llama2_70b",
}
"""Hub ids whose shape can be planned without the hub."""


def model_config(model: ModelConfig) -> PretrainedConfig:
    """Return the shape of `model_name_or_path`: a shipped name, a config.json, a folder or a hub id.

    Raises:
        UserError: nothing of these can be read.
    """
    name = model.model_name_or_path
    shipped = SHAPES.get(name, name)
    file = Path(name) if name.endswith(".json") else _FOLDER / f"{shipped}.json"
    try:
        if file.is_file() and (name.endswith(".json") or not Path(name).is_dir()):
            tree = json.loads(file.read_text(encoding="utf-8"))
            return AutoConfig.for_model(**tree)
        found: PretrainedConfig = AutoConfig.from_pretrained(
            name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        return found
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.model_name_or_path={name}: {reason} Give a folder, a config.json, or one of {', '.join(SHAPES)}."
        ) from None
