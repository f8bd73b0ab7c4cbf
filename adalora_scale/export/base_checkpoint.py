"""A base model's safetensors checkpoint, and which parameter of the model each of its tensors becomes.

transformers 5 renames and converts tensors while loading (`conversion_mapping`), so a checkpoint's names are not the
model's. The renaming is asked of transformers itself, on a model without memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from adalora_scale.adalora.adaptables import adaptable_of
from adalora_scale.adalora.base_digest import WeightsDigest
from adalora_scale.adalora.injection import is_digested
from adalora_scale.adalora.targets import is_inside
from adalora_scale.errors import UserError
from adalora_scale.export.base_experts import ExpertPart, stacked_samples
from adalora_scale.export.tensor_files import DTYPES, FLOATING, TensorFile
from adalora_scale.quantization.base_files import INDEX_NAME, SINGLE_NAME, BaseFiles
from adalora_scale.quantization.fused import place_of
from adalora_scale.reading.base_config import check_base, foreign
from adalora_scale.reading.json_text import read_object
from adalora_scale.reading.written import check_written
from adalora_scale.tasks.building import build_on_meta
from adalora_scale.tasks.task import Task
from adalora_scale.tasks.vocabulary import fit_rows

_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class Source:
    """One tensor of the checkpoint."""

    key: str
    """Its name in the files."""
    file: TensorFile
    parameter: str | None
    """The model's parameter it becomes; None for tensors that the model ignores."""
    converted: bool
    """Whether transformers computes the parameter from this tensor (and others) instead of taking it over."""
    expert: ExpertPart | None = None
    """What it is of a stack of experts, where it is converted to one."""


class BaseCheckpoint:
    """The checkpoint in a folder.

    Args:
        directory: the base model's folder.
        task: decides the class of the model; None takes the one that config.json names.
        num_labels: classes of a sequence classifier.
        held: shape of every tensor that an adapter holds beside its factors; the model gets the rows of its embedding.
        trust_remote_code: run model code that lies in the folder.

    Raises:
        UserError: files are missing, damaged or pickled.
        Unsupported: transformers cannot build the model's class.
    """

    def __init__(
        self,
        directory: Path,
        *,
        task: Task | None,
        num_labels: int | None,
        held: Mapping[str, tuple[int, ...]] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.directory = directory
        check_base(str(directory))
        check_written(str(directory))
        self.config: dict[str, Any] = read_object(directory / "config.json", finite=False)
        self.quantization: dict[str, Any] | None = self.config.get("quantization_config")
        self.checkpoint = _open(directory)
        files = {path: TensorFile(path) for path in dict.fromkeys(t.file for t in self.checkpoint.tensors.values())}
        self.model = _meta_model(directory, task, num_labels, trust_remote_code)
        self.grown = fit_rows(self.model, held or {})
        """Tensors that have more rows in the adapter than here → rows of the checkpoint."""
        self.parameters: dict[str, torch.Size] = {name: t.shape for name, t in self.model.state_dict().items()}
        self.aliases = _aliases(self.model)
        """Parameter → every name of the tensor that the model holds under several (tied embeddings)."""
        self.sources = self._sources({key: file for file in files.values() for key in file.entries})
        """Every tensor, in the order of the files."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(source.file.entries[source.key].size for source in self.sources)

    def tensor(self, parameter: str) -> Tensor | None:
        """Read a parameter of the model; None where the checkpoint has it in another form, or not at all."""
        source = self._source(parameter)
        return source.file.tensor(source.key) if source else None

    def stored_dtype(self, parameter: str) -> torch.dtype | None:
        """Return the dtype that the checkpoint has a parameter in; None where it has it in another form, or not."""
        source = self._source(parameter)
        return DTYPES[source.file.entries[source.key].dtype] if source else None

    def _source(self, parameter: str) -> Source | None:
        names = {parameter, *self.aliases.get(parameter, [])}
        found = (source for source in self.sources if source.parameter in names and not source.converted)
        return next((source for source in found if source.file.entries[source.key].dtype in FLOATING), None)

    def dtype(self) -> str:
        """Return the dtype (format's naming) that most of the weights have."""
        sizes: dict[str, int] = {}
        for source in self.sources:
            entry = source.file.entries[source.key]
            if entry.dtype in FLOATING:
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.size
        return max(sizes, key=lambda name: sizes[name], default="F32")

    def transposed(self, module: str) -> bool:
        """Return whether the module's weight lies as (in, out): transformers' Conv1D, embeddings."""
        layer = self.model.get_submodule(module)
        return adaptable_of(layer).is_transposed(layer)

    def is_head(self, parameter: str) -> bool:
        """Return whether a parameter is the output head's."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        return head is not None and self.model.get_submodule(parameter.rpartition(".")[0]) is head

    def same_module(self, first: str, second: str) -> bool:
        """Return whether two parameter names belong to one module that the model holds twice."""
        return self.model.get_submodule(first.rpartition(".")[0]) is self.model.get_submodule(second.rpartition(".")[0])

    def digests(self, targets: list[str], saved: list[str]) -> dict[str, dict[str, str]]:
        """Return what `digest_base` returns for the loaded model, from single elements of the files.

        Args:
            targets: adapted layers; of experts the tensor's name.
            saved: modules that were trained in full.
        """
        embedding = self._embedding()
        found: dict[str, Source] = {s.parameter: s for s in self.sources if s.parameter and not s.converted}
        parts = {"adapted": WeightsDigest(), "rest": WeightsDigest()}
        looked_at = [("adapted", name if name in self.parameters else f"{name}.weight") for name in targets]
        for name, parameter in self.model.named_parameters():
            is_embedding = embedding in (name, *self.aliases.get(name, []))
            if is_digested(name, parameter.dim(), saved) or (is_embedding and not is_inside(name, saved)):
                looked_at.append(("rest", name))
        for part, name in looked_at:
            # A source may lack: what the checkpoint does not hold is newly initialised at loading.
            source = next((found[alias] for alias in (name, *self.aliases.get(name, [])) if alias in found), None)
            said = f"{name}.weight" if part == "adapted" and name in targets else name  # as once experts are split
            samples = source.file.samples(source.key) if source else self._stacked_samples(name)
            parts[part].add(said, self.parameters[name], samples)
        return {name: result for name, digest in parts.items() if (result := digest.result())}

    def _stacked_samples(self, parameter: str) -> Tensor | None:
        pieces = {
            (source.expert.number, source.expert.part): (source.file, source.key)
            for source in self.sources
            if source.parameter == parameter and source.expert is not None
        }
        return stacked_samples(pieces, self.parameters[parameter]) if pieces else None

    def _embedding(self) -> str | None:
        try:
            embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        except NotImplementedError:
            return None
        return next((f"{name}.weight" for name, module in self.model.named_modules() if module is embedding), None)

    def expert_tensors(self) -> dict[str, dict[int, list[str]]]:
        """Return tensor of experts → number → the checkpoint's own tensors, without `.weight`, by their parts.

        Only where the checkpoint has tensors of each expert's own.
        """
        found: dict[str, dict[int, dict[int, str]]] = {}
        for source in self.sources:
            if source.parameter is not None and (own := source.expert) is not None:
                parts = found.setdefault(source.parameter, {}).setdefault(own.number, {})
                parts[own.part] = source.key.removesuffix(".weight")
        return {
            layer: {number: [parts[part] for part in sorted(parts)] for number, parts in each.items()}
            for layer, each in found.items()
        }

    def keeps_name(self, parameter: str) -> bool:
        """Return whether a tensor stored under the parameter's own name is loaded into it."""
        return self._rename([parameter])[parameter] == (parameter, None)

    def _sources(self, where: dict[str, TensorFile]) -> list[Source]:
        found = self._rename(where)
        renamings, converters = self._conversions()

        def part_of(key: str, pattern: str | None) -> ExpertPart | None:
            if pattern is None:
                return None
            converter = next(entry for entry in converters if pattern in entry.source_patterns)
            place = place_of(converter, pattern, apply_renamings(key, renamings))
            return None if place is None else ExpertPart(*place)

        return [
            Source(key, file, name, pattern is not None, part_of(key, pattern))
            for key, file in where.items()
            for name, pattern in [found[key]]
        ]

    def _conversions(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        mapping = get_model_conversion_mapping(self.model)  # type: ignore[arg-type]
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        return renamings, [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def _rename(self, keys: Iterable[str]) -> dict[str, tuple[str | None, str | None]]:
        """Return the model's name for each key, and the source pattern of the converter that takes it, if one does."""
        renamings, converters = self._conversions()
        prefix = getattr(self.model, "base_model_prefix", "")
        state = self.model.state_dict()
        found: dict[str, tuple[str | None, str | None]] = {}
        for key in sorted(keys, key=dot_natural_key):  # some renamings depend on what came before
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], prefix, state)
            known = name in state or pattern is not None
            found[key] = (name if known else None, pattern)
        return found


def rows_in(base: BaseCheckpoint) -> int:
    """Return the rows that the embedding has in the model of an adapter that enlarged it."""
    return base.parameters[next(iter(base.grown))][0]


def local_base(name: str, revision: str | None = None) -> Path:
    """Return the folder of a base model; a hub id is fetched (or found in the cache).

    Raises:
        UserError: there is no such folder or model.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"the base model {name} is not a folder; say where it is with --base.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_WANTED)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the base model {name} cannot be fetched ({reason}); say where it is with --base.") from None


def _open(directory: Path) -> BaseFiles:
    if not any((directory / name).exists() for name in (INDEX_NAME, SINGLE_NAME)) and not any(
        directory.glob("pytorch_model*.bin")
    ):
        raise UserError(f"no {SINGLE_NAME} or {INDEX_NAME} in {directory}; pass the base model's folder to --base.")
    return BaseFiles.open(str(directory))


def _meta_model(directory: Path, task: Task | None, num_labels: int | None, trust_remote_code: bool) -> nn.Module:
    options: dict[str, Any] = {"num_labels": num_labels} if num_labels is not None else {}
    with foreign(f"the base model in {directory} cannot be built"):
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code, **options)
        config.dtype = torch.float32
        return build_on_meta(task, config, trust_remote_code=trust_remote_code)


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}
