"""What a stock trainer with AdaLoraCallback would write or load beside the adapter, and the callback cannot change."""

from __future__ import annotations

import sys

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from adalora_scale.errors import Unsupported
from adalora_scale.export.whole_adapter import unwrapped
from adalora_scale.messages import say

_WHOLE = "FULL_STATE_DICT"
_WRITE_ALL = (DistributedType.DEEPSPEED, DistributedType.FSDP)
_OURS = "train with AdaLoraTrainer or AdaLoraSFTTrainer"


def refuse_base_in_files(args: TrainingArguments, model: nn.Module) -> None:
    """See that the trainer's own saving writes the adapter alone, and that nothing is loaded back into wrapped layers.

    Args:
        args: the trainer's.
        model: with adapters, wrapped or not; accelerate's state says what shards it.

    Raises:
        Unsupported: checkpoints would hold the frozen base, or the best one could not be loaded.
    """
    if args.load_best_model_at_end:
        raise Unsupported(
            f"load_best_model_at_end=True: the trainer looks for a whole model in its best checkpoint, and would "
            f"compare adapters of different sizes; {_OURS}, or set it to False."
        )
    state, strategy = AcceleratorState(), SaveStrategy(args.save_strategy)
    writes = strategy is not SaveStrategy.NO
    if writes and not isinstance(unwrapped(model), PreTrainedModel):
        raise Unsupported(
            f"save_strategy={strategy.value}: {type(unwrapped(model)).__name__} is no transformers model, so the "
            f"trainer would write all of it, the frozen base too; {_OURS}, or set save_strategy='no': the adapter is "
            f"saved when training ends."
        )
    if writes and not args.save_only_model and state.distributed_type in _WRITE_ALL:
        raise Unsupported(
            f"save_only_model=False: under {state.distributed_type.value} the trainer's checkpoints hold the frozen "
            f"base, and AdaLoraCallback alone cannot go on from one; set save_only_model=True for checkpoints of the "
            f"adapter, or {_OURS}, whose checkpoints can be resumed."
        )
    plugin = state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        key = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
        if not plugin.hf_ds_config.is_true(key):
            raise Unsupported(
                f"{key} is not true: trainer.save_model would write a checkpoint with the frozen base; set it to true "
                f"in the DeepSpeed file, or {_OURS}."
            )


def name_unwritten() -> None:
    """Say in one line where `trainer.save_model` writes nothing; transformers does not. One rank calls it."""
    state = AcceleratorState()
    if state.distributed_type is not DistributedType.FSDP:
        return
    kind = str(state.fsdp_plugin.state_dict_type).rpartition(".")[2]
    if _WHOLE not in kind:
        say(
            f"note: fsdp_config.state_dict_type={kind}: trainer.save_model writes nothing; set it to {_WHOLE}, or call "
            f"adalora_scale.save_adapter(trainer.model, folder) on every rank. The end of training writes the adapter.",
            to=sys.stderr,
        )
