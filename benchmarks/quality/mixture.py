"""Train the small mixture of experts that the harness's `mixture` task adapts; its weights are not in the repository.

    python -m benchmarks.quality.mixture --output runs/mixture

The text is the quickstart's: what every Python installation carries. The architecture is Qwen3-MoE's: every layer has
experts, each token goes to two of them, and the loss has the architecture's own term for their balance. The same Python
and torch versions on the same kind of processor give the same weights. One core needs about ten minutes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from launch.quickstart.train_base_model import collect_texts, encode, train, train_tokenizer

PLACE = Path("runs") / "mixture"
"""Where the harness looks for it, in the project's folder."""


def build(tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace) -> Qwen3MoeForCausalLM:
    """Return the untrained model."""
    torch.manual_seed(arguments.seed)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=256,
            moe_intermediate_size=64,
            num_experts=arguments.experts,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            output_router_logits=True,
            router_aux_loss_coef=0.01,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )


def main() -> int:
    """Collect the text, train the tokenizer and the model, save both."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.quality.mixture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=PLACE, help=f"folder for model and tokenizer (default {PLACE})")
    parser.add_argument("--experts", type=int, default=16, help="in each of the four layers (default 16)")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps (default 1500)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the text (default 0)")
    parser.set_defaults(batch_size=16, sequence_length=128, learning_rate=3e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    texts = collect_texts()
    tokenizer = train_tokenizer(texts["documentation"], 2048)
    stream = encode(texts, tokenizer, arguments.seed)
    model = build(tokenizer, arguments)
    print(f"{len(stream):,} tokens of text, {model.num_parameters():,} weights")
    train(model, stream, arguments)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"saved in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
