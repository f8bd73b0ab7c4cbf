"""How a cell of the contract suite is wrapped and stepped: `Runner` for DeepSpeed, FSDP2, DDP and one process."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.config import AdaLoraConfig
from tests.distributed.contract_cells import Cell
from tests.toy import Toy

STEPS, ROWS = 14, 12
CONFIG = AdaLoraConfig(
    init_r=5,
    target_r=2,
    budget_unit="triplets",  # in parameters: the equivalence matrix, whose matrices differ in size
    lora_alpha=20,
    # Statistics of every factor and the penalty's exchange; the defaults, which need less: the equivalence matrix.
    score="sensitivity_uncertainty",
    init_weights="adalora",
    tinit=2,
    tfinal=4,
    deltaT=2,
    orth_reg_weight=0.3,
    modules_to_save=["head"],
)
ADAMW = {"lr": 1e-2, "weight_decay": 0.01, "eps": 1e-6}


def build() -> nn.Module:
    """Return the adapted toy, the same in every process; widths are such that flat pieces end inside rows."""
    torch.manual_seed(0)
    return inject_adalora(Toy(width=22, wide=37), CONFIG)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.rand(ROWS, 9, generator=generator) ** 3 * 32).long() for _ in range(STEPS)]


def loss_of(runner: Any, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(runner(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """λ and every other factor apart, as runs with two weight decays have it; sizes are uneven."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    first = [p for number, (name, p) in enumerate(trained) if "lora_E" in name or number % 5 == 0]
    own = {id(p) for p in first}
    return [{"params": first, "weight_decay": 0.0}, {"params": [p for _, p in trained if id(p) not in own]}]


class TorchRunner:
    """One process, DDP and FSDP2."""

    def __init__(self, engine: str, cell: Cell, model: nn.Module) -> None:
        self.engine, self.cell, self.steps = engine, cell, 0
        self.model: Any = model
        if engine == "ddp":
            self.model = nn.parallel.DistributedDataParallel(model, **cell.zero)
            if cell.wrap == "fp16-hook":
                from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

                self.model.register_comm_hook(None, fp16_compress_hook)
        elif engine == "fsdp2":
            self.model = fully_sharded(cell, model)
        groups = groups_of(self.model)
        if cell.wrap in ("redundancy", "redundancy-views"):
            from torch.distributed.optim import ZeroRedundancyOptimizer

            views = cell.wrap == "redundancy-views"
            self.optimizer: Any = ZeroRedundancyOptimizer(
                groups, optimizer_class=torch.optim.AdamW, parameters_as_bucket_view=views, **ADAMW
            )
        else:
            self.optimizer = torch.optim.AdamW(groups, fused=cell.wrap == "fused" or None, **ADAMW)

    @property
    def target(self) -> Any:
        return self.optimizer

    def train(self, ids: torch.Tensor) -> None:
        loss_of(self.model, ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        if self.cell.between == "assign" and self.steps == 5:
            state = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.model.load_state_dict(state, assign=True)

    def close(self) -> None:
        """Nothing is kept."""


def fully_sharded(cell: Cell, model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    ranks, options = dist.get_world_size(), dict(cell.zero)
    shape = {
        "mesh:replicate": (ranks, 1),
        "mesh:shard": (1, ranks),
        "mesh:hybrid": (2, ranks // 2),
    }.get(cell.wrap or "", (ranks,))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    dtypes = {f"{kind}_dtype": getattr(torch, options.pop(kind)) for kind in ("param", "reduce") if options.get(kind)}
    if dtypes:
        options["mp_policy"] = MixedPrecisionPolicy(**dtypes)
    if options.pop("offload", False):
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if options.pop("columns", False):
        options["shard_placement_fn"] = lambda p: Shard(1) if p.ndim > 1 and p.shape[1] % ranks == 0 else None
    shard = functools.partial(fully_shard, mesh=mesh, **options)
    if cell.wrap != "root":
        for block in model.blocks:
            if cell.wrap == "nested":
                for layer in block.values():
                    shard(layer)
            else:
                shard(block["up"])
                shard(block["down"])
    shard(model)
    if cell.wrap == "keep-unsharded":
        model.set_reshard_after_backward(False)
    return model


class ZeroRunner:
    """DeepSpeed ZeRO."""

    def __init__(self, engine: str, cell: Cell, model: nn.Module) -> None:
        import deepspeed

        stage = int(engine[len("zero") :])
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 100} if stage == 3 else {}) | cell.zero
        self.cell, self.steps = cell, 0
        self.model, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(groups_of(model), **ADAMW),
            config={
                "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
                "zero_optimization": zero,
                "gradient_clipping": 0.0,  # else 1.0: DeepSpeed would clip what one process does not
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                **cell.config,
            },
        )

    @property
    def target(self) -> Any:
        return self.model

    def train(self, ids: torch.Tensor) -> None:
        self.model.backward(loss_of(self.model, ids))
        self.model.step()
        self.steps += 1
        if self.cell.between is not None:
            self._between(*self.cell.between.split(":"))

    def _between(self, what: str, states: str = "all", pinned: str = "") -> None:
        if what == "empty_partition_cache":
            self.model.empty_partition_cache()
            return
        if what == "load":
            if self.steps == 5:
                folder = os.environ["ADALORA_RANK_DIR"]  # of the run, the same on all ranks
                self.model.save_checkpoint(folder, tag="step5")
                self.model.load_checkpoint(folder, tag="step5")
            return
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

        include = None if states == "all" else [OffloadStateTypeEnum[states]]
        self.model.offload_states(include=include, pin_memory=pinned != "unpinned")
        self.model.reload_states()

    def close(self) -> None:
        self.model.destroy()


def runner_of(engine: str, cell: Cell, model: nn.Module) -> TorchRunner | ZeroRunner:
    return (ZeroRunner if engine.startswith("zero") else TorchRunner)(engine, cell, model)


def values_in_forward(runner: Any, model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run a forward and return every trained value at the moment a layer computes with it, by plain name.

    Nothing else is asked: what hooks gathered, cast or left lying is what stands here.
    """
    seen: dict[str, torch.Tensor] = {}
    watched = {name: (layer, ("lora_A", "lora_E", "lora_B")) for name, layer in adapter_layers(model)}
    watched["head"] = (model.head, ("weight", "bias"))

    def watching(name: str, layer: nn.Module, kinds: tuple[str, ...], forward: Any) -> Any:
        def watched_forward(*args: Any) -> Any:
            for kind in kinds:
                seen[f"{name}.{kind}"] = getattr(layer, kind).detach().clone()
            return forward(*args)

        return watched_forward

    for name, (layer, kinds) in watched.items():
        layer.forward = watching(name, layer, kinds, layer.forward)  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            loss_of(runner.model, ids)
    finally:
        for layer, _ in watched.values():
            del layer.forward
    return seen
