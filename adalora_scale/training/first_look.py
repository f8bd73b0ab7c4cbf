"""The files that a config names, looked for before any library that takes seconds to import.

Only what is plainly not there is refused here; whoever reads a file looks at all of it again.
"""

from __future__ import annotations

from pathlib import Path

from adalora_scale.config import ModelConfig, RunConfig
from adalora_scale.config.mixing import train_entries
from adalora_scale.data.names import look, template_file
from adalora_scale.errors import UserError
from adalora_scale.files import is_url
from adalora_scale.reading.text import read_text
from adalora_scale.training.output_store import check_keys


def look_at_files(config: RunConfig, *, resumes: bool = True) -> None:
    """See that the files are there that a run reads.

    Args:
        config: the run's.
        resumes: whether the run may go on from a checkpoint; a preview does not.

    Raises:
        UserError: one is missing; names the key or the file.
    """
    look_at_model(config.model)
    if config.model.adapter_path is not None and is_url(config.model.adapter_path):
        raise UserError(
            f"model.adapter_path={config.model.adapter_path} is a URL, and all ranks read the adapter; copy it to a "
            f"folder that all machines see (of S3: aws s3 sync URL FOLDER), and name that."
        )
    if (adapter := config.model.adapter_path) is not None and not Path(adapter).expanduser().is_dir():
        raise UserError(f"model.adapter_path={adapter} is not a folder.")
    held_out = [config.data.eval] if isinstance(config.data.eval, str) else config.data.eval or []
    for name in [*(entry.path for entry in train_entries(config.data.train)[0]), *held_out]:
        look(str(name))
    if config.data.chat_template is not None:
        template_file(config.data.chat_template)
    if isinstance(config.engine.config, str):
        read_text(config.engine.config, "engine.config=")
    check_keys(config.training)
    asked = config.training.get("resume_from_checkpoint")
    if not resumes or not isinstance(asked, str) or asked.lower() in ("auto", "true", "false", "") or is_url(asked):
        return
    if not Path(asked).is_dir():
        raise UserError(
            f"training.resume_from_checkpoint={asked} is not a folder; name a checkpoint's, or auto for the newest of "
            f"training.output_dir."
        )


def look_at_model(model: ModelConfig) -> None:
    """See that the folders of the base and its tokenizer are there, where the names can be nothing else.

    Raises:
        UserError: one is not.
    """
    for key in ("model_name_or_path", "tokenizer_name_or_path"):
        path = getattr(model, key)
        if path is None:
            continue
        if Path(path).is_file():
            raise UserError(f"model.{key}={path} is a file; name the folder that it is in.")
        if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).is_dir():
            raise UserError(f"model.{key}={path} is not a folder.")
