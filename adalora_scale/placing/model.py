"""The base model with its adapters, where a run's engine wants it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging as hf_logging

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.adalora.matrices import layer_among
from adalora_scale.adalora.targets import is_inside, modules_to_save
from adalora_scale.config import AdaLoraConfig, RunConfig
from adalora_scale.engines.blocks import transformer_blocks
from adalora_scale.engines.engine import Engine, Loader, Partition, Shard
from adalora_scale.engines.ranks import rank_and_size, together
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.continual import check_start, start_from_adapter
from adalora_scale.messages import say
from adalora_scale.placing import streaming
from adalora_scale.placing.absent import adalora_config_for, describe, require_openable, require_saved
from adalora_scale.placing.stored import stored_weights
from adalora_scale.placing.tiled_mlp import tile_mlps
from adalora_scale.quantization.base_files import BaseFiles
from adalora_scale.quantization.fill import draw_again
from adalora_scale.reading.base_config import foreign, said_of
from adalora_scale.reading.written import check_written
from adalora_scale.tasks.registry import find_task
from adalora_scale.tasks.vocabulary import grow_in_memory


def load_model(config: RunConfig, label_names: list[str] | None = None, *, given: Collection[str] = ()) -> nn.Module:
    """Load the base model whole, in the dtype, with the attention and in the 4 bits that `config.model` names.

    Args:
        config: the run's.
        label_names: names of the classes, for a classifier.
        given: names of tensors that an adapter is going to bring, which the checkpoint need not hold.

    Raises:
        UserError: the base cannot be loaded, or its checkpoint lacks weights.
    """
    model, absent, _ = _load_whole(config, label_names)
    require_saved(model, adalora_config_for(config, model, absent), absent, given)
    return model


def _load_whole(
    config: RunConfig, label_names: list[str] | None, rows: int | None = None
) -> tuple[nn.Module, list[str], dict[str, int]]:
    """Return the base model, the names of the tensors that its checkpoint does not hold, and those that grew."""
    model_config = config.model
    streamed = streaming.is_streamed(model_config)  # looks at the folder before transformers does
    with said_of(model_config.model_name_or_path):
        BaseFiles.open(model_config.model_name_or_path, model_config.revision)  # names, headers, no pickles
    if streamed:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        started = streaming.begin(config, device=device, label_names=label_names, new_heads=partial(new_heads, config))
        return streaming.load_whole(started), started.absent, {}
    options: dict[str, Any] = {
        "dtype": model_config.torch_dtype,
        "revision": model_config.revision,
        "trust_remote_code": model_config.trust_remote_code,
        "use_safetensors": True,
    }
    if model_config.attn_implementation:
        options["attn_implementation"] = model_config.attn_implementation
    task = find_task(config.task)
    factory, options = task.auto_class(), options | task.label_options(label_names)
    # transformers tables what does not fit over many lines; here it is one line, as an error or as a note.
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity(hf_logging.CRITICAL)
    what = f"model.model_name_or_path={model_config.model_name_or_path}"
    try:
        model, loaded = factory.from_pretrained(model_config.model_name_or_path, output_loading_info=True, **options)
    except SafetensorError as error:
        raise UserError(f"{what}: damaged weights ({error}); download the model again.") from None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if "mismatched_sizes" in str(error):
            raise UserError(
                f"{what}: the weights have other shapes than its config.json says; use a config.json and weights that "
                f"belong together."
            ) from None
        with foreign(what):
            raise
    finally:
        hf_logging.set_verbosity(verbosity)
    grown = grow_in_memory(model, rows, seed=config.training.get("seed", 42)) if rows is not None else {}
    return model, sorted(loaded["missing_keys"]), grown


def place_model(
    config: RunConfig,
    engine: Engine,
    arguments: TrainingArguments,
    *,
    label_names: list[str] | None = None,
    bf16: bool = False,
    fit_ranks: Callable[[nn.Module], None] | None = None,
    rows: int | None = None,
) -> nn.Module:
    """Return the base model with its adapters, where the engine wants it.

    4-bit bases, and bases of engines that shard weights, stream from their files; others, and 16-bit ones that cannot
    be streamed, are loaded whole by transformers.

    Args:
        config: the run's.
        engine, arguments: as resolved from it; the engine within its `loading`.
        label_names: names of the classes, for a classifier.
        bf16: whether a sharded model computes in bfloat16.
        fit_ranks: a run that continues from a checkpoint: builds the injected adapters at that checkpoint's ranks.
        rows: of the embedding and the output head, where the base's are too few (`tokens.require_rows`).

    Raises:
        UserError, Unsupported: the base cannot be loaded; raised on all ranks though it be one rank's file.
    """
    # Each rank by itself up to here, and then in collectives: a file that is damaged on one machine ends all ranks.
    loader = together(lambda: _prepared(config, engine, arguments, label_names, fit_ranks, rows))

    def load() -> nn.Module:
        model = engine.load(loader, device=arguments.device, bf16=bf16)
        tile_mlps(model, config.training.get("tiled_mlp", 1))
        return model

    return together(load)


def _prepared(
    config: RunConfig,
    engine: Engine,
    arguments: TrainingArguments,
    label_names: list[str] | None,
    fit_ranks: Callable[[nn.Module], None] | None,
    rows: int | None,
) -> Loader:
    """Build the model with its adapters; no collective."""
    check_written(config.model.model_name_or_path, *rank_and_size())
    streams = engine.streams or streaming.is_streamed(config.model)
    started = _begin_streaming(config, arguments, label_names, rows) if streams else None
    if started is None:
        model, absent, grown = _load_whole(config, label_names, rows)
        # What is drawn depends on the seed and the model's shape, not on what loading it drew before.
        torch.manual_seed(arguments.seed)
        draw_again(model, absent)
        inject_adalora(model, _settled(config, model, absent, grown))
        if fit_ranks is not None:
            fit_ranks(model)
        elif config.model.adapter_path:
            start_from_adapter(model, config.model.adapter_path)
        return _InMemory(model)
    _inject_streamed(config, started, continues=fit_ranks is not None)
    if fit_ranks is not None:
        fit_ranks(started.model)
    return _Streamed(started, torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None)


@dataclass(frozen=True)
class _InMemory:
    """A model that every rank has whole already."""

    model: nn.Module

    def whole(self) -> nn.Module:
        return self.model

    def sharded(self, shard: Shard, storage: torch.device) -> nn.Module:
        shard(self.model)
        return self.model

    def partitioned(self, partition: Partition) -> nn.Module:
        """Leave it whole until training starts."""
        return self.model


@dataclass(frozen=True)
class _Streamed:
    """A model on the meta device that reads its weights where they stay."""

    started: streaming.Loading
    dtype: torch.dtype | None
    """What an engine that partitions computes in; None keeps every dtype."""

    def whole(self) -> nn.Module:
        return streaming.load_whole(self.started)

    def sharded(self, shard: Shard, storage: torch.device) -> nn.Module:
        return streaming.load_sharded(self.started, shard, storage)

    def partitioned(self, partition: Partition) -> nn.Module:
        return streaming.load_partitioned(self.started, transformer_blocks(self.started.model), partition, self.dtype)


def _inject_streamed(config: RunConfig, started: streaming.Loading, *, continues: bool) -> None:
    """Put adapters on the meta device around a base, with the triplets of an earlier adapter if the run has one."""
    adalora, path = _settled(config, started.model, started.absent, started.grown), config.model.adapter_path
    if not path or continues:  # a checkpoint brings its own values
        streaming.inject(started, adalora)
        return
    earlier = check_start(path, adalora)
    own_modules = dict(started.model.named_modules())
    adapted = dict.fromkeys(layer_among(own_modules, matrix) for matrix in earlier.modules)
    base = streaming.digests(started, adapted, earlier.saved)  # before layers are wrapped
    own = stored_weights(started)
    streaming.inject(started, adalora)
    started.fresh += start_from_adapter(started.model, path, base=base, own=own)


def _begin_streaming(
    config: RunConfig, arguments: TrainingArguments, label_names: list[str] | None, rows: int | None
) -> streaming.Loading | None:
    """Begin to stream the base; None, with a note, for a 16-bit base whose files need transformers to load them."""
    heads = partial(new_heads, config)
    try:
        return streaming.begin(
            config, device=arguments.device, label_names=label_names, new_heads=heads, rows=rows, seed=arguments.seed
        )
    except Unsupported as reason:
        if streaming.is_streamed(config.model):
            raise
        if arguments.process_index == 0:
            say(f"every rank loads the base whole: {reason}")
        return None


def new_heads(config: RunConfig, model: nn.Module, absent: list[str]) -> list[str]:
    """Name the modules that the task's checkpoint need not hold, and that are never quantised."""
    saved = modules_to_save(model, adalora_config_for(config, model, absent))
    labels = find_task(config.task).has_labels
    return [name for name in saved if labels or any(is_inside(tensor, [name]) for tensor in absent)]


def _settled(config: RunConfig, model: nn.Module, absent: list[str], grown: Collection[str]) -> AdaLoraConfig:
    """Return the run's adalora section with what is new in modules_to_save; nothing else may lack."""
    adalora = adalora_config_for(config, model, absent, grown)
    require_saved(model, adalora, absent)
    require_openable(config, model, adalora)
    if absent and rank_and_size()[0] == 0:
        say(describe(absent))
    return adalora
