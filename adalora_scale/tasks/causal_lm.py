"""Language models that predict the next token, trained by TRL's SFTTrainer on rows that arrive as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from adalora_scale.config import DataConfig
from adalora_scale.tasks.task import Task

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from adalora_scale.data.preparing import Prepared
    from adalora_scale.data.row_values import Layout
    from adalora_scale.data.rows import RawData

_CLASSES = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


class CausalLM(Task):
    """`task=causal_lm`."""

    name: ClassVar[str] = "causal_lm"
    peft_type: ClassVar[str] = "CAUSAL_LM"
    layouts: ClassVar[tuple[Layout, ...]] = ("messages", "prompt_completion", "prompt_completion_turns", "text")
    generates: ClassVar[bool] = True

    def auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def builds(self, class_name: str) -> bool:
        return "CausalLM" in class_name or class_name in _CLASSES  # GPT2LMHeadModel and others

    def prepare(
        self, raw: RawData, tokenizer: Any, data: DataConfig, *, seed: int, cache_dir: Path | None = None
    ) -> Prepared:
        from adalora_scale.data.chat_templates import resolve_chat_template
        from adalora_scale.data.tokenization import prepare_language_model

        template = resolve_chat_template(tokenizer, data, layout=raw.layout, tools="tools" in raw.train.column_names)
        prepared = prepare_language_model(raw, tokenizer, data, seed=seed, cache_dir=cache_dir)
        if template is not None:
            # The saved tokenizer must render conversations the way the adapter learnt them.
            tokenizer.chat_template = template
        return prepared

    def trainer_class(self) -> type[Trainer]:
        from trl import SFTTrainer

        return SFTTrainer

    def arguments_class(self) -> type[TrainingArguments]:
        from trl import SFTConfig

        return SFTConfig

    def settle_arguments(self, options: dict[str, Any], data: DataConfig) -> None:
        # Rows arrive tokenised, masked, cut and packed: the trainer only has to collate them.
        options |= {
            "dataset_kwargs": {"skip_prepare_dataset": True},
            # TRL does not cut rows that it flattens, and refuses the key; here they are cut already.
            "max_length": None if options.get("padding_free") and not data.packing else data.max_length,
            "packing": data.packing,
        }

    def higher_is_better(self, label_names: list[str] | None = None) -> dict[str, bool]:
        return {"loss": False, "mean_token_accuracy": True, "entropy": False}

    def prepare_trace(self, model: nn.Module, *, whole_logits: bool) -> None:
        config: Any = model.config
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False  # the loss of routers takes no mask of four dimensions; it is small
        if not whole_logits:
            from trl.trainer.utils import add_fused_lm_head

            from adalora_scale.tasks.own_head import use_own_head, why_not_fused

            if why_not_fused(model) is not None:  # as training settles it
                use_own_head(model)
                return
            add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # type: ignore[arg-type]  # as SFTTrainer does

    def trace_batch(self, sequences: int, length: int, *, whole_logits: bool, masked: bool) -> dict[str, Any]:
        tokens = torch.zeros(sequences, length, dtype=torch.long)
        batch: dict[str, Any] = {"input_ids": tokens, "labels": tokens, "use_cache": False}
        if not whole_logits:
            batch["fused_lm_head"] = True
        if masked:
            # Packing and padding need a mask; a batch that needs none is cheaper.
            batch["attention_mask"] = torch.ones(sequences, 1, length, length, dtype=torch.bool)
        return batch


TASK = CausalLM()
