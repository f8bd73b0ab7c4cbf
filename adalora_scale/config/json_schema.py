"""The JSON schema of a run's YAML file, for editors that complete and check keys.

Types, defaults and descriptions are those of the options (`options.py`) and of the classes that `training:` is made of
(`training_keys.py`, read as text: no library is imported).
"""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import TypeAdapter

from adalora_scale.config.options import SCORES, RunConfig, TaskName
from adalora_scale.config.presets import PRESETS
from adalora_scale.config.training_keys import MANAGED, OWN_KEYS, OWN_MEANINGS, VendorKey, vendor_keys

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_TYPES = {
    "bool": "boolean",
    "int": "integer",
    "float": "number",
    "str": "string",
    "None": "null",
    "dict": "object",
    "list": "array",
}
# YAML 1.1 reads 2e-4 as text (it wants 2.0e-4), which is converted here as it is by the config's reader.
_NUMBER = {
    "anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"}]
}


def run_schema() -> dict[str, Any]:
    """Return the schema of a run's YAML file, draft 2020-12."""
    schema = TypeAdapter(RunConfig).json_schema()
    schema = {"$schema": DRAFT, **schema, "title": "A run of adalora_scale"}
    keys = {task: _training(task) for task in get_args(TaskName)}
    meaning = schema["properties"]["training"].get("description", "")
    everything = {name: entry for entries in keys.values() for name, entry in entries.items()}
    schema["properties"]["training"] = {
        "type": "object",
        "description": meaning,
        "properties": dict(sorted(everything.items())),
        "additionalProperties": False,
    }
    default = schema["properties"]["task"].get("default")
    schema["allOf"] = [
        {
            "if": {"properties": {"task": {"const": task}}, **({} if task == default else {"required": ["task"]})},
            "then": {"properties": {"training": {"propertyNames": {"enum": sorted(entries)}}}},
        }
        for task, entries in keys.items()
    ]
    method = schema["$defs"]["AdaLoraConfig"]["properties"]
    method["score"]["enum"], method["preset"]["enum"] = list(SCORES), list(PRESETS)
    _entries(schema["$defs"]["DataConfig"]["properties"]["train"])
    tidied: dict[str, Any] = _tidied(schema)
    return tidied


def _training(task: str) -> dict[str, Any]:
    """Return the keys of `training:` of a task; none are known where the vendor's files cannot be read as text."""
    theirs = {
        name: _described(_of_annotation(key.annotation), key)
        for name, key in (vendor_keys(task) or {}).items()
        if name not in MANAGED
    }
    ours = {
        name: {**TypeAdapter(annotation).json_schema(), "description": OWN_MEANINGS[name]}
        for name, annotation in OWN_KEYS.items()
    }
    theirs["resume_from_checkpoint"] = {
        "anyOf": [{"type": "boolean"}, {"type": "string"}, {"type": "null"}],
        "description": "auto: the newest complete checkpoint of output_dir, or a start; or a checkpoint's folder.",
    }
    return theirs | ours


def _described(schema: dict[str, Any], key: VendorKey) -> dict[str, Any]:
    default = f" Default: {key.default}." if key.default else ""
    return {**schema, "description": f"{key.meaning}{default}".strip()}


def _of_annotation(annotation: str) -> dict[str, Any]:
    """Return the schema of a type written as text; of what is no plain type, anything."""
    parts = [re.sub(r"\[.*\]$", "", part.strip()) for part in annotation.split(" | ")]
    if any(part not in _TYPES for part in parts):
        return {}
    kinds = [{"type": _TYPES[part]} for part in parts]
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


def _entries(train: dict[str, Any]) -> None:
    """Give entries of `data.train` that are mappings their keys."""
    for choice in train["anyOf"]:
        for entry in choice.get("items", {}).get("anyOf", ()):
            if entry.get("type") == "object":
                weight = {"type": "number", "exclusiveMinimum": 0, "description": "Its weight against the others."}
                rows = {"type": "integer", "minimum": 1, "description": "Rows of it in an epoch."}
                path = {"type": "string", "description": "A file, a pattern, a folder or a hub id."}
                entry["properties"] = {"path": path, "weight": weight, "rows": rows}
                entry["required"], entry["additionalProperties"] = ["path"], False


def _tidied(node: Any) -> Any:
    """Leave out defaults that a preset replaces (null where it is no value), and take numbers as YAML 1.1 has them."""
    if isinstance(node, list):
        return [_tidied(inner) for inner in node]
    if not isinstance(node, dict):
        return node
    found = {key: _tidied(inner) for key, inner in node.items() if not (key == "title" and isinstance(inner, str))}
    if found.get("default", "") is None and not _takes_null(found):
        del found["default"]
    if found.get("type") == "number" and "exclusiveMinimum" not in found:
        found = {**{key: value for key, value in found.items() if key != "type"}, **_NUMBER}
    return found


def _takes_null(node: dict[str, Any]) -> bool:
    return any(choice.get("type") == "null" for choice in node.get("anyOf", [node]))
