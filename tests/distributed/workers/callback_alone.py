"""An unmodified Trainer with AdaLoraCallback on CPU ranks, with use_cpu or (the user forgot) without."""

import sys

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.training.callback import AdaLoraCallback
from tests.distributed.launcher import report
from tests.toy import adapters_of

model_dir, folder, mode = sys.argv[1:]
torch.set_num_threads(1)
torch.manual_seed(0)
config = AdaLoraConfig(init_r=6, target_r=4, tinit=2, tfinal=3, deltaT=2)
model = inject_adalora(AutoModelForCausalLM.from_pretrained(model_dir), config)
generator = torch.Generator().manual_seed(0)
rows = [{"input_ids": torch.randint(3, 500, (16,), generator=generator).tolist()} for _ in range(40)]


def collate(examples):
    ids = torch.tensor([example["input_ids"] for example in examples])
    return {"input_ids": ids, "labels": ids}


options = {"use_cpu": True} if mode == "use_cpu" else {}
args = TrainingArguments(
    folder, max_steps=10, per_device_train_batch_size=2, report_to="none", save_strategy="no", learning_rate=1e-2,
    ddp_find_unused_parameters=False, remove_unused_columns=False, disable_tqdm=True, **options,
)  # fmt: skip
callback = AdaLoraCallback()
trainer = Trainer(model, args, train_dataset=rows, data_collator=collate, callbacks=[callback])
try:
    trainer.train()
except ValueError as error:
    report(refused=str(error))
else:
    weights = sum(w.double().sum().item() for own in adapters_of(model).values() for w in own.values())
    report(refused="", digest=callback.allocator.masks_digest(), weights=weights, world_size=args.world_size)
