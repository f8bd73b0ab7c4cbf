"""An adapter folder as a file reader sees it: ours, PEFT's AdaLoRA, or plain LoRA; no model is needed.

Only JSON and safetensors are read. Pickled weights can run code when they are opened and are refused.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adalora_scale.adalora.adaptables import MATRIX, FileForm, block, module_of_factor, namings
from adalora_scale.adalora.matrices import layer_of_matrix
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.adapter_keys import refuse_more, require_plain
from adalora_scale.export.adapter_record import BEFORE_FINAL, PEFT_SCALE, checked_record
from adalora_scale.export.base_copies import BASE_LAYER, require_own_copies
from adalora_scale.export.tensor_files import FLOATING, TensorFile
from adalora_scale.reading.folders import PICKLES, own_file
from adalora_scale.reading.json_text import as_object, read_object, shown
from adalora_scale.reading.patterns import Patterns
from adalora_scale.reading.schemas import AdapterConfig, checked
from adalora_scale.tasks.registry import task_of_peft
from adalora_scale.tasks.task import Task

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class ModuleShape:
    """One adapted matrix."""

    rank: int
    in_features: int
    """Rows of A: the size of the matrix's input, for a convolution channels · kernel."""
    out_features: int
    """Rows of B."""
    form: FileForm = MATRIX
    """How the file holds the factors."""

    @property
    def parameters(self) -> int:
        """Elements of its two factors."""
        return self.rank * (self.in_features + self.out_features)


@dataclass(frozen=True)
class Update:
    """ΔW = B diag(e) A of one matrix, float32."""

    a: Tensor  # (r, in_features)
    e: Tensor  # (r,)
    b: Tensor  # (out_features, r)

    def delta(self, start: int, stop: int, *, transposed: bool) -> Tensor:
        """Return rows [start, stop) of ΔW (out_features, in_features), or of its transpose (input first)."""
        return block(self.a, self.e, self.b, start, stop, transposed=transposed)


class AdapterFile:
    """The adapter in a folder.

    Args:
        directory: where `adapter_config.json` and `adapter_model.safetensors` are.

    Raises:
        UserError: files are missing or damaged, pickled, or do not belong together.
        Unsupported: the adapter is neither AdaLoRA nor plain LoRA.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.config = read_adapter_config(self.directory, methods=("ADALORA", "LORA"), later=("target_parameters",))
        self.method: str = self.config["peft_type"]
        self._file = TensorFile(weights_path(self.directory))
        self.record: dict[str, Any] = checked_record(self._file)
        """What this project wrote beside PEFT's keys; empty for adapters of others."""
        self._weights = self._own_parameters()
        self._ranks, self._alphas = self._patterns()
        self._scalings: dict[str, float] = {}
        self.modules: dict[str, ModuleShape] = {}
        """Adapted module → shape, in the order of the file."""
        self.others: dict[str, tuple[int, ...]] = {}
        """Tensors of modules that were trained in full, by their names in the model → shape."""
        self.copies: dict[str, str] = {}
        """Weights of adapted layers that PEFT saved beside them (`save_embedding_layers`), which must be the base's: by
        their names in the model → the key in the file."""
        for key, entry in self._file.entries.items():
            name = key.removeprefix(PREFIX)
            if entry.dtype not in FLOATING and "lora_" in name:
                raise UserError(f"{self._file.path} holds '{key}' as {entry.dtype}; adapters are floating point.")
            module = module_of_factor(name, self.method)
            if module is not None:
                if module not in self.modules:
                    self.modules[module] = self._shape(module)
            elif "lora_" in name:
                raise Unsupported(f"{self._file.path} holds '{key}', which is not part of a {self.method} update here.")
            elif BASE_LAYER in name:
                self.copies[name.replace(BASE_LAYER, ".")] = key
            else:
                self.others[name] = entry.shape
        if not self.modules:
            first = MATRIX.names(self.method)[0]
            raise UserError(f"{self._file.path} holds no {self.method} tensors (no key ends in .{first}).")

    @functools.cached_property
    def stacks(self) -> dict[str, list[str]]:
        """Layer of experts → its matrices, by number."""
        targets = self.config.get("target_modules")
        layers = set(targets) if isinstance(targets, list) else set()
        found: dict[str, dict[int, str]] = {}
        for name in self.modules:
            place = layer_of_matrix(name)
            if place is not None and name not in layers and place[0] in layers:
                found.setdefault(place[0], {})[place[1]] = name
        return {layer: [own[number] for number in sorted(own)] for layer, own in found.items()}

    @property
    def layers(self) -> list[str]:
        """Adapted layers; of experts one for all of them."""
        stacked = {name: layer for layer, own in self.stacks.items() for name in own}
        return list(dict.fromkeys(stacked.get(name, name) for name in self.modules))

    @property
    def base(self) -> str | None:
        """The base model's path or hub id, as the config names it."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def task_type(self) -> str | None:
        """PEFT's name of the task, such as CAUSAL_LM."""
        return self.config.get("task_type")

    @property
    def task(self) -> Task | None:
        """What it was trained for, as far as this package knows it."""
        return task_of_peft(self.task_type)

    @property
    def final(self) -> bool:
        """Whether the ranks are settled: plain LoRA, or AdaLoRA after its final allocation."""
        return self.unfinished is None

    @property
    def unfinished(self) -> str | None:
        """A key of `UNFINISHED`; None where the ranks are settled. Files without a mark are judged by their masks."""
        if (marked := self.record.get("unfinished")) is not None:
            return str(marked)
        return BEFORE_FINAL if self.method == "ADALORA" and not self.config.get("rank_pattern") else None

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether PEFT must take the base layers' weights as (in, out)."""
        return bool(self.config.get("fan_in_fan_out"))

    @property
    def keeps_ties(self) -> bool:
        """Whether a weight that several modules share stays shared where the file holds it under one name.

        Here it is trained for all of them; PEFT trains a copy, and the others keep the base's.
        """
        return bool(self.record) or bool(self.config.get("ensure_weight_tying"))

    @property
    def saved(self) -> list[str]:
        """Names of the modules that were trained in full."""
        return sorted({name.rpartition(".")[0] for name in self.others})

    def update(self, module: str) -> Update:
        """Read one matrix's update.

        Raises:
            UserError: it is not finite.
        """
        raw = self.triplets(module)
        return Update(raw.a, raw.e * self._scalings[module], raw.b)

    def triplets(self, module: str) -> Update:
        """Read one matrix's update without the scaling.

        Raises:
            UserError: it is not finite.
        """
        names = self.modules[module].form.names(self.method)
        a, *lambdas, b = (self._file.tensor(f"{PREFIX}{module}.{name}").float() for name in names)
        e = lambdas[0].flatten() if lambdas else torch.ones(a.shape[0], dtype=torch.float32)
        a, b = a.flatten(1), b.flatten(1)
        for factor in (a, e, b):
            if not bool(torch.isfinite(factor).all()):
                raise UserError(f"{self._file.path}: the update of '{module}' is not finite; export another step.")
        return Update(a, e, b)

    def scaling(self, module: str) -> float:
        """Return s of ΔW = s · Σ λ P Qᵀ."""
        return self._scalings[module]

    def tensors(self) -> dict[str, Tensor]:
        """Read everything, under the names in the file."""
        kept = self.copies.values()
        return {key: self._file.tensor(key) for key in self._file.entries if BASE_LAYER not in key or key in kept}

    def other(self, name: str) -> Tensor:
        """Read a tensor of a module that was trained in full."""
        return self._file.tensor(PREFIX + name if PREFIX + name in self._file.entries else name)

    def require_own_copies(self, own: Callable[[str], Tensor | None]) -> None:
        """See that `copies` are the base's own weights, and leave them out from here on: the base has them.

        Args:
            own: reads a parameter of the base by its name; None where it cannot.

        Raises:
            UserError: one differs from the base's, or cannot be compared.
        """
        reads = {name: partial(self._file.tensor, key) for name, key in self.copies.items()}
        require_own_copies(reads, own, self.directory)
        self.copies = {}

    def copied(self, kept: Collection[str]) -> dict[str, Tensor]:
        """Read `copies` by the keys they have in an adapter file; plain ones where the module is not in `kept`."""
        keys = {name: key if name.rpartition(".")[0] in kept else PREFIX + name for name, key in self.copies.items()}
        return {keys[name]: self._file.tensor(key) for name, key in self.copies.items()}

    def _shape(self, module: str) -> ModuleShape:
        entries, method = self._file.entries, self.method
        stored = (
            (naming, [entries.get(f"{PREFIX}{module}.{name}") for name in naming.names(method)]) for naming in namings()
        )
        complete = next(((naming, parts) for naming, parts in stored if None not in parts), None)
        if complete is None:
            raise UserError(f"{self._file.path} has no complete triplets for '{module}'.")
        a, *lambdas, b = (entry.shape for entry in complete[1] if entry is not None)
        kernel = a[2:]
        if len(a) < 2 or b[2:] != (1,) * len(kernel) or len(b) < 2 or a[0] != b[1]:
            raise Unsupported(f"{self._file.path}: '{module}' has factors {a} and {b}, not two matrices.")
        if lambdas and lambdas[0] not in ((a[0], 1), (a[0],)):
            raise UserError(f"{self._file.path}: '{module}' has λ of shape {lambdas[0]} for {a[0]} triplets.")
        self._scalings[module] = self._scaling(module, a[0])
        form = dataclasses.replace(complete[0], kernel=kernel)
        return ModuleShape(a[0], math.prod(a[1:]), b[0], form)

    def _scaling(self, module: str, rank: int) -> float:
        if self.method == "ADALORA":
            s = self.config["lora_alpha"] / self.config["init_r"]
            return float(s / peft_scale(self.config["init_r"]) if self.record.get(PEFT_SCALE) else s)
        key = f"{module}.weight" if f"{module}.weight" in self._weights else module
        r = self._ranks.value(key, self.config["r"])
        if r != rank:
            raise UserError(f"{self._file.path}: '{module}' has rank {rank}, {CONFIG_NAME} says {shown(r)}.")
        alpha = self._alphas.value(key, self.config["lora_alpha"])
        return float(alpha / (r**0.5 if self.config.get("use_rslora") else r))

    def _own_parameters(self) -> frozenset[str]:
        """Return the weights that an export named in target_parameters; in files of others they may be experts'."""
        named = self.config.get("target_parameters") or []
        if named and (not self.record or not all(name.endswith(".weight") for name in named)):
            refuse_more("target_parameters", named, self.directory / CONFIG_NAME)
        return frozenset(named)

    def _patterns(self) -> tuple[Patterns, Patterns]:
        """PEFT's rank_pattern and alpha_pattern; an AdaLoRA's rank_pattern is masks by exact names."""
        if self.method == "ADALORA":
            return Patterns({}, CONFIG_NAME), Patterns({}, CONFIG_NAME)
        path = self.directory / CONFIG_NAME
        keys = ("rank_pattern", "alpha_pattern")
        ranks, alphas = (Patterns(self.config.get(key) or {}, f"{path}: {key}") for key in keys)
        return ranks, alphas


def read_adapter_config(
    directory: Path, *, methods: tuple[str, ...] = ("ADALORA",), later: Collection[str] = ()
) -> dict[str, Any]:
    """Read `adapter_config.json` and check what every reader relies on, but for the keys in `later`.

    Raises:
        UserError: the file is missing, no JSON, or without a usable rank and alpha.
        Unsupported: the adapter is of a method that is not in `methods`, or is more than plain LoRA or AdaLoRA.
    """
    path = directory / CONFIG_NAME
    if not path.exists():
        way = "pass the folder that training wrote"
        if any(directory.glob("manifest.json")):
            way = f"it is a checkpoint, make an adapter of it first: adalora-scale export {directory} OUT"
        raise UserError(f"no {CONFIG_NAME} in {directory}; {way}.")
    saved = read_object(own_file(path, directory))
    method = saved.get("peft_type")
    if not isinstance(method, str) or method not in methods:
        known, found = " and ".join(methods), method if method is None or isinstance(method, str) else shown(method)
        raise Unsupported(f"{path} holds a '{found}' adapter; only {known} adapters load here. Use PEFT for others.")
    checked(AdapterConfig, saved, path)
    require_plain(saved, path, later=later)
    rank = "init_r" if method == "ADALORA" else "r"
    if saved.get(rank) is None:
        raise UserError(f"{path}: '{rank}' is missing; it must be a positive number.")
    if method == "ADALORA":
        for name, mask in as_object(saved.get("rank_pattern") or {}, path).items():
            if not isinstance(mask, list):
                raise UserError(f"{path}: 'rank_pattern' holds no mask for {shown(name)}; save the adapter again.")
    return saved


def weights_path(directory: Path) -> Path:
    """Return the path of the adapter's weights.

    Raises:
        UserError: there are none, or only pickled ones.
    """
    path = directory / WEIGHTS_NAME
    if path.exists():
        return own_file(path, directory)
    if pickles := sorted(p.name for suffix in PICKLES for p in directory.glob(f"adapter_model{suffix}")):
        raise UserError(
            f"{directory / pickles[0]} is a pickle, which can run code when it is opened, so it is not read. Let "
            f"whoever made it save the adapter as {WEIGHTS_NAME}."
        )
    raise UserError(f"no {WEIGHTS_NAME} in {directory}; pass the folder that training wrote.")


def peft_scale(init_r: int) -> float:
    """Return what PEFT's AdaLoRA divides an update by beyond init_r: it divides by (init_r + 1e-5)."""
    return (init_r + 1e-5) / init_r
