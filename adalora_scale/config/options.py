"""Every option a user can set, as frozen keyword-only dataclasses.

Field names of `AdaLoraConfig` are PEFT's, those of `training:` are transformers' TrainingArguments (and TRL's SFTConfig
for causal language models). Unknown keys are errors that suggest the nearest one.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from adalora_scale.config.mixing import train_entries
from adalora_scale.config.presets import PRESETS
from adalora_scale.errors import UserError, nearest

TaskName = Literal["causal_lm", "sequence_classification"]
"""What can be trained; each has the file of its name in `tasks/`."""

# Misspelt keys must not be dropped silently; pydantic reads this attribute from plain dataclasses too.
_FORBID_EXTRA = ConfigDict(extra="forbid", use_attribute_docstrings=True)

# Nothing is imported from the method here; its scores are one file each, so looking at the folder is enough.
SCORES = tuple(sorted(path.stem for path in (Path(__file__).parents[1] / "adalora" / "scores").glob("[!_]*.py")))
"""What `adalora.score` may be."""
_OF_PRESET: Any = None
"""The default of keys that `adalora.preset` decides; no config keeps it."""


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig:
    """How the method adapts a model: PEFT's AdaLoRA keys, with `tinit` and `tfinal` also as fractions of the run.

    The scale of every update stays constant through pruning (`scaling`).

    Raises:
        UserError: a value is out of range, or two values contradict each other.

    Source: AdaLoRA, arXiv 2303.10512, section 3; key names from peft/tuners/adalora/config.py.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID_EXTRA
    _left_to_preset: ClassVar[frozenset[str]] = frozenset()

    target_modules: list[str] | str = "all-linear"
    """``all-linear`` (every linear layer but the output head), a list of module-name endings, or one regex."""
    exclude_modules: list[str] | str | None = None
    """Names (endings) or one regex of modules that stay untouched, with all that is inside them."""
    layers_to_transform: list[int] | int | None = None
    """Indices of the decoder or encoder layers to adapt; None adapts all."""
    modules_to_save: list[str] | None = None
    """Modules trained in full and saved with the adapter, for example a new classifier head."""
    preset: str = "default"
    """Which values the keys below have that are not set: `default`, or `paper` and `peft` for the published method."""
    score: str = _OF_PRESET
    """What ranks triplets, a file in adalora/scores/."""
    init_r: int = _OF_PRESET
    """Triplets per matrix at the start (the paper uses 1.5 x target_r)."""
    target_r: int = 8
    """Triplets per matrix after the last allocation, on average: over parameters, or over matrices (budget_unit)."""
    budget_unit: Literal["params", "triplets"] = _OF_PRESET
    """What is pruned to target_r of every matrix on average: `params` counts a triplet as in + out + 1, so that the
    adapter ends with the parameters of LoRA of rank target_r; `triplets` counts each as one, as published."""
    lora_alpha: float = _OF_PRESET
    """The update is scaled by lora_alpha / init_r; by lora_alpha / target_r where init_weights is `lora`."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input."""
    tinit: int | float = _OF_PRESET
    """Steps before pruning starts; a float below 1 is a fraction of total_step."""
    tfinal: int | float = _OF_PRESET
    """Steps after the final allocation; a float below 1 is a fraction of total_step."""
    deltaT: int = 10
    """Steps between allocations."""
    beta1: float = 0.85
    """EMA coefficient of the sensitivity (paper eq. 9)."""
    beta2: float = 0.85
    """EMA coefficient of the uncertainty (paper eq. 10)."""
    orth_reg_weight: float = _OF_PRESET
    """Weight of the orthogonality penalty: mean over the 2n factors of the Frobenius norm of (Gram - identity).

    Its gradient is added inside the optimizer step, after the loop or the engine has clipped; it is never clipped."""
    init_weights: Literal["lora", "adalora"] = _OF_PRESET
    """How adapters begin: `adalora` draws P and Q and sets lambda to zero, as published; `lora` draws A, sets B to zero
    and lambda to one, so that training begins as LoRA's does, with LoRA's learning rates."""
    init_std: float = 0.02
    """Standard deviation of the initial P and Q under `adalora`."""
    guard_every: int = 100
    """Steps between comparisons of masks and replicated parameters over ranks (trainers only); 0 never compares."""

    def __post_init__(self) -> None:
        key = "adalora."
        self._fill(key)
        for name in ("lora_alpha", "init_std", "orth_reg_weight"):
            value = getattr(self, name)
            _check(math.isfinite(value), f"{key}{name} is {value}; it must be a finite number.")
        _check(
            self.init_r >= self.target_r,
            f"{key}init_r ({self.init_r}) is smaller than {key}target_r ({self.target_r}): there would be nothing to "
            f"prune. Raise init_r (1.5 x target_r is the paper's choice).",
        )
        _check(self.guard_every >= 0, f"{key}guard_every is {self.guard_every}; it must not be negative.")
        _check(self.deltaT >= 1, f"{key}deltaT is {self.deltaT}; it must be at least 1 step.")
        _check(0 <= self.lora_dropout < 1, f"{key}lora_dropout is {self.lora_dropout}; it must be in [0, 1).")
        _check(self.lora_alpha > 0, f"{key}lora_alpha is {self.lora_alpha}; it must be positive.")
        _check(self.init_std > 0, f"{key}init_std is {self.init_std}; it must be positive.")
        _check(self.orth_reg_weight >= 0, f"{key}orth_reg_weight is {self.orth_reg_weight}; it must not be negative.")
        hint = nearest(self.score, SCORES) or f" Known: {', '.join(SCORES)}."
        _check(self.score in SCORES, f"{key}score is '{self.score}'; there is no such score.{hint}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _check(0 < value < 1, f"{key}{name} is {value}; it must be between 0 and 1, both excluded.")
        for name in ("tinit", "tfinal"):
            value = getattr(self, name)
            if isinstance(value, float):
                _check(
                    0 <= value < 1,
                    f"{key}{name} is {value}; a fraction must be in [0, 1). Write a whole number for steps.",
                )
            else:
                _check(value >= 0, f"{key}{name} is {value}; it must not be negative.")
        tinit, tfinal = self.tinit, self.tfinal
        if isinstance(tinit, float) and isinstance(tfinal, float):
            _check(
                tinit + tfinal < 1,
                f"{key}tinit + {key}tfinal is {tinit + tfinal:g}; the two fractions must sum to less than 1, "
                f"or no step is left for pruning. Lower one of them.",
            )

    def _fill(self, key: str) -> None:
        """Give keys that were not set the preset's values."""
        hint = nearest(self.preset, PRESETS) or f" Known: {', '.join(PRESETS)}."
        _check(self.preset in PRESETS, f"{key}preset is '{self.preset}'; there is no such preset.{hint}")
        _check(self.target_r >= 1, f"{key}target_r is {self.target_r}; it must be at least 1.")
        values = PRESETS[self.preset].values(self.target_r)
        left = {name: value for name, value in values.items() if getattr(self, name) is _OF_PRESET}
        for name, value in {**left, "_left_to_preset": frozenset(left)}.items():
            object.__setattr__(self, name, value)  # a frozen config is written to here alone

    def replace(self, **changes: Any) -> AdaLoraConfig:
        """Return a copy with other values, checked like a new one; what was left to the preset still is."""
        names = [entry.name for entry in dataclasses.fields(self) if entry.name not in self._left_to_preset]
        return AdaLoraConfig(**{name: getattr(self, name) for name in names} | changes)

    @property
    def scaling(self) -> float:
        """What every update is multiplied by."""
        return self.lora_alpha / (self.target_r if self.init_weights == "lora" else self.init_r)

    def peft_fields(self, total_step: int | None) -> dict[str, Any]:
        """Return the method's keys of PEFT's AdaLoraConfig; PEFT scales by lora_alpha / init_r.

        Args:
            total_step: optimizer steps of the run; PEFT refuses a config without a schedule, so an adapter that was
                never trained (None) gets the smallest valid one.
        """
        tinit, tfinal = self.phase_steps(total_step) if total_step else (0, 0)
        alpha = self.scaling * self.init_r
        return {
            "init_r": self.init_r,
            "target_r": self.target_r,
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "lora_dropout": self.lora_dropout,
            "tinit": tinit,
            "tfinal": tfinal,
            "deltaT": self.deltaT,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "orth_reg_weight": float(self.orth_reg_weight),
            "total_step": total_step or 1,
        }

    def phase_steps(self, total_step: int) -> tuple[int, int]:
        """Return (tinit, tfinal) in steps for a run of `total_step` steps.

        Raises:
            UserError: no step is left between the two phases.
        """
        _check(total_step >= 1, f"total_step is {total_step}; a run needs at least one optimizer step.")
        tinit, tfinal = (
            round(value * total_step) if isinstance(value, float) else value for value in (self.tinit, self.tfinal)
        )
        _check(
            tinit + tfinal < total_step,
            f"adalora.tinit ({tinit} steps) + adalora.tfinal ({tfinal} steps) leave no step for pruning in a run of "
            f"{total_step} steps. Lower one of them or train longer.",
        )
        return tinit, tfinal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen base model: transformers' `from_pretrained` keys, and bitsandbytes' keys for a 4-bit base."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID_EXTRA

    model_name_or_path: str
    """A local directory in transformers format, or a hub id."""
    tokenizer_name_or_path: str | None = None
    """Where the tokenizer is, when not with the model."""
    adapter_path: str | None = None
    """Folder of an earlier adapter (AdaLoRA or plain LoRA) that training goes on from, with its ranks reopened."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the base weights; `auto` keeps the checkpoint's. Adapters are always float32."""
    attn_implementation: str | None = None
    """`eager`, `sdpa` or `flash_attention_2`; None lets transformers choose."""
    trust_remote_code: bool = False
    """Run model code that comes with a hub checkpoint."""
    resize_token_embeddings: bool = False
    """Give embedding and output head a row for every token of the tokenizer that lacks one, up to a multiple of 64;
    both are then trained in full and saved with the adapter. Nothing is added where no token lacks a row."""
    load_in_4bit: bool = False
    """Quantise the frozen base to 4 bits while loading (QAdaLoRA)."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit code book."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the block scales too."""
    bnb_4bit_blocksize: int = 64
    """Weights that share one scale: 32, 64, 128 … 4096."""
    bnb_4bit_skip_modules: list[str] | None = None
    """Names (endings) of modules that stay in torch_dtype; the output head, embeddings and norms always do."""
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Dtype of the dequantised matrix products."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and evaluation data: files, patterns, folders, folders of `save_to_disk`, or hub ids."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID_EXTRA

    train: str | list[str | dict[str, Any]]
    """A file, a pattern (`data/*.jsonl`), a folder, a hub id, or a list of these. Entries may be {path, weight} or
    {path, rows}: they are then mixed (`data/mixing.py`), not joined."""
    eval: str | list[str | dict[str, Any]] | None = None
    """Evaluation data in the same form; see also `eval_fraction`."""
    name: str | None = None
    """Configuration name of a hub dataset (gsm8k needs `main`)."""
    train_split: str = "train"
    """Split of a hub dataset, or of a saved DatasetDict, used for training."""
    eval_split: str = "test"
    """Split of a hub dataset, or of a saved DatasetDict, used for evaluation."""
    eval_fraction: float = 0.0
    """Without `eval`: the share of the training rows held out for evaluation."""
    format: Literal[
        "auto", "messages", "prompt_completion", "preference", "alpaca", "xlam", "glaive", "text", "classification"
    ] = "auto"
    """Layout of a row; `auto` looks at the columns."""
    messages_column: str = "messages"
    """Column with the turns, {role, content} or ShareGPT's {from, value}; `conversations` is found without this key."""
    system_column: str | None = "system"
    """Column with the text of a system turn, put before the turns; None ignores it."""
    tools_column: str | None = "tools"
    """Column with the tools that the template shows, in OpenAI's schema (objects or JSON text); None ignores it."""
    documents_column: str | None = "documents"
    """Column with the documents that the template shows, a list of objects; None ignores it."""
    prompt_column: str = "prompt"
    """Column with the prompt."""
    completion_column: str = "completion"
    """Column with the completion."""
    text_column: str = "text"
    """Column with plain text, or with the text to classify."""
    text_pair_column: str | None = None
    """Column with the second text of a pair to classify; the columns of GLUE's pairs are found without this key."""
    label_column: str = "label"
    """Column with the class, a name or a number; or with a number as the target, or a list of classes (`labels`)."""
    labels: Literal["auto", "classes", "numbers", "several"] = "auto"
    """What a label is: one of some `classes`, one of the `numbers` (regression), or `several` classes, a list; `auto`:
    lists are several, numbers that are not all whole are numbers, everything else classes."""
    loss_on: Literal["auto", "completion", "assistant", "all"] = "auto"
    """Tokens that count in the loss; `auto`: completions of prompt/completion rows, assistant turns of messages."""
    chat_template: str | None = None
    """For conversations: the name of a built-in template or a Jinja file; None uses the tokenizer's own. Alpaca rows
    become conversations if it is set."""
    max_length: int = 1024
    """Longest sequence in tokens; longer ones are cut at the end."""
    packing: bool = False
    """Fill each sequence with several short examples, kept apart by position ids."""
    max_train_samples: int | None = None
    """Use only the first rows, for a quick try."""
    max_eval_samples: int | None = None
    """Use only the first evaluation rows."""
    preprocessing_num_workers: int | None = None
    """Processes that tokenise; None is one."""
    streaming: bool = False
    """Read and tokenise training rows as they are needed, from local files; needs `training.max_steps`."""
    shuffle_buffer: int | None = None
    """Streaming: rows that are shuffled together; None is 1,000, and 1 keeps the files' order."""

    def __post_init__(self) -> None:
        _check(0 <= self.eval_fraction < 1, f"data.eval_fraction is {self.eval_fraction}; it must be in [0, 1).")
        _check(self.max_length >= 2, f"data.max_length is {self.max_length}; it must be at least 2 tokens.")
        for name in ("max_train_samples", "max_eval_samples", "preprocessing_num_workers", "shuffle_buffer"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"data.{name} is {value}; it must be at least 1.")
        train_entries(self.train)
        self._check_streaming()
        _check(
            not isinstance(self.eval, list) or all(isinstance(entry, str) for entry in self.eval),
            "data.eval is a file, a list of files, or a hub id; weights and rows are for data.train (every evaluation "
            "row counts once).",
        )
        _check(
            self.eval is None or self.eval_fraction == 0,
            "data.eval and data.eval_fraction are both set; keep one of them.",
        )

    def _check_streaming(self) -> None:
        if not self.streaming:
            _check(self.shuffle_buffer is None, "data.shuffle_buffer has no effect without data.streaming=true.")
            return
        ways_out = {
            "packing": "sequences cannot be filled from rows that are not read yet; set data.packing=false",
            "eval_fraction": "rows cannot be held out of a set whose end is not known; name data.eval",
            "max_train_samples": "training.max_steps says how many rows are read",
            "preprocessing_num_workers": "rows are tokenised as training reads them",
        }
        for name, way_out in ways_out.items():
            value = getattr(self, name)
            _check(not value, f"data.{name}={value} does not go with data.streaming=true: {way_out}.")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What holds the parameters: one process or DDP, FSDP2, or DeepSpeed ZeRO."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID_EXTRA

    name: str = "auto"
    """`ddp`, `fsdp2` or `deepspeed`; `auto`: DeepSpeed when a DeepSpeed file is given, else DDP (or one process)."""
    config: str | dict[str, Any] | None = None
    """The engine's own configuration: DeepSpeed's file or mapping, or keys of `Fsdp2Config`."""


@dataclass(frozen=True, kw_only=True)
class Fsdp2Config:
    """`engine.config` of FSDP2."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID_EXTRA

    replicate: int = 1
    """Copies of the sharded model (HSDP): ranks / replicate ranks share one."""
    reshard_after_forward: bool | None = None
    """Free a block's gathered weights between forward and backward; None leaves it to torch (blocks yes, root no)."""
    cpu_offload: bool = False
    """Keep shards, gradients and optimizer state on the host."""
    param_dtype: Literal["bfloat16", "float32"] | None = None
    """Dtype of gathered weights and of the computation; None: bfloat16 when training.bf16 is true."""
    reduce_dtype: Literal["bfloat16", "float32"] | None = None
    """Dtype in which gradients are reduced; None: float32."""

    def __post_init__(self) -> None:
        _check(self.replicate >= 1, f"engine.config.replicate is {self.replicate}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID_EXTRA

    model: ModelConfig
    data: DataConfig
    adalora: AdaLoraConfig = field(default_factory=AdaLoraConfig)
    training: dict[str, Any] = field(default_factory=dict)
    """Keys of the task's training arguments (TRL's SFTConfig, transformers' TrainingArguments), and some of ours."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    task: TaskName = "causal_lm"
    """What is trained."""

    def __post_init__(self) -> None:
        output_dir = self.training.get("output_dir")
        _check(
            isinstance(output_dir, str) and output_dir != "",
            "training.output_dir is missing; say where the run's files go, for example training.output_dir=runs/first.",
        )

    def under_deepspeed(self, file: str) -> RunConfig:
        """Return the run with `--deepspeed FILE`: engine.name=deepspeed engine.config=FILE."""
        return dataclasses.replace(self, engine=EngineConfig(name="deepspeed", config=file))

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries and lists, as written into run.json."""
        return dataclasses.asdict(self)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
