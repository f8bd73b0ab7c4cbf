"""What the statistics of an expert that saw no token in a step should do: decay, stand still, or count tokens.

A small mixture of 32 experts, 2 a token, is trained on grade-school problems and then adapted to dialogues in steps of
few tokens, so that many experts are idle in a step. Printed: validation loss (mean and spread over seeds) of each rule.

    python benchmarks/rare_experts.py SHARED          about 15 minutes on two cores
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen3MoeConfig

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.adalora.score import ScoredPiece
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator
from adalora_scale.experts.groups import Groups
from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.experts.modules import split_all_experts

LENGTH, ROWS, STEPS = 32, 4, 160
RULES = ("decay", "still", "tokens")


def texts(file: Path) -> list[str]:
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    if "messages" in rows[0]:
        return ["\n".join(turn["content"] for turn in row["messages"]) for row in rows]
    return [f"{row['question']}\n{row['answer']}" for row in rows]


def tokens_of(tokenizer: PreTrainedTokenizerBase, file: Path) -> torch.Tensor:
    ids = [i for text in texts(file)[:2500] for i in tokenizer(text)["input_ids"]]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def trained_base(rows: torch.Tensor, vocabulary: int, steps: int) -> nn.Module:
    torch.manual_seed(0)
    shape = Qwen3MoeConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, num_experts=32, num_experts_per_tok=2,
        decoder_sparse_step=1, norm_topk_prob=True, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(shape, experts_implementation="eager")
    split_all_experts(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = loss_of(model, rows[torch.randint(len(rows), (24,))])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"base trained: last loss {loss.item():.3f}", flush=True)
    return model


class Rule:
    """Changes what `Score.observe` left in the statistics of experts, by the tokens that each saw in the step."""

    def __init__(self, rule: str, allocator: RankAllocator, model: nn.Module) -> None:
        self.rule, self.allocator = rule, allocator
        self.counts: dict[str, torch.Tensor] = {}
        self.idle: list[float] = []
        for name, module in model.named_modules():
            if isinstance(module, ExpertLinear):
                module.register_forward_hook(lambda m, args, out, name=name: self.count(name, args[1]))
        self.observe = allocator.score.observe
        allocator.score.observe = self.observed  # type: ignore[method-assign]  # only here, to try rules

    def count(self, name: str, groups: Groups) -> None:
        self.counts[name.removesuffix(".base_layer")] = groups.ends.diff(prepend=groups.ends.new_zeros(1))

    def observed(
        self, pieces: list[ScoredPiece], weights: list[torch.Tensor], gradients: list[torch.Tensor], grad_scale: Any
    ) -> None:
        before = [{k: v.clone() for k, v in piece.statistics.items()} for piece in pieces]
        self.observe(pieces, weights, gradients, grad_scale)
        arena = self.allocator._attached().arena
        for block, piece, old in zip([b for b in arena.blocks if b.factor in self.allocator.score.factors], pieces,
                                     before, strict=True):  # fmt: skip
            shares = []  # of every element's matrix: its tokens over the mean of its layer's experts
            for tensor in (arena.tensors[member] for member in block.members):
                seen = self.counts.get(tensor.module)
                share = torch.ones(tensor.matrices) if seen is None else seen / seen.float().mean()
                shares.append(share.repeat_interleave(tensor.rows * tensor.r))
                if seen is not None and tensor.factor == "lora_E":
                    self.idle.append((seen == 0).float().mean().item())
            share = torch.cat(shares)
            for name, new in piece.statistics.items():
                beta = 0.85
                if self.rule == "still":
                    new.copy_(torch.where(share > 0, new, old[name]))
                elif self.rule == "tokens":
                    kept = beta**share
                    new.copy_(kept * old[name] + (1 - kept) * (new - beta * old[name]) / (1 - beta))


def adapted(
    base: nn.Module, rows: torch.Tensor, held_out: torch.Tensor, rule: str, score: str, seed: int
) -> tuple[float, float, float]:
    """Return (validation loss, share of experts idle in a step, kept triplets of the 8 rarest experts a layer)."""
    model = copy.deepcopy(base)
    config = AdaLoraConfig(target_modules="all-linear", init_r=6, target_r=2, lora_alpha=12, tinit=20, tfinal=40,
                           deltaT=5, score=score, beta1=0.85, beta2=0.85)  # fmt: skip
    torch.manual_seed(seed)
    inject_adalora(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    allocator = RankAllocator(model, config, total_step=STEPS).attach(optimizer)
    hooked = Rule(rule, allocator, model)
    generator = torch.Generator().manual_seed(seed)
    tokens: dict[str, torch.Tensor] = {}
    for _ in range(STEPS):
        loss_of(model, rows[torch.randint(len(rows), (ROWS,), generator=generator)]).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, seen in hooked.counts.items():
            tokens[name] = tokens.get(name, 0) + seen
    ranks = allocator.rank_pattern()
    rare = sum(
        torch.tensor(ranks[f"{name}.lora_E"]).view(len(seen), -1)[seen.argsort()[:8]].sum().item()
        for name, seen in tokens.items()
    )
    model.eval()
    with torch.no_grad():
        loss = statistics.mean(loss_of(model, part).item() for part in held_out.split(64))
    return loss, statistics.mean(hooked.idle), rare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--base-steps", type=int, default=400)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.shared / "models" / "stories260k")
    data = arguments.shared / "data"
    first, rows, held_out = (
        tokens_of(tokenizer, data / name)
        for name in ("gsm8k/train.jsonl", "sgd_chat/train.jsonl", "sgd_chat/dev.jsonl")
    )
    held_out = held_out[:384]
    base = trained_base(first, len(tokenizer), arguments.base_steps)
    with torch.no_grad():
        print(f"before: {statistics.mean(loss_of(base, part).item() for part in held_out.split(64)):.4f}", flush=True)
    for score in ("taylor", "sensitivity_uncertainty"):
        found: dict[str, list[tuple[float, float, float]]] = {rule: [] for rule in RULES}
        for seed in range(arguments.seeds):
            for rule in RULES:
                found[rule].append(adapted(base, rows, held_out, rule, score, seed))
            print(score, seed, {rule: f"{found[rule][-1][0]:.4f}" for rule in RULES}, flush=True)
        for rule, runs in found.items():
            losses = [loss for loss, _, _ in runs]
            against = [run[0] - decay[0] for run, decay in zip(runs, found["decay"], strict=True)]
            print(
                f"{score} {rule}: loss {statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}, minus decay "
                f"{statistics.mean(against):+.4f} ± {statistics.stdev(against):.4f}; idle "
                f"{statistics.mean(idle for _, idle, _ in runs):.0%}; triplets of the rarest quarter "
                f"{statistics.mean(rare for _, _, rare in runs):.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
