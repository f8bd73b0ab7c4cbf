"""Reading options: one YAML file plus dotted overrides, and errors that name the user's key."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from adalora_scale.config import options
from adalora_scale.config.hints import check_training_names, hint
from adalora_scale.config.options import AdaLoraConfig, Fsdp2Config, RunConfig
from adalora_scale.config.yaml_text import parse_yaml, read_yaml
from adalora_scale.errors import UserError, nearest
from adalora_scale.messages import quoted

_SECTIONS = "model, data, adalora, training, engine, task"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML file and apply ``section.key=value`` overrides (values are parsed as YAML).

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, or a value has the wrong type or range.
    """
    return config_from_tree(read_tree(path, overrides))


def config_from_tree(tree: dict[str, Any]) -> RunConfig:
    """Build a run's config from what its YAML file holds.

    Raises:
        UserError: a key is unknown, or a value has the wrong type or range.
    """
    config: RunConfig = _build(RunConfig, tree)
    check_training_names(config)
    return config


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a YAML file holds after its overrides; keys that nobody set are not there.

    Raises:
        UserError: the file is missing or not YAML, or an override is not of the form section.key=value.
    """
    tree = read_yaml(path, "--config:")
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping with the sections {_SECTIONS}.")
    for override in overrides:
        apply_override(tree, override)
    return tree


def adalora_config_from_dict(tree: dict[str, Any]) -> AdaLoraConfig:
    """Build an `AdaLoraConfig` from a mapping with the same checks as the YAML file.

    Raises:
        UserError: a key is unknown, or a value has the wrong type or range.
    """
    return _build(AdaLoraConfig, tree, prefix="adalora.")


def fsdp2_config_from_dict(tree: dict[str, Any]) -> Fsdp2Config:
    """Build `engine.config` of FSDP2 from a mapping.

    Raises:
        UserError: a key is unknown, or a value has the wrong type or range.
    """
    return _build(Fsdp2Config, tree, prefix="engine.config.")


def check_value(key: str, value: Any, annotation: Any) -> Any:
    """Return `value` converted to `annotation`, or raise a UserError that names `key`."""
    try:
        return TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{key}: {error.errors()[0]['msg']} (got {quoted(value)}).") from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set the key that an override names, in place.

    Raises:
        UserError: it is not of the form section.key=value, or its value is not YAML.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override '{override}' is not of the form section.key=value.")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"the value in override '{override}' is not valid YAML; quote it.") from None
    node = tree
    *parents, leaf = key.split(".")
    for name in parents:
        child = node.setdefault(name, {})
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise UserError(f"override '{override}': '{name}' holds a plain value, so it has no keys below it.")
        node = child
    node[leaf] = value


def _build(cls: type[Any], tree: dict[str, Any], prefix: str = "") -> Any:
    """Validate a tree into a dataclass, turning pydantic's first complaint into one line about the user's key."""
    try:
        return TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        raise UserError(_explain(cls, error, prefix)) from None


def _explain(cls: type[Any], error: ValidationError, prefix: str) -> str:
    # An unknown key is usually the cause of a missing one, so it is named first.
    problems = sorted(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
    problem = problems[0]
    path = [str(part) for part in problem["loc"] if isinstance(part, str)]
    if problem["type"] == "unexpected_keyword_argument":
        owner = _owner(cls, path[:-1])
        names = [f.name for f in dataclasses.fields(owner)]
        near = hint(path[-1], names) or f" Known: {', '.join(names)}."
        return f"unknown key '{prefix}{'.'.join(path)}'.{near}"
    # Union branches appear in pydantic's location ("tinit.int"); the user only knows the key.
    key = prefix + ".".join(_known_prefix(cls, path))
    if problem["type"] in ("missing", "missing_argument"):
        return f"missing key '{key}'; add it to the config file."
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    choices = problem["ctx"]["expected"].split("'")[1::2] if problem["type"] == "literal_error" else []
    near = nearest(str(problem["input"]), choices) if choices else ""
    return f"{key}: {problem['msg']} (got {quoted(problem['input'])}).{near}"


def _owner(cls: type[Any], path: Sequence[str]) -> type[Any]:
    for name in path:
        annotation = {f.name: f for f in dataclasses.fields(cls)}[name].type
        cls = getattr(options, annotation) if isinstance(annotation, str) else annotation
    return cls


def _known_prefix(cls: type[Any], path: Sequence[str]) -> list[str]:
    known: list[str] = []
    for name in path:
        if not dataclasses.is_dataclass(cls) or name not in {f.name for f in dataclasses.fields(cls)}:
            break
        known.append(name)
        annotation = {f.name: f for f in dataclasses.fields(cls)}[name].type
        cls = getattr(options, annotation, object) if isinstance(annotation, str) else annotation
    return known
