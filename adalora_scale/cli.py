"""The verbs of `adalora-scale`; `launch/train.py` is `adalora-scale train` for deepspeed, torchrun and srun.

Heavy imports wait until a verb needs them, so `--help` and mistakes in the config answer at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adalora_scale.cluster.launching.command import add_launch_check
from adalora_scale.cluster.place import launched
from adalora_scale.cluster.plan.arguments import add_parser as add_plan
from adalora_scale.cluster.preflight.arguments import add_parser as add_preflight
from adalora_scale.cluster.rehearsal.arguments import add_parser as add_rehearse
from adalora_scale.config import RunConfig, load_config
from adalora_scale.config.command_line import add_config_arguments
from adalora_scale.errors import Interrupted, Unsupported, UserError, run_reporting_errors
from adalora_scale.export.command import add_verbs as add_export_verbs
from adalora_scale.installed import version_of
from adalora_scale.messages import say, say_json, say_text
from adalora_scale.placing.quantize import add_verb as add_quantize_verb
from adalora_scale.process_rank import process_rank
from adalora_scale.recipes.command import add_parser as add_recipes
from adalora_scale.report.command import add_verb as add_report_verb
from adalora_scale.report.names import REPORT_NAME
from adalora_scale.store.reading import readable_folder
from adalora_scale.sweep.arguments import add_parser as add_sweep
from adalora_scale.training.first_look import look_at_files
from adalora_scale.training.lease import Lease
from adalora_scale.training.output_dir import hold_output_dir
from adalora_scale.training.stopping import stopping

_OVERRIDES = """
overrides: any key of the config file as section.key=value, for example
  training.learning_rate=2e-3 adalora.target_r=4 data.max_length=512
The sections are model, adalora, data, training, engine and task; docs/config.md lists every key.
ADALORA_TRACEBACK=1 shows where an error came from.
"""

_VERIFY_STARTS = """
one machine:  adalora-scale verify-engines --nproc 4
a cluster:    torchrun --nnodes 2 --nproc-per-node 8 … -m adalora_scale verify-engines
              deepspeed --no_local_rank --module adalora_scale verify-engines
NCCL is used where every rank has a GPU of its own, else gloo on the CPU.
"""


_SHELLS = ("bash", "zsh", "fish")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `adalora-scale` and return its exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:  # argparse's verbs take overrides in one place only; people put them anywhere
        if not hasattr(arguments, "overrides") or any(word.startswith("-") or "=" not in word for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides += rest
    return run_reporting_errors(lambda: arguments.run(arguments))


def train_main(argv: Sequence[str] | None = None) -> int:
    """Run `launch/train.py` and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train an AdaLoRA adapter.",
        epilog="start it with: python, torchrun --nproc-per-node N, deepspeed --num_gpus N, accelerate launch\n"
        + _OVERRIDES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_train_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)  # overrides may stand before and after --deepspeed
    return run_reporting_errors(lambda: _train(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="adalora-scale", description="Adaptive-rank fine-tuning (AdaLoRA).")
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        default=argparse.SUPPRESS,  # no entry beside a verb's own arguments
        help="what is installed, for a report of a fault",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    add_recipes(verbs)

    train = verbs.add_parser(
        "train",
        help="train an adapter",
        description="Train an AdaLoRA adapter.",
        epilog=_OVERRIDES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_train_arguments(train)
    train.set_defaults(run=_train)

    evaluate = verbs.add_parser(
        "evaluate",
        help="exact match of generated completions, with or without an adapter",
        description="Generate completions for the evaluation rows of a run's config and count exact matches.",
        epilog=_OVERRIDES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(evaluate)
    evaluate.add_argument(
        "--adapter",
        type=readable_folder,
        help="folder with an adapter, or its URL; without it the base model alone",
    )
    evaluate.add_argument("--batch-size", type=int, default=32, help="prompts generated together (default 32)")
    evaluate.add_argument("--max-new-tokens", type=int, default=64, help="longest completion (default 64)")
    evaluate.add_argument("--extract", metavar="REGEX", help="compare this match only, e.g. '#### (.+)' for GSM8K")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(run=_evaluate)

    preview = verbs.add_parser(
        "preview",
        help="rows as the model will see them, trained tokens marked; loads no model",
        description="Show rows as the model will see them, what of them is trained on, and what is cut and masked.\n"
        "They are prepared as a run prepares them, and kept for it; no model is loaded.",
        epilog=_OVERRIDES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(preview)
    preview.add_argument("--rows", type=int, default=3, metavar="N", help="rows of train and of eval (default 3)")
    preview.add_argument("--html", type=Path, metavar="FILE", help="write them as one page, without network")
    preview.add_argument("--json", action="store_true", help="print one JSON object")
    preview.set_defaults(run=_preview)

    schema = verbs.add_parser(
        "schema",
        help="the JSON schema of a run's YAML file, for editors that complete keys",
        description="Print the JSON schema of a run's YAML file. An editor with the YAML language server takes it\n"
        "from a first line `# yaml-language-server: $schema=adalora.schema.json` in the file.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    schema.set_defaults(run=_schema)

    completion = verbs.add_parser(
        "completion",
        help="completion of verbs, options and keys for a shell",
        description='Print a script that completes verbs and options:\n  eval "$(adalora-scale completion bash)"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    completion.add_argument("shell", choices=_SHELLS, help="the shell that reads it")
    completion.set_defaults(run=_completion)

    verify = verbs.add_parser(
        "verify-engines",
        help="does every engine here train the adapter that one process trains?",
        description="Train a small model on every engine, on the ranks at hand, and compare masks and weights with a\n"
        "float64 reference. Exit code 1 if a cell fails.",
        epilog=_VERIFY_STARTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument("--nproc", type=int, metavar="N", help="start N ranks on this machine (through torchrun)")
    verify.add_argument("--engines", nargs="+", metavar="NAME", help="ddp fsdp2 hsdp zero1 zero2 zero3 zero3-offload")
    verify.add_argument("--variants", nargs="+", metavar="NAME", help="plain accumulation checkpointing clip bf16")
    verify.add_argument("--quick", action="store_true", help="only the variants plain and clip")
    verify.add_argument("--model", metavar="PATH", help="a small causal model; by default a random Llama is made")
    verify.add_argument(
        "--experts",
        nargs="?",
        const="mixtral",
        metavar="KIND",
        help="a random mixture of experts and not a random Llama: mixtral (default) qwen3_moe gpt_oss deepseek_v3\n"
        "granitemoe llama4_text phimoe",
    )
    verify.add_argument("--steps", type=int, default=60, help="optimizer steps of a cell (default 60)")
    verify.add_argument("--memory", action="store_true", help="also weigh adapters, gradients and moments, 100 M model")
    verify.add_argument("--preset", default="default", metavar="NAME", help="of the method: default, paper or peft")
    verify.add_argument("--load-in-4bit", action="store_true", help="over a 4-bit base (nf4, double quantisation)")
    verify.add_argument("--json", type=Path, metavar="FILE", help="write all figures as JSON")
    verify.set_defaults(run=_verify_engines)
    add_sweep(verbs)
    add_export_verbs(verbs, _quiet_start)
    add_report_verb(verbs)
    add_plan(verbs)
    add_rehearse(verbs)
    add_preflight(verbs)
    add_quantize_verb(verbs, _quiet_start)
    add_launch_check(verbs)
    return parser


class _Version(argparse.Action):
    """Prints this package's version and those that a report of a fault needs, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        packages = ("torch", "transformers", "trl", "peft", "deepspeed", "bitsandbytes")
        beside = ", ".join(f"{name} {version_of(name)}" for name in packages)
        say(f"adalora-scale {version_of('adalora-scale')} ({beside}, Python {platform.python_version()})")
        parser.exit()


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--deepspeed", metavar="FILE", help="DeepSpeed configuration (same as engine.config)")
    parser.add_argument("--skip-preflight", action="store_true", help="do not compare the ranks before training starts")
    # Launchers such as deepspeed's add this to every rank's command line; the rank is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def _config(arguments: argparse.Namespace) -> RunConfig:
    config = load_config(arguments.config, arguments.overrides)
    file = getattr(arguments, "deepspeed", None)
    return config.under_deepspeed(file) if file else config


def _train(arguments: argparse.Namespace) -> int:
    with stopping.a_run():
        config = _config(arguments)
        look_at_files(config)
        launched()  # srun's variables become those that everything else reads
        with hold_output_dir(config.training) as lease:
            return _train_as(config, lease, skip_preflight=arguments.skip_preflight)


def _train_as(config: RunConfig, lease: Lease | None, *, skip_preflight: bool) -> int:
    _quiet_start()
    from adalora_scale.cluster.preflight.quick import Unhealthy, quick_check

    try:
        # The store must live as long as the process group that meets there.
        store = None if skip_preflight else quick_check(config.training["output_dir"])
    except Unhealthy:
        return 1
    from adalora_scale.cluster.leaving import leave_process_group
    from adalora_scale.training.run import train
    from adalora_scale.training.run_card import FIGURES

    try:
        summary = train(config, lease)
        if process_rank() == 0:
            ranks = list(summary["ranks"].values())
            final = "".join(f", {key} {value:.4f}" for key, value in summary["final"].items() if key in FIGURES)
            folder = config.training["output_dir"]
            report = f" (and {REPORT_NAME})" if (Path(folder).expanduser() / REPORT_NAME).is_file() else ""
            say(
                f"done: {sum(ranks)} triplets over {len(ranks)} matrices (ranks {min(ranks)} to {max(ranks)}){final}; "
                f"adapter in {folder}{report}"
            )
    finally:
        if sys.exc_info()[0] in (None, Interrupted):
            leave_process_group()
        del store
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    look_at_files(config, resumes=False)
    _quiet_start()
    from adalora_scale.tasks.registry import TASKS, find_task

    if not find_task(config.task).generates:
        able = " or ".join(f"task={task.name}" for task in TASKS.values() if task.generates)
        raise Unsupported(f"evaluate generates text, so it needs {able}; train reports eval_accuracy itself.")
    from adalora_scale.training.evaluate import evaluate_exact_match

    result = evaluate_exact_match(
        config,
        arguments.adapter,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        extract=arguments.extract,
    )
    if arguments.json:
        say_json({"exact_match": result.value, "matches": result.matches, "examples": result.examples})
    else:
        say(f"exact match {result.value:.1%} ({result.matches} of {result.examples})")
    return 0


def _preview(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    look_at_files(config, resumes=False)
    _quiet_start()
    from adalora_scale.training.preview import run_preview

    return run_preview(config, rows=arguments.rows, html=arguments.html, as_json=arguments.json)


def _schema(_: argparse.Namespace) -> int:
    from adalora_scale.config.json_schema import run_schema

    say_text(json.dumps(run_schema(), indent=2))
    return 0


def _completion(arguments: argparse.Namespace) -> int:
    import shtab

    parser = _parser()
    verbs = [verb for action in parser._actions if isinstance(action.choices, dict) for verb in action.choices.values()]
    for action in (action for verb in verbs for action in verb._actions):
        if action.metavar == "FILE":
            action.complete = shtab.FILE  # which shtab looks for
        elif action.metavar == "DIR":
            action.complete = shtab.DIRECTORY
    say_text(shtab.complete(parser, shell=arguments.shell))
    return 0


def _verify_engines(arguments: argparse.Namespace) -> int:
    _quiet_start()
    from adalora_scale.verify.command import QUICK_VARIANTS, Request, start_ranks, verify_engines
    from adalora_scale.verify.engines import ENGINES, VARIANTS

    if arguments.quick and arguments.variants:
        raise UserError("--quick chooses the variants itself; give either --quick or --variants.")
    request = Request(
        engines=arguments.engines or ENGINES,
        variants=arguments.variants or (QUICK_VARIANTS if arguments.quick else VARIANTS),
        model=arguments.model,
        steps=arguments.steps,
        memory=arguments.memory,
        experts=arguments.experts,
        load_in_4bit=arguments.load_in_4bit,
        preset=arguments.preset,
        json_file=arguments.json,
    )
    if arguments.nproc is not None and "RANK" not in os.environ:
        return start_ranks(arguments.nproc, request)
    return verify_engines(request)


def _quiet_start() -> None:
    """Keep the first screen readable: bars only for rank 0 on a terminal, no hints about parts that are not used."""
    if process_rank() != 0 or not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if process_rank() != 0:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # torch 2.13 renamed collectives that FSDP2 and DeepSpeed, and older torch, still know by their old names.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # bitsandbytes recommends an optional CPU kernel at import.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns at import that it found no GPU


if __name__ == "__main__":  # python -m adalora_scale.cli, as job scripts of before have it
    sys.exit(main())
