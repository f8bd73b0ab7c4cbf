"""`adalora-scale quantize`: a 4-bit checkpoint from a 16-bit one, once, without a GPU and in a few GB of memory."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adalora_scale.config import AdaLoraConfig, DataConfig, ModelConfig, RunConfig
from adalora_scale.errors import UserError
from adalora_scale.messages import say, say_json

_EPILOG = """
The result is in bitsandbytes' own form: transformers' from_pretrained loads it, and a run loads it by slices at any
number of ranks (model.model_name_or_path=OUT). A mixture's experts have no form there: transformers does not load them
in 4 bits; --skip-modules experts leaves them in 16. OUT appears complete or not at all, with an export.json that lists
what was written.
"""


def add_verb(verbs: Any, prepare: Callable[[], None]) -> None:
    """Add the verb.

    Args:
        verbs: argparse's subparsers.
        prepare: called before anything heavy is imported.
    """
    parser = verbs.add_parser(
        "quantize",
        help="write a 4-bit checkpoint once, offline",
        description="Quantise the linear layers of a causal language model to 4 bits, tensor by tensor.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub id with safetensors")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--quant-type", default="nf4", choices=("nf4", "fp4"), help="code book (default nf4)")
    parser.add_argument("--blocksize", type=int, default=64, help="weights that share one scale (default 64)")
    parser.add_argument("--no-double-quant", action="store_true", help="keep the scales as float32")
    parser.add_argument(
        "--compute-dtype",
        default="bfloat16",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the products that config.json states (default bfloat16)",
    )
    parser.add_argument("--skip-modules", nargs="+", metavar="NAME", help="module names (endings) to leave as they are")
    parser.add_argument(
        "--torch-dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of what is not quantised (default: the checkpoint's)",
    )
    parser.add_argument("--max-shard-gb", type=float, default=2.0, metavar="GB", help="largest file (default 2)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier call wrote to OUT")
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run model code that comes with the checkpoint"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=lambda arguments: _quantize(arguments, prepare))


def _quantize(arguments: argparse.Namespace, prepare: Callable[[], None]) -> int:
    if arguments.max_shard_gb <= 0:
        raise UserError(f"--max-shard-gb is {arguments.max_shard_gb:g}; it must be positive.")
    prepare()
    import torch

    from adalora_scale.export.output import output_folder
    from adalora_scale.export.record import write_record
    from adalora_scale.placing import streaming
    from adalora_scale.quantization.experts import ExpertLinear4bit
    from adalora_scale.quantization.linear import quantized_share
    from adalora_scale.quantization.offline import quantize_checkpoint

    config = RunConfig(
        model=ModelConfig(
            model_name_or_path=arguments.model,
            revision=arguments.revision,
            torch_dtype=arguments.torch_dtype,
            trust_remote_code=arguments.trust_remote_code,
            load_in_4bit=True,
            bnb_4bit_quant_type=arguments.quant_type,
            bnb_4bit_use_double_quant=not arguments.no_double_quant,
            bnb_4bit_blocksize=arguments.blocksize,
            bnb_4bit_skip_modules=arguments.skip_modules,
            bnb_4bit_compute_dtype=arguments.compute_dtype,
        ),
        data=DataConfig(train=""),
        adalora=AdaLoraConfig(),
        training={"output_dir": str(arguments.output)},
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = streaming.begin(config, device=device)
    source = _small_files(arguments.model, arguments.revision)
    with (
        output_folder(arguments.output, overwrite=arguments.overwrite, inputs=[source]) as folder,
        streaming.progress(started.plan) as on_slot,
    ):
        done = quantize_checkpoint(
            started.plan,
            started.model.config.to_dict(),  # type: ignore[union-attr, operator]  # PreTrainedModel's
            source,
            folder,
            device=device,
            skip_modules=streaming.unquantized_linears(started.model),
            shard_bytes=int(arguments.max_shard_gb * 2**30),
            on_slot=on_slot,
        )
        quantized, every = quantized_share(started.model)
        own_form = any(isinstance(module, ExpertLinear4bit) for module in started.model.modules())
        report = {
            "format": "4-bit",
            "model": arguments.model,
            "output": str(arguments.output),
            "tensors_in_4bit": done.tensors_in_4bit,
            "share_of_linear_weights": quantized / max(every, 1),
            "read_by_transformers": not own_form,
            "bytes_read": done.bytes_read,
            "bytes_written": done.bytes_written,
            "files": done.files,
        }
        report = write_record(folder, report, every_digest=True)
    if arguments.json:
        say_json(report)
    else:
        but = "; transformers does not read experts in 4 bits, runs here do" if own_form else ""
        say(
            f"{streaming.describe(started.model)}; {done.bytes_read / 2**20:,.1f} MiB became "
            f"{done.bytes_written / 2**20:,.1f} MiB in {arguments.output}{but}",
        )
    return 0


def _small_files(model: str, revision: str | None) -> Path:
    """Return a folder with the tokenizer and the other small files: the model's own, or a hub snapshot's."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    from adalora_scale.quantization.offline import COPIED

    return Path(snapshot_download(model, revision=revision, allow_patterns=list(COPIED)))
