"""Make the small base model that the quickstart fine-tunes: a Llama of about a million weights that has read Python.

    python launch/quickstart/train_base_model.py --output launch/quickstart/base_model

The text is what every Python installation carries: the docstrings and sources of its standard library and the
language reference behind `help()` (`pydoc_data.topics`). The same Python version and torch version on the same
kind of processor give the same weights. One core needs about a quarter of an hour.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import platform
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"

_SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages"),
    *("ensurepip", "turtledemo", "pydoc_data", "encodings", "__pycache__"),
}
_SKIPPED_PREFIXES = ("_sysconfigdata", "__phello__", "config-")
"""Made when Python was built: they name the folders of the machine that built it."""

_COMPILED_MODULES = [
    *("builtins", "math", "cmath", "itertools", "time", "binascii", "zlib", "gc", "sys", "atexit", "array"),
    *("_operator", "_functools", "_collections", "_struct", "_random", "_bisect", "_heapq", "_csv", "_json"),
]
"""Modules in C, whose docstrings are not in any source file."""

_TIMES_SHOWN = {"documentation": 3, "source": 1}
"""Prose teaches the quickstart's task more than code, and there is less of it."""


def library_sources() -> list[str]:
    """The text of the standard library's Python files, without its tests and without files made at build time."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if _SKIPPED_FOLDERS.isdisjoint(parts) and not any(part.startswith(_SKIPPED_PREFIXES) for part in parts):
            found.append(path.read_text(encoding="utf-8", errors="ignore"))
    return found


def docstrings(source: str) -> Iterator[str]:
    """Each docstring of one source file behind the name and the arguments of what it describes."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield f"{node.name}({ast.unparse(node.args)})\n{text}"
            case ast.ClassDef():
                yield f"class {node.name}\n{text}"
            case _:
                yield text


def compiled_docstrings() -> Iterator[str]:
    """The docstrings of functions, classes and methods written in C, behind their names."""
    for module_name in _COMPILED_MODULES:
        module = importlib.import_module(module_name)
        shown = module_name.removeprefix("_")
        for name, member in sorted(vars(module).items()):
            if name.startswith("_") or not callable(member):
                continue
            yield f"{shown}.{name}\n{inspect.getdoc(member) or ''}"
            if inspect.isclass(member):
                for inner, method in sorted(vars(member).items()):
                    if not inner.startswith("_") and inspect.isroutine(method):
                        yield f"{name}.{inner}\n{inspect.getdoc(method) or ''}"


def collect_texts() -> dict[str, list[str]]:
    """All text the model reads, by kind: `documentation` and `source`."""
    sources = library_sources()
    documentation = [text for source in sources for text in docstrings(source)]
    documentation += list(compiled_docstrings())
    documentation += [text for _, text in sorted(topics.topics.items())]
    return {"documentation": list(dict.fromkeys(documentation)), "source": sources}


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts BOS before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS, EOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=256,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def encode(texts: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast, seed: int) -> torch.Tensor:
    """All texts in one row of token ids, shuffled, each between BOS and EOS."""
    documents = [text for kind, members in texts.items() for text in members * _TIMES_SHOWN[kind]]
    random.Random(seed).shuffle(documents)
    stream: list[int] = []
    for ids in tokenizer(documents)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    return torch.tensor(stream)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The untrained model: 5 layers of width 128, tied embeddings."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )


def train(model: PreTrainedModel, stream: torch.Tensor, arguments: argparse.Namespace) -> None:
    """Next-token training: AdamW, a short warm-up, then a straight line to zero."""
    length, rows = arguments.sequence_length, arguments.batch_size
    windows = stream[: len(stream) // length * length].view(-1, length)  # (windows, length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(arguments.seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    warmup = max(1, arguments.steps // 25)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (arguments.steps - step) / (arguments.steps - warmup))
    )
    model.train()
    average = 0.0
    bar = tqdm(range(arguments.steps), desc="pre-training", mininterval=2)
    for step in bar:
        chosen = order[torch.arange(step * rows, (step + 1) * rows) % len(order)]
        batch = windows[chosen]  # (rows, length)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        bar.set_postfix(loss=f"{average:.3f}", refresh=False)
    print(f"{arguments.steps} steps of {rows} x {length} tokens, loss {average:.3f} nats a token")


def write_source_note(output: Path, model: LlamaForCausalLM, arguments: argparse.Namespace) -> None:
    """SOURCE.md beside the weights: what they were made from, under which licence, how to make them again."""
    tokens = arguments.steps * arguments.batch_size * arguments.sequence_length
    (output / "SOURCE.md").write_text(
        f"""# Where this model comes from

A Llama-architecture causal language model of {model.num_parameters():,} weights (fp32, tied embeddings) with a
byte-level BPE vocabulary of {model.config.vocab_size}. It exists so that the quickstart can show a fine-tune without a
download. It knows some Python and little English; use it for nothing else.

* Text: docstrings and sources of the standard library of Python {platform.python_version()} (without its tests) and
  the language reference in `pydoc_data.topics`. {tokens / 1e6:.1f} million tokens were read.
* Licence of the text: PSF License Agreement (https://docs.python.org/3/license.html), Copyright © 2001 Python Software
  Foundation; All Rights Reserved. What was changed: the text was cut into tokens and a model trained on it.
* No other model and no other data were used. The task of `make_task.py` is not in the text.
* To make it again (about a quarter of an hour on one core):
  `python launch/quickstart/train_base_model.py --output launch/quickstart/base_model`
""",
        encoding="utf-8",
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder that receives the model and its tokenizer")
    parser.add_argument("--steps", type=int, default=2800, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences a step")
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--vocab-size", type=int, default=2048, help="entries of the BPE vocabulary")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order of the text")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; another number gives other last digits")
    return parser.parse_args()


def main() -> None:
    """Collect the text, train the tokenizer and the model, save both."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    texts = collect_texts()
    sizes = {kind: sum(map(len, members)) for kind, members in texts.items()}
    print("characters read:", ", ".join(f"{kind} {size:,}" for kind, size in sizes.items()))
    tokenizer = train_tokenizer(texts["documentation"], arguments.vocab_size)
    stream = encode(texts, tokenizer, arguments.seed)
    model = build_model(tokenizer, arguments.seed)
    print(f"{len(stream):,} tokens of text, {model.num_parameters():,} weights")
    train(model, stream, arguments)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    write_source_note(arguments.output, model, arguments)
    print(f"saved in {arguments.output}")


if __name__ == "__main__":
    main()
