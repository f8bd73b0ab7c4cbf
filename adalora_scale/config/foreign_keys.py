"""Keys of PEFT, Axolotl and LLaMA-Factory, and what they are called here; docs/migrating.md says more of each.

Only keys that decide the same thing are here: a hint that leads to something else is worse than none.
"""

from __future__ import annotations

FOREIGN_KEYS = {
    # PEFT
    "r": "adalora.target_r",
    "init_lora_weights": "adalora.init_weights",
    "base_model_name_or_path": "model.model_name_or_path",
    # Axolotl
    "base_model": "model.model_name_or_path",
    "tokenizer_config": "model.tokenizer_name_or_path",
    "revision_of_model": "model.revision",
    "lora_r": "adalora.target_r",
    "lora_target_modules": "adalora.target_modules",
    "lora_modules_to_save": "adalora.modules_to_save",
    "lora_model_dir": "model.adapter_path",
    "peft_layers_to_transform": "adalora.layers_to_transform",
    "datasets": "data.train",
    "test_datasets": "data.eval",
    "val_set_size": "data.eval_fraction",
    "field_messages": "data.messages_column",
    "field_tools": "data.tools_column",
    "train_on_inputs": "data.loss_on",
    "sequence_len": "data.max_length",
    "sample_packing": "data.packing",
    "dataset_processes": "data.preprocessing_num_workers",
    "micro_batch_size": "training.per_device_train_batch_size",
    "eval_batch_size": "training.per_device_eval_batch_size",
    "num_epochs": "training.num_train_epochs",
    "optimizer": "training.optim",
    "lr_scheduler": "training.lr_scheduler_type",
    "warmup_ratio": "training.warmup_steps",
    "flash_attention": "model.attn_implementation",
    "sdp_attention": "model.attn_implementation",
    "eager_attention": "model.attn_implementation",
    # LLaMA-Factory
    "adapter_name_or_path": "model.adapter_path",
    "model_revision": "model.revision",
    "lora_rank": "adalora.target_r",
    "lora_target": "adalora.target_modules",
    "additional_target": "adalora.modules_to_save",
    "quantization_bit": "model.load_in_4bit",
    "quantization_type": "model.bnb_4bit_quant_type",
    "double_quantization": "model.bnb_4bit_use_double_quant",
    "dataset": "data.train",
    "eval_dataset": "data.eval",
    "val_size": "data.eval_fraction",
    "template": "data.chat_template",
    "cutoff_len": "data.max_length",
    "train_on_prompt": "data.loss_on",
    "max_samples": "data.max_train_samples",
    "buffer_size": "data.shuffle_buffer",
    "neat_packing": "data.packing",
    "resize_vocab": "model.resize_token_embeddings",
    "flash_attn": "model.attn_implementation",
    "enable_liger_kernel": "training.use_liger_kernel",
    "moe_aux_loss_coef": "training.router_aux_loss_coef",
}
"""Key of another tool → ours, as section.key."""
