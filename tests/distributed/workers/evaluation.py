"""Evaluate rows that two ranks cannot share evenly, by tokens and by classes, at the batch sizes that are asked for."""

from __future__ import annotations

import sys

import datasets
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)
from trl import SFTConfig

from adalora_scale.config import AdaLoraConfig
from adalora_scale.training.trainers import AdaLoraSFTTrainer, AdaLoraTrainer
from tests.distributed.launcher import report

SHAPE = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
COMMON = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    tokenizer.pad_token = tokenizer.eos_token
    generator = torch.Generator().manual_seed(3)
    rows = [
        {"input_ids": torch.randint(5, 96, (3 + 5 * index % 12,), generator=generator).tolist()} for index in range(9)
    ]
    texts = datasets.Dataset.from_list([row | {"labels": row["input_ids"]} for row in rows])
    classes = datasets.Dataset.from_list([row | {"labels": index % 3} for index, row in enumerate(rows)])
    packs = texts.map(lambda row: {"seq_lengths": [len(row["input_ids"])]})
    config = AdaLoraConfig(init_r=2, target_r=1, target_modules=["q_proj"], tinit=0, tfinal=0, deltaT=1)
    losses: dict[str, float] = {}
    for size in (1, 2, 4):
        options = COMMON | {"per_device_eval_batch_size": size}
        for name, eval_rows, more in (("tokens", texts, {"max_length": 32}), ("packed", packs, {"packing": True})):
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(3)
            arguments = SFTConfig(
                sys.argv[2], dataset_kwargs={"skip_prepare_dataset": True}, activation_checkpointing=False,
                **options, **more,
            )  # fmt: skip
            trainer = AdaLoraSFTTrainer(
                model, args=arguments, train_dataset=eval_rows, eval_dataset=eval_rows, processing_class=tokenizer,
                adalora_config=config,
            )  # fmt: skip
            losses[f"{name}-{size}"] = trainer.evaluate()["eval_loss"]
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**SHAPE, num_labels=3))
        with torch.no_grad():
            model.classifier.weight.mul_(50)
        trainer = AdaLoraTrainer(
            model, args=TrainingArguments(sys.argv[2], **options), train_dataset=classes, eval_dataset=classes,
            data_collator=DataCollatorWithPadding(tokenizer),
            adalora_config=config.replace(target_modules=["query"], modules_to_save=["classifier"]),
        )  # fmt: skip
        losses[f"classes-{size}"] = trainer.evaluate()["eval_loss"]
    report(losses=losses)


main()
