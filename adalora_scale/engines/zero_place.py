"""DeepSpeed ZeRO-1, 2 and 3 as engines: settings, partitioning a base, and a loop written by hand.

DeepSpeed wraps the model when training starts, through accelerate. What the optimizer's pieces are stands in `zero.py`,
what a plan must know in `zero_plan.py`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from adalora_scale.config import EngineConfig
from adalora_scale.engines.by_hand import Bench, ByHand
from adalora_scale.engines.engine import Engine, Loader, refuse_casts
from adalora_scale.engines.join import join_deepspeed_on_cpu
from adalora_scale.engines.planned import Part, Reading, Traffic, Work
from adalora_scale.engines.zero import ZeroSharding
from adalora_scale.engines.zero_keys import check_keys, check_read
from adalora_scale.engines.zero_plan import zero_memory, zero_traffic
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.messages import quoted
from adalora_scale.reading.json_text import parse_json
from adalora_scale.reading.text import read_text

if TYPE_CHECKING:
    from transformers import TrainingArguments

_FILLED = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
_STAGES = (
    "DeepSpeed's zero_optimization.stage={} is not supported under AdaLoRA; use 1, 2 or 3, or engine.name=ddp without "
    "engine.config."
)


@dataclass(frozen=True)
class Zero(Engine):
    """DeepSpeed at a stage that its configuration says; `accelerate launch` may bring that later."""

    name = "deepspeed"
    start = "deepspeed --num_gpus N"
    package = "deepspeed"
    stage: ClassVar[int] = 0

    configuration: dict[str, Any] | None = None
    """DeepSpeed's configuration; None when `accelerate launch` brings it."""

    @classmethod
    def asked(cls, config: EngineConfig, *, by_accelerate: bool = False) -> Zero:
        """Return the stage that the configuration names."""
        if by_accelerate:
            if config.config is not None:
                raise UserError("engine.config and accelerate's configuration both configure DeepSpeed; keep one.")
            return Zero1()  # which stage it is shows once TrainingArguments has read it, see `loading`
        return at_stage(deepspeed_config(config.config))

    # ---- live objects -------------------------------------------------------------------------------------------

    @classmethod
    def recognises(cls, model: nn.Module, links: Sequence[Any]) -> bool:
        """Return whether one of DeepSpeed's optimizers is around the torch optimizer."""
        return bool(_optimizers(links))

    @classmethod
    def hold(cls, model: nn.Module, links: Sequence[Any]) -> ZeroSharding:
        """Return flat partitions."""
        return ZeroSharding(model, _optimizers(links)[-1], next(filter(_is_engine, links), None))

    @classmethod
    def wraps(cls, model: nn.Module) -> bool:
        """Return whether DeepSpeed's engine is around the model, at this stage.

        Raises:
            Unsupported: it is, at stage 0.
        """
        if not _is_engine(model):
            return False
        stage: int = model.zero_optimization_stage()  # type: ignore[operator]
        if stage == 0:
            raise Unsupported(_STAGES.format(0))
        return stage == cls.stage

    # ---- placing ------------------------------------------------------------------------------------------------

    @classmethod
    def fixed_global_batch(cls, config: str | dict[str, Any]) -> int | None:
        """Return `train_batch_size`."""
        stated = deepspeed_config(config).get("train_batch_size")
        return stated if isinstance(stated, int) else None

    def settle(self, options: dict[str, Any]) -> None:
        """Hand DeepSpeed's configuration to transformers."""
        refuse_casts(options, self.name)
        if options["use_cpu"] and torch.cuda.is_available():
            raise Unsupported("training.use_cpu=true would switch DeepSpeed off; hide the GPUs instead.")
        options["deepspeed"] = self.configuration
        if not torch.cuda.is_available():
            options["accelerator_config"] = (options.get("accelerator_config") or {}) | {"use_configured_state": True}

    def join(self, timeout: timedelta, *, launched: int, use_cpu: bool) -> None:
        """Join ranks where there is no GPU."""
        if not torch.cuda.is_available():
            join_deepspeed_on_cpu(timeout)

    def check(self, arguments: TrainingArguments) -> None:
        """See that DeepSpeed knows its values, and that they are the training section's."""
        if (deepspeed := getattr(arguments, "hf_deepspeed_config", None)) is not None:
            if self.configuration is None:  # accelerate's
                check_keys(deepspeed.config)
            check_read(deepspeed.config)
            refuse_mismatches(deepspeed)

    @contextlib.contextmanager
    def loading(self) -> Iterator[Engine]:
        """Load models whole although ZeRO-3 is configured; yields the stage that TrainingArguments has settled."""
        from transformers.integrations import deepspeed as hf_deepspeed

        settled: Engine = self
        if hf_deepspeed.is_deepspeed_zero3_enabled():
            settled = Zero3(hf_deepspeed.deepspeed_config())
        with whole_weights():
            yield settled

    # ---- planning -----------------------------------------------------------------------------------------------

    @classmethod
    def plain(cls, nodes: int) -> Self:
        """Return it with what configs/deepspeed/ says."""
        tree: dict[str, Any] = {"stage": cls.stage, "overlap_comm": cls.stage > 1}
        if cls.stage == 3:
            tree |= {"reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
            tree |= {"stage3_param_persistence_threshold": "auto"}
        return cls({"zero_optimization": tree})

    @classmethod
    def chosen_by(cls) -> str:
        """Return the name with the file that chooses it."""
        return f"{cls.real} (--deepspeed configs/deepspeed/{cls.real}.json)"

    def memory(self, work: Work) -> list[Part]:
        """Return fp32 masters in partitions, weights whole or partitioned, and the buckets."""
        return zero_memory(work, self.stage, self._section())

    def traffic(self, work: Work) -> Traffic:
        """Return gradients at every micro-batch (stage 1: at the last), weights too under stage 3."""
        return zero_traffic(work, self.stage)

    # ---- loops written by hand ----------------------------------------------------------------------------------

    @classmethod
    def why_not(cls, ranks: int) -> str:
        """DeepSpeed is an optional package."""
        return "deepspeed is not installed" if importlib.util.find_spec("deepspeed") is None else ""

    @classmethod
    def trials(cls) -> dict[str, Engine]:
        """Return the stage alone, with DeepSpeed's defaults."""
        return {cls.real: cls({"zero_optimization": {"stage": cls.stage}})}

    def by_hand(self, bench: Bench) -> ByHand:
        """Give the model to `deepspeed.initialize`."""
        return _ZeroByHand(bench, self.by_hand_config(bench))

    def by_hand_config(self, bench: Bench) -> dict[str, Any]:
        """Return DeepSpeed's whole configuration of a loop."""
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": bench.micro_batch,
            "gradient_accumulation_steps": bench.accumulation,
            "gradient_clipping": bench.max_grad_norm or 0.0,
            "zero_optimization": self._section(),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if bench.bf16:
            config["bf16"] = {"enabled": True}
        return config

    def _section(self) -> dict[str, Any]:
        return dict((self.configuration or {}).get("zero_optimization", {}))


class Zero1(Zero):
    """Optimizer state in partitions."""

    real = "zero1"
    stage = 1

    def by_hand_config(self, bench: Bench) -> dict[str, Any]:
        """In bfloat16 let gradients accumulate in float32: that is BF16_Optimizer, a class of its own."""
        config = super().by_hand_config(bench)
        return config | ({"data_types": {"grad_accum_dtype": "fp32"}} if bench.bf16 else {})


class Zero2(Zero):
    """Gradients in partitions too."""

    real = "zero2"
    stage = 2
    preference = 1


class Zero3(Zero):
    """Weights in partitions too."""

    real = "zero3"
    stage = 3
    preference = 3
    hooks_layers = True
    shares_everything = True

    @property
    def streams(self) -> bool:
        """Rank 0 reads block by block."""
        return True

    def load(self, loader: Loader, *, device: torch.device, bf16: bool) -> nn.Module:
        """Partition each block as it is read."""
        options = self.configuration or {}
        return loader.partitioned(lambda own: partition_zero3(own, options))

    def reading(self, stored: int, largest: int, *, ranks: int, per_node: int, in_4bit: bool) -> Reading:
        """Rank 0 reads, the others receive."""
        return Reading(stored, largest, 1)

    @classmethod
    def trials(cls) -> dict[str, Engine]:
        """Return it with and without the optimizer on the host."""
        offload = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
        return super().trials() | {f"{cls.real}-offload": cls({"zero_optimization": offload})}

    def by_hand_config(self, bench: Bench) -> dict[str, Any]:
        """Let λ stay whole between layers, A and B not; each parameter group falls into about three sub-groups."""
        config = super().by_hand_config(bench)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
        config["zero_optimization"]["sub_group_size"] = max(bench.elements // (6 * bench.ranks), 1)
        return config


class _ZeroByHand(ByHand):
    def __init__(self, bench: Bench, config: dict[str, Any]) -> None:
        import deepspeed

        super().__init__(bench, bench.model)
        self.model, *_ = deepspeed.initialize(model=bench.model, optimizer=self.optimizer, config=config)
        self.optimizer = self.model.optimizer.optimizer
        self.target = self.model
        self._accumulation = bench.accumulation

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss * self._accumulation)  # which divides by it again

    def step(self, *, last: bool) -> None:
        self.model.step()  # DeepSpeed counts micro-batches itself

    def close(self) -> None:
        self.model.destroy()


def at_stage(configuration: dict[str, Any]) -> Zero:
    """Return the engine of DeepSpeed's configuration.

    Raises:
        Unsupported: it is at stage 0, which is what DeepSpeed takes where none is stated.
    """
    stage = (configuration.get("zero_optimization") or {}).get("stage", 0)
    for engine in (Zero1, Zero2, Zero3):
        if engine.stage == stage:
            return engine(configuration)
    raise Unsupported(_STAGES.format(quoted(stage)))


def deepspeed_config(source: str | dict[str, Any] | None) -> dict[str, Any]:
    """Read DeepSpeed's configuration, and let the training section fill in what it leaves out."""
    if source is None:
        raise UserError("engine.name=deepspeed needs engine.config (or --deepspeed FILE), see configs/deepspeed/.")
    tree = (
        parse_json(read_text(source, "engine.config="), f"engine.config={source}")
        if isinstance(source, str)
        else source
    )
    if not isinstance(tree, dict) or "zero_optimization" not in tree:
        raise UserError("engine.config has no zero_optimization section; see configs/deepspeed/zero2.json.")
    for name in ("zero_optimization", "compile"):
        if not isinstance(tree.get(name) or {}, dict):
            raise UserError(f"engine.config: {name} is {quoted(tree[name])}; it must be a mapping.")
    check_keys(tree)
    if (tree.get("compile") or {}).get("deepcompile"):
        raise Unsupported(
            "compile.deepcompile is not supported under AdaLoRA; switch it off in DeepSpeed's configuration."
        )
    # DeepSpeed's own defaults would replace the training section's values without a word.
    return dict.fromkeys(_FILLED, "auto") | tree


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """Load models whole on the CPU although ZeRO-3 is configured; DeepSpeed partitions them when training starts.

    TrainingArguments(deepspeed=…) with stage 3 makes `from_pretrained` partition at load, with parameters of shape (0,)
    and, for a new classifier head, random numbers drawn on rank 0 alone. Loaded whole, adapters start the same on every
    rank and engine; the price is one copy of the base in host memory a rank until training starts.
    """
    from transformers.integrations import deepspeed as hf_deepspeed

    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference


def partition_zero3(parameters: list[nn.Parameter], options: dict[str, Any]) -> None:
    """Partition parameters over the ranks as DeepSpeed ZeRO-3 does, in place, with rank 0's values.

    Args:
        parameters: whole, on this rank's device.
        options: DeepSpeed's configuration; its zero_optimization section decides where partitions are kept.

    Raises:
        Unsupported: parameters on NVMe, or quantised by DeepSpeed.
    """
    import deepspeed
    from deepspeed.utils import groups

    zero = {key: value for key, value in options["zero_optimization"].items() if value != "auto"}
    if (zero.get("offload_param") or {}).get("device") == "nvme" or zero.get("zero_quantized_weights"):
        raise Unsupported(
            "a base cannot be streamed with zero_optimization.offload_param on nvme or zero_quantized_weights; remove "
            "them from DeepSpeed's configuration (a 4-bit base needs neither)."
        )
    holder = nn.ParameterList(parameters)  # zero.Init takes a module with all that is below it
    deepspeed.zero.Init(
        module=holder,
        config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero},
        zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),  # hpZ's, made for the first block
    )


def refuse_mismatches(deepspeed: Any) -> None:
    """Refuse values in DeepSpeed's configuration that differ from the `training:` section's (transformers#29348).

    Args:
        deepspeed: transformers' HfTrainerDeepSpeedConfig after it saw the arguments.

    Raises:
        UserError: naming both keys of the first such value.
    """
    for line in deepspeed.mismatches:
        found = re.fullmatch(r"- ds (?P<ds>[^=]+)=(?P<a>.*) vs hf (?P<hf>[^=]+)=(?P<b>.*)", line)
        if found is None:
            raise UserError(f"DeepSpeed's configuration disagrees with the training section: {line}")
        raise UserError(
            f"DeepSpeed's {found['ds']}={found['a']} disagrees with training.{found['hf']}={found['b']}; write "
            f'"auto" in DeepSpeed\'s configuration, or make them equal.'
        )


def _is_engine(link: Any) -> bool:
    return type(link).__name__ == "DeepSpeedEngine"


def _optimizers(links: Sequence[Any]) -> list[Any]:
    """Return DeepSpeed's own optimizers among the links, the engine and the torch optimizer left out."""
    return [link for link in links[:-1] if type(link).__module__.split(".")[0] == "deepspeed" and not _is_engine(link)]
