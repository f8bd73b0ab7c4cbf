"""Plain LoRA (PEFT) on a run's own recipe: the figure that AdaLoRA has to beat.

    torchrun --nproc-per-node 2 benchmarks/lora_baseline.py --config configs/recipes/quickstart.yaml \
      --lora-r 8 training.output_dir=runs/quickstart-lora

Same data, loop and optimizer as the recipe; only the adapter differs. `--lora-r` equal to adalora.target_r makes the
number of parameters equal; learning rate and alpha should be tuned for LoRA, not copied.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from adalora_scale.config import RunConfig, load_config
from adalora_scale.errors import Unsupported, run_reporting_errors
from adalora_scale.files import write_json
from adalora_scale.report.names import RUN_NAME


def main() -> int:
    """Train, evaluate on rank 0, and write run.json with the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="the recipe")
    parser.add_argument("--lora-r", type=int, default=8, help="rank of every matrix (default 8)")
    parser.add_argument("--lora-alpha", type=int, help="default: the recipe's adalora.lora_alpha")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="longest completion when generating")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()  # overrides may stand between options
    return run_reporting_errors(lambda: run(arguments, load_config(arguments.config, arguments.overrides)))


def run(arguments: argparse.Namespace, config: RunConfig) -> int:
    """Train plain LoRA on `config`'s task."""
    if config.task != "causal_lm":
        raise Unsupported("lora_baseline trains causal language models; set task=causal_lm.")
    # Set before PEFT, which transformers' and TRL's trainers import, imports it: it recommends an optional CPU kernel.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    import torch
    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed
    from trl import SFTTrainer

    from adalora_scale.placing.model import load_model
    from adalora_scale.quantization.linear import dequantize_model
    from adalora_scale.training.console import use_console
    from adalora_scale.training.metrics import exact_match
    from adalora_scale.training.run import prepare

    inputs = prepare(config)
    inputs.arguments.ddp_find_unused_parameters = False
    target = config.adalora.target_modules
    lora = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha or round(config.adalora.lora_alpha),
        lora_dropout=config.adalora.lora_dropout,
        target_modules=target,
        task_type="CAUSAL_LM",
    )
    set_seed(inputs.arguments.seed)  # as training does; else LoRA's matrices are drawn anew in every run
    # PEFT knows no 4-bit layer but bitsandbytes' own: LoRA gets the same frozen weights, dequantised.
    model = get_peft_model(dequantize_model(load_model(config), torch.float32), lora)
    trainer = SFTTrainer(
        model,
        args=inputs.arguments,
        train_dataset=inputs.data.train,
        eval_dataset=inputs.data.eval,
        processing_class=inputs.tokenizer,
    )
    use_console(trainer)
    trainer.train()
    if trainer.is_world_process_zero():
        summary: dict[str, Any] = {
            "method": "LoRA",
            "r": arguments.lora_r,
            "config": config.to_dict(),
            "adapter_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        if inputs.raw.eval is not None and inputs.raw.layout == "prompt_completion":
            result = exact_match(
                model,
                inputs.tokenizer,
                inputs.raw.eval["prompt"],
                inputs.raw.eval["completion"],
                max_new_tokens=arguments.max_new_tokens,
            )
            summary |= {"exact_match": result.value, "matches": result.matches, "examples": result.examples}
            print(f"plain LoRA, r={arguments.lora_r}: exact match {result.value:.1%}")
        write_json(Path(config.training["output_dir"]) / RUN_NAME, summary)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
