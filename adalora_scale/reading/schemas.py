"""What the JSON files of adapters, checkpoints and bases must hold, as far as anything here relies on it.

Values of a wrong type are refused, not converted: "8" is no rank. Keys that nobody here reads pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from adalora_scale.errors import UserError
from adalora_scale.reading.json_text import shown

_MAX_RANKS = 65_536
_Model = TypeVar("_Model", bound=BaseModel)


def checked(
    model: type[_Model],
    tree: Any,
    name: Path | str,
    *,
    error: type[UserError] = UserError,
    way_out: str = "get the file again",
) -> _Model:
    """Check a JSON object against a schema.

    Args:
        model: the schema.
        tree: what was read.
        name: the file, for messages.
        error: what is raised.
        way_out: how the message ends.

    Raises:
        UserError: (as `error`) a key is missing or has a wrong type or value; the message names the first.
    """
    try:
        if not isinstance(tree, dict):
            raise error(f"{name} must hold a JSON object, not {shown(tree)}; {way_out}.")
        return model.model_validate(tree)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        what = "is missing" if first["type"] == "missing" else f"is {shown(first['input'])}"
        said = first["msg"].removeprefix("Value error, ").rstrip(".")
        rest = "" if first["type"] == "missing" else f" ({said[0].lower()}{said[1:]})"
        raise error(f"{name}: '{shown(where)}' {what}{rest}; {way_out}.") from None


def _each(value_type: Any) -> BeforeValidator:
    """Check an object's values one by one and stop at the first: pydantic would collect millions of complaints."""
    adapter = TypeAdapter(value_type, config=ConfigDict(strict=True))

    def check(tree: Any) -> Any:
        if isinstance(tree, dict):
            for key, value in tree.items():
                try:
                    adapter.validate_python(value)
                except ValidationError as problem:
                    said = problem.errors(include_url=False, include_context=False)[0]["msg"]
                    raise ValueError(f"{shown(key)} in it is {shown(value)}: {said}") from None
        return tree

    return BeforeValidator(check)


def _one_by_one(accepts: Callable[[Any], bool], what: str) -> BeforeValidator:
    def check(values: Any) -> Any:
        if isinstance(values, list) and not all(map(accepts, values)):
            raise ValueError(f"it must be a list of {what}")
        return values

    return BeforeValidator(check)


Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Names = Annotated[list[Any], _one_by_one(lambda value: isinstance(value, str), "names")]
Mask = Annotated[list[Any], _one_by_one(lambda value: isinstance(value, bool), "true and false")]
Bits = Annotated[str, StringConstraints(pattern=r"^[01]*$")]


def _shape(values: Any) -> Any:
    if isinstance(values, list) and all(type(value) is int and value >= 0 for value in values):
        if len(values) > 16 or math.prod(values) >= 2**53:
            raise ValueError("it is larger than any tensor")
        return values
    raise ValueError("it must be a list of sizes")


Shape = Annotated[Any, BeforeValidator(_shape)]


def _run(values: Any) -> Any:
    if _shape(values) is values and len(values) == 3 and max(values) < 2**53:
        return values
    raise ValueError("it must be a rank and two lengths")


Run = Annotated[Any, BeforeValidator(_run)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class AdapterConfig(_Strict):
    """`adapter_config.json`, PEFT's."""

    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    r: Positive | None = None
    init_r: Positive | None = None
    target_r: Count | None = None
    lora_alpha: Annotated[int | float, Field(gt=0, lt=2**53)]
    lora_dropout: Annotated[float, Field(ge=0, le=1)] | None = None
    total_step: Count | None = None
    tinit: Count | None = None
    tfinal: Count | None = None
    deltaT: Count | None = None
    rank_pattern: Annotated[dict[str, Any], _each(Positive | Mask)] | None = None
    alpha_pattern: Annotated[dict[str, Any], _each(Annotated[int | float, Field(gt=0, lt=2**53)])] | None = None
    target_modules: str | Names | None = None
    target_parameters: Names | None = None
    modules_to_save: Names | None = None
    fan_in_fan_out: bool | None = None
    use_rslora: bool | None = None
    bias: str | None = None


class AdapterRecord(_Strict):
    """What this project writes into the metadata of an adapter's weights."""

    base: Annotated[dict[str, Any], _each(dict[str, str])] | None = None
    labels: Names | None = None
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = None
    quantisation: dict[str, Any] | None = None
    peft_scale: bool | None = None
    unfinished: Literal["no allocator", "before the final allocation"] | None = None
    checksum: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None


class Index(_Strict):
    """`model.safetensors.index.json`, transformers'."""

    weight_map: Annotated[dict[str, Any], _each(Name)]


class QuantState(_Strict):
    """One weight's `quant_state`, bitsandbytes'; of a tensor over experts there are three sides."""

    quant_type: str
    blocksize: Positive
    dtype: Annotated[str, StringConstraints(pattern=r"^(float32|bfloat16|float16)$")]
    shape: Annotated[list[Positive], Field(min_length=2, max_length=3)]
    nested_blocksize: Positive | None = None
    nested_dtype: str | None = None
    nested_offset: Finite | None = None


class File(_Strict):
    """A file of a checkpoint."""

    bytes: Count
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Position(_Strict):
    """The allocator's position in a checkpoint."""

    mask: Annotated[dict[str, Any], _each(Bits)]
    frozen: bool
    step: Count
    total_step: Count
    budget: int | float
    score: str | None = None
    preset: str | None = None
    budget_unit: str | None = None
    init_r: Count | None = None


class Optimizer(_Strict):
    """The optimizer's numbers in a checkpoint: of each parameter, the usual ones under the empty name."""

    scalars: Annotated[dict[str, Any], _each(dict[str, int | float | bool])]


class Loop(_Strict):
    """The loop's sums in a checkpoint; a sum of losses may be no number."""

    model_config = ConfigDict(allow_inf_nan=True)
    loss_sum: float
    last_logged: Count
    scheduler: dict[str, Any]
    param_groups: Annotated[list[dict[str, int | float | bool | None]], Field(max_length=10_000)]
    scaler: dict[str, Any] | None
    loss_scaler: Annotated[dict[str, Any], _each(int | float | bool)] | None
    tokens: Count | float | None = None
    sums: Annotated[dict[str, Any], _each(list[int | float])] | None = None


class Manifest(_Strict):
    """`manifest.json` of a checkpoint."""

    format: str
    version: Positive
    step: Count
    world_size: Annotated[int, Field(gt=0, le=_MAX_RANKS)]
    files: dict[Name, File]
    tensors: dict[str, Annotated[dict[str, Any], _each(Shape)]]
    runs: dict[str, Annotated[dict[str, Any], _each(Run)]] | None = None
    kinds: dict[str, Annotated[Names, Field(max_length=100)]] | None = None
    engine: str | None = None
    micro_batch: list[Positive] | None = None
    base_model: str | None = None
    compact: bool | None = None
    identity: dict[str, Any] | None = None
    base_files: dict[Name, File] | None = None
    allocator: Position | None = None
    optimizer: Optimizer | None = None
    loop: Loop | None = None
    records: Annotated[dict[str, Any], _each(Count)] | None = None
    forms: Annotated[dict[str, Any], _each(dict[str, Any])] | None = None
    ties: dict[str, list[str]] | None = None


class TrainerState(_Strict):
    """`trainer_state.json`, transformers'; what was logged may be no number."""

    model_config = ConfigDict(allow_inf_nan=True)
    global_step: Count
    max_steps: Count | None = None
    epoch: float | None = None
    log_history: Annotated[list[Any], _one_by_one(lambda entry: isinstance(entry, dict), "records")] = []
    best_model_checkpoint: str | None = None
    stateful_callbacks: dict[str, Any] | None = None


class BaseConfig(_Strict):
    """A base model's `config.json`, transformers'; what its own class checks is not repeated."""

    model_config = ConfigDict(allow_inf_nan=True)  # Mamba's time_step_limit ends at Infinity
    model_type: str | None = None
    architectures: Names | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    num_labels: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    id2label: dict[str, Any] | None = None
    label2id: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    tie_word_embeddings: bool | None = None
    auto_map: dict[str, Any] | None = None
