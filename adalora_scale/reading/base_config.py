"""A base model's folder, looked at before transformers reads it.

transformers reads config.json, the tokenizer's files and generation_config.json as if they were its own: what is nested
without end, a pipe, or of another type than it expects is a traceback there, or no end.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adalora_scale.errors import Unsupported, UserError
from adalora_scale.reading.folders import own_file
from adalora_scale.reading.json_text import file_size, read_object, shown
from adalora_scale.reading.schemas import BaseConfig, checked

CONFIG_NAME = "config.json"
_READ = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".safetensors")
"""Endings of what transformers or this package reads, or copies, from a base's folder."""
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_OBJECTS = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json")
"""What transformers parses beside config.json and tokenizer.json to load a model and its tokenizer."""
_TOKENIZER = "tokenizer.json"
_MAX_TOKENIZER = 256 * 2**20
_MAX_TEXT = 256 * 2**20
_COUNTS = re.compile(r"(^|_)(num|n)_(\w+_)?(layers?|blocks?|experts)(_|$)|^(layers|depth|num_layers)$")
_MAX_COUNT = {"layer": 500, "block": 500, "depth": 500, "expert": 100_000}
"""Most modules of a kind: a model is built module by module before its files are compared."""
_MAX_SIZE = 2**31
_LARGE_KEYS = ("token_id", "seed", "max_length", "total")
"""Keys that are no sizes."""
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def check_base(name: str, revision: str | None = None, *, attention: str | None = None) -> None:
    """Look at a base model's small files: a folder's all, of a hub id config.json.

    Args:
        name: a folder or a hub id.
        revision: of the hub id.
        attention: the implementation that a run chooses itself; what the base asks for is not used then.

    Raises:
        UserError: one leads out of the folder, is no regular file, is nested too deeply, has wrong types, asks for code
            from elsewhere, or has sizes that no model has.
    """
    folder = Path(name)
    if not folder.is_dir():
        if (config := _hub_config(name, revision)) is not None:
            check_config(config, attention=attention)
        return
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds an adapter (adapter_config.json), whose base would be loaded from where it says; name the "
            f"base itself in model.model_name_or_path."
        )
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            continue
        if path.suffix in _READ or path.name.upper().startswith(_LICENCES):
            _check_file(path, folder, attention)


@contextlib.contextmanager
def said_of(name: str) -> Iterator[None]:
    """Let errors about a base's files begin with the key that named it, as the user wrote it.

    Raises:
        UserError: what was raised inside, so named.
    """
    try:
        yield
    except UserError as error:
        key = f"model.model_name_or_path={name}"
        raise UserError(str(error) if str(error).startswith(key) else f"{key}: {error}") from None


@contextlib.contextmanager
def foreign(what: str) -> Iterator[None]:
    """Turn whatever another library raises while it reads a stranger's files into one line.

    Raises:
        UserError: it raised something.
    """
    try:
        yield
    except (UserError, Unsupported):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else "no reason given"
        if not isinstance(error, OSError | ValueError):  # says little without its name
            reason = f"{type(error).__name__}: {reason[:200]}"
        raise UserError(f"{what}: {reason}") from error


def hub_hint(name: str, error: BaseException) -> str:
    """Return how to get a model that is no folder here and that the hub did not give; empty where nothing helps.

    Args:
        name: the hub id.
        error: what was said, or raised with what the hub said as its cause.
    """
    if Path(name).exists():
        return ""
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        return f" HF_HUB_OFFLINE is set: run `hf download {name}` where there is network, or name a folder."
    said = f"{error} {error.__cause__ or ''}".lower()
    if any(word in said for word in ("gated", "private", "401", "403", "not a valid model identifier")):
        return f" If {name} is gated or private, ask for access on its page and log in by `hf auth login`."
    if any(word in said for word in ("connect", "resolve", "timed out", "timeout")):
        return f" Without network run `hf download {name}` where there is some, or name a folder."
    return ""


def _check_file(path: Path, folder: Path, attention: str | None) -> None:
    size = file_size(own_file(path, folder))
    if path.suffix == ".safetensors":
        return
    if path.suffix != ".json":
        if size > _MAX_TEXT:
            raise UserError(f"{path} has {size:,} bytes; at most {_MAX_TEXT:,} are read.")
    elif path.name == CONFIG_NAME:
        check_config(path, attention=attention)
    elif path.name == _TOKENIZER:  # its vocabulary may be large; Rust parses it, with a limit on depth
        if size > _MAX_TOKENIZER:
            raise UserError(f"{path} has {size:,} bytes; at most {_MAX_TOKENIZER:,} are read.")
    elif path.name in _OBJECTS:
        read_object(path, finite=False)


def check_config(path: Path, *, attention: str | None = None) -> None:
    """Look at a config.json: its types, its sizes, and the code it asks for.

    Raises:
        UserError: as `check_base`.
    """
    tree = read_object(path, finite=False)
    checked(BaseConfig, tree, path)
    left: list[tuple[str, Any]] = list(tree.items())
    while left:
        key, value = left.pop()
        name = key.lstrip("_").removesuffix("_internal")
        if name in _IMPLEMENTATIONS and not (attention and "attn" in name):
            _check_implementation(path, key, value)
        if isinstance(value, dict):
            left.extend(value.items())
        elif isinstance(value, list):
            left.extend((key, inner) for inner in value)
        elif type(value) is int:
            _check_size(path, key, value)


def _check_size(path: Path, key: str, value: int) -> None:
    if any(word in key for word in _LARGE_KEYS):
        return
    counted = _COUNTS.search(key) is not None
    limit = min((most for word, most in _MAX_COUNT.items() if word in key and counted), default=_MAX_SIZE)
    if abs(value) > limit:
        raise UserError(f"{path}: '{shown(key)}' is {shown(value)}; no model has more than {limit:,}.")


def _check_implementation(path: Path, key: str, value: Any) -> None:
    """Only what is installed here: any other name is a repository of the hub whose code transformers fetches and runs.

    Flash attention without its package is one too.
    """
    values = list(value.values()) if isinstance(value, dict) else [value]
    known = _known("attn" in key)
    for one in values:
        if one is not None and (not isinstance(one, str) or one not in known):
            raise UserError(
                f"{path}: '{key}' is {shown(one)}, which is not installed here; known are {', '.join(sorted(known))}. "
                f"{'Choose one by model.attn_implementation.' if 'attn' in key else 'Remove the key.'}"
            )


def _known(attention: bool) -> set[str]:
    from transformers.utils import import_utils

    if not attention:
        return {"eager", "batched_mm", "grouped_mm"}
    versions = (2, 3, 4)
    checks = {number: getattr(import_utils, f"is_flash_attn_{number}_available", None) for number in versions}
    flash = {f"flash_attention_{number}" for number, check in checks.items() if check is not None and check()}
    return {"eager", "sdpa", "flex_attention", "paged|eager"} | flash


def _hub_config(name: str, revision: str | None) -> Path | None:
    """Return a hub model's config.json in the cache, fetched if need be; None where transformers will say why not."""
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(name, CONFIG_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)
