"""Trainer, SFTTrainer and the callback give the same adapter on every engine as in one process, and save it whole."""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from adalora_scale.checkpoint.format import Checkpoint
from adalora_scale.export.peft_adalora import load_adapter
from adalora_scale.quantization.linear import quantize_model
from adalora_scale.quantization.spec import QuantSpec
from adalora_scale.verify.memory import MemoryProblem
from tests.conftest import ROOT
from tests.distributed.launcher import run_ranks
from tests.distributed.workers import trainer_worker
from tests.sizes import assert_budget_spent, assert_spent

WORKER = Path(trainer_worker.__file__)
TOGETHER, PER_TENSOR = 1e-5, 5e-5
DEEPSPEED = {"zero1", "zero2", "zero3", "zero3_offload", "zero3_hpz"}
full = pytest.mark.full


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_process(stories260k, data_dir, tmp_path_factory):
    """The same trainer in one process: (what it reported, its adapters)."""

    @functools.cache
    def train(kind, *extra):
        folder = tmp_path_factory.mktemp("one")
        outcome = trainer_worker.train("ddp", kind, stories260k, data_dir, folder, 1, extra)
        return outcome, load_file(folder / "live.safetensors")

    return train


@pytest.fixture(scope="module")
def on_ranks(stories260k, data_dir, tmp_path_factory, request):
    """Train on an engine: (what each rank reported, the folder)."""

    @functools.cache
    def train(engine, kind, world_size=2, extra=()):
        if engine in DEEPSPEED:
            request.getfixturevalue("deepspeed_ops")
        folder = tmp_path_factory.mktemp(engine)
        env = {"DS_ACCELERATOR": "cpu"} if engine in DEEPSPEED else {}
        arguments = [engine, kind, stories260k, data_dir, folder, *extra]
        return run_ranks(WORKER, world_size, arguments, timeout=300, env=env), folder

    return train


def distances(weights, expected):
    """(over all tensors together, worst single tensor) of ‖w − w_ref‖ / ‖w_ref‖."""
    assert weights.keys() == expected.keys()
    difference = total = worst = 0.0
    for name, reference in expected.items():
        d = (weights[name].double() - reference.double()).square().sum().item()
        n = reference.double().square().sum().item()
        difference, total = difference + d, total + n
        worst = max(worst, (d / n) ** 0.5 if n > 0 else float("inf") if d > 0 else 0.0)
    return (difference / total) ** 0.5, worst


def assert_equals_one_process(ranks, folder, reference):
    outcome, adapters = reference
    assert {int(step) for step in outcome["masks"]} == trainer_worker.EVERY_STEP
    masks = outcome["masks"][str(trainer_worker.FINAL_STEP)]
    final = {name.removesuffix(".lora_E"): sum(row) for name, row in masks.items()}
    assert_spent(final, 4)
    assert len(set(final.values())) >= 3
    for rank in ranks:
        assert rank["masks"] == outcome["masks"], outcome["gaps"]
        assert rank["norms"] == pytest.approx(outcome["norms"], rel=1e-4)
        assert rank["eval_loss"] == pytest.approx(outcome["eval_loss"], rel=1e-5)
        assert rank["generated"] == outcome["generated"]
        assert rank["skipped"] == 0
    together, worst = distances(load_file(folder / "live.safetensors"), adapters)
    print(f"{folder.name}: together {together:.1e}, worst tensor {worst:.1e}")
    assert together <= TOGETHER
    assert worst <= PER_TENSOR
    assert max(outcome["norms"]) > 0.5  # clipping took part


def assert_saved_is_live(ranks, folder, stories260k, kind, four_bit=False):
    """The file, on a fresh base in this process, computes what the engine computed before it was saved."""
    if kind == "classify":
        base = AutoModelForSequenceClassification.from_pretrained(stories260k, num_labels=77, dtype=torch.float32)
    else:
        base = AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32)
    if four_bit:
        quantize_model(base, QuantSpec(compute_dtype=torch.float32))
    untouched = trainer_worker.probe_loss(base, kind)
    loaded = trainer_worker.probe_loss(load_adapter(base, folder / "out"), kind)
    for rank in ranks:
        assert loaded == pytest.approx(rank["probe"], rel=1e-5)
    assert abs(loaded - untouched) > 1e-3
    if kind == "sft":
        generated = base.generate(torch.tensor([[1, 410, 471, 419]]), max_new_tokens=8, do_sample=False)
        assert generated.tolist() == ranks[0]["generated"]


def real(name):
    return {"ddp": "ddp", "fsdp2": "fsdp2", "zero3_offload": "zero3", "zero3_hpz": "zero3"}.get(name, name)


@pytest.mark.shows("training", task="causal_lm", engine=lambda given: real(given["engine"]), base="float32")
@pytest.mark.shows(
    "features", feature="CPU offload", engine=lambda given: "zero3" if given["engine"] == "zero3_offload" else None
)
@pytest.mark.parametrize(
    "engine",
    [
        "fsdp2", "zero3",
        *(pytest.param(name, marks=full) for name in ("ddp", "zero1", "zero2", "zero3_offload", "zero3_hpz")),
    ],
)  # fmt: skip
def test_sft_trainer_on_two_ranks_is_one_process(engine, on_ranks, one_process, stories260k):
    """A user who adds GPUs would get other ranks, or an adapter on disk that is not the trained one."""
    ranks, folder = on_ranks(engine, "sft")
    assert {rank["engine"] for rank in ranks} == {real(engine)}
    assert_equals_one_process(ranks, folder, one_process("sft"))
    assert_saved_is_live(ranks, folder, stories260k, "sft")
    written = {path.name for path in (folder / "out").rglob("*") if path.is_file()}
    assert not {name for name in written if name.endswith((".bin", ".pt", ".pth")) or name == "model.safetensors"}


FOUR_BIT = ("model.load_in_4bit=true", "model.bnb_4bit_compute_dtype=float32")


@pytest.mark.shows(
    "training", task="causal_lm", engine=lambda given: real(given["engine"]), base="4-bit, made while loading"
)
@pytest.mark.shows("training", task="causal_lm", engine="one process", base="4-bit, made while loading")
@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=full) for name in ("ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_hpz")]
)
def test_a_4_bit_base_on_two_ranks_is_one_process(engine, on_ranks, one_process, stories260k):
    """QAdaLoRA through the trainers: streamed, quantised and sharded bases train the adapter of one process."""
    ranks, folder = on_ranks(engine, "sft", extra=FOUR_BIT)
    assert {rank["engine"] for rank in ranks} == {real(engine)}
    assert_equals_one_process(ranks, folder, one_process("sft", *FOUR_BIT))
    assert_saved_is_live(ranks, folder, stories260k, "sft", four_bit=True)


@pytest.mark.shows("training", task="sequence_classification", engine="{engine}", base="float32")
@pytest.mark.shows("features", feature="best checkpoint at the end", engine="{engine}")
@pytest.mark.parametrize(
    "engine", ["fsdp2", *(pytest.param(name, marks=full) for name in ("ddp", "zero1", "zero2", "zero3"))]
)
def test_classifier_ends_at_its_best_checkpoint(engine, on_ranks, one_process, stories260k):
    """The live shards, the head and what is saved at the end must all be the best checkpoint's."""
    ranks, folder = on_ranks(engine, "classify")
    assert_equals_one_process(ranks, folder, one_process("classify"))
    assert_saved_is_live(ranks, folder, stories260k, "classify")
    evaluations = ranks[0]["evaluations"]
    assert ranks[0]["best"] == trainer_worker.FINAL_STEP  # not step 4, whose loss is larger but whose adapter is too
    assert evaluations["4"] > evaluations["12"] > evaluations["16"] + 1e-4
    assert ranks[0]["eval_loss"] == pytest.approx(evaluations["12"], rel=1e-6)
    best, final = Checkpoint(folder / "out" / "checkpoint-12"), load_file(folder / "live.safetensors")
    for group in ("adapter", "other"):
        for name in best.shapes(group):
            assert best.read_whole(group, "weight", name).equal(final.pop(name))
    assert not final and set(best.shapes("other")) == {"score.weight"}
    names = {path.name for path in (folder / "out" / "checkpoint-12").iterdir()}
    assert not {name for name in names if not name.endswith((".json", ".safetensors"))}


@pytest.mark.shows("features", feature="AdaLoraCallback in a stock trainer", engine="{engine}")
@pytest.mark.parametrize("engine", ["zero2", pytest.param("ddp", marks=full)])
def test_callback_in_an_unmodified_trainer(engine, on_ranks, one_process, stories260k):
    """PEFT's AdaLoRA under ZeRO-2 trains an unpruned model and saves a broken one, without a word."""
    ranks, folder = on_ranks(engine, "callback")
    assert_equals_one_process(ranks, folder, one_process("callback"))
    assert_saved_is_live(ranks, folder, stories260k, "callback")
    assert (folder / "out" / "checkpoint-8" / "adapter_model.safetensors").is_file()


@pytest.mark.shows("features", feature="gradient accumulation", engine="{engine}")
@full
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accumulation_through_the_trainer(engine, on_ranks, one_process, stories260k):
    """FSDP2 defers its reduction by our override, DeepSpeed counts micro-batches by itself."""
    extra = ("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2")
    ranks, folder = on_ranks(engine, "sft", extra=extra)
    assert_equals_one_process(ranks, folder, one_process("sft"))
    assert_saved_is_live(ranks, folder, stories260k, "sft")


@pytest.mark.shows("training", task="causal_lm", engine="hsdp", base="float32")
@pytest.mark.shows("features", feature="gradient accumulation", engine="hsdp")
@full
def test_hsdp_with_accumulation(on_ranks, one_process, stories260k):
    """Replicas of a shard wait for the last micro-batch, shards do not."""
    extra = ("training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=2")
    ranks, folder = on_ranks("hsdp", "sft", world_size=4, extra=extra)
    assert {rank["engine"] for rank in ranks} == {"hsdp"}
    assert_equals_one_process(ranks, folder, one_process("sft"))
    assert_saved_is_live(ranks, folder, stories260k, "sft")


@pytest.mark.shows("features", feature="bf16 training", engine="{engine}")
@full
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_bf16_keeps_masters_and_masks_together(engine, on_ranks, one_process, stories260k):
    """bf16 computes what fp32 does to 2 %, on every rank with the same mask; the file holds fp32 masters."""
    ranks, folder = on_ranks(engine, "sft", extra=("training.bf16=true",))
    outcome, _ = one_process("sft")
    assert ranks[0]["masks"] == ranks[1]["masks"] and ranks[0]["masks"].keys() == outcome["masks"].keys()
    assert ranks[0]["eval_loss"] == pytest.approx(outcome["eval_loss"], rel=0.02)
    assert ranks[0]["eval_loss"] != pytest.approx(outcome["eval_loss"], rel=1e-6)
    saved = load_file(folder / "out" / "adapter_model.safetensors")
    assert any(not value.equal(value.bfloat16().float()) for value in saved.values())
    base = load_adapter(AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32), folder / "out")
    assert trainer_worker.probe_loss(base, "sft") == pytest.approx(ranks[0]["probe"], rel=0.02)


def launched(tmp_path, launcher, *arguments):
    """Run launch/train.py itself on the quickstart and return its run.json and metrics."""
    options = ["--config", "configs/recipes/quickstart.yaml", *arguments, "training.max_steps=8",
               "training.logging_steps=1", f"training.output_dir={tmp_path}", "adalora.deltaT=2"]  # fmt: skip
    run_ranks(ROOT / "launch" / "train.py", 2, options, launcher=launcher, timeout=300)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return json.loads((tmp_path / "run.json").read_text()), records


@pytest.mark.shows("training", task="causal_lm", engine=("fsdp2", "zero2"), base="4-bit, made while loading")
def test_commands_of_the_readme(tmp_path, deepspeed_ops):
    """launch/train.py under deepspeed and torchrun: one run, twice."""
    zero2 = launched(tmp_path / "zero2", "deepspeed", "--deepspeed", "configs/deepspeed/zero2.json")
    fsdp2 = launched(tmp_path / "fsdp2", "torchrun", "engine.name=fsdp2")
    assert (zero2[0]["engine"], fsdp2[0]["engine"]) == ("zero2", "fsdp2")
    assert zero2[0]["ranks"] == fsdp2[0]["ranks"]
    budget = zero2[0]["budget"]
    assert budget == fsdp2[0]["budget"]
    assert_budget_spent(budget)
    for key in ("loss", "grad_norm", "adalora/orth_loss"):
        ours, theirs = ([record[key] for record in run[1] if key in record] for run in (zero2, fsdp2))
        assert len(ours) == 8 and ours == pytest.approx(theirs, rel=1e-4)
    assert zero2[0]["final"]["eval_loss"] == pytest.approx(fsdp2[0]["final"]["eval_loss"], rel=1e-4)


@full
def test_a_random_llama_of_100_m_trains_in_4_bits(tmp_path, stories260k, data_dir, deepspeed_ops):
    """The sizes of real layers: weights above DeepSpeed's persistence threshold, several shards of a checkpoint."""
    problem = MemoryProblem(model=None, device=torch.device("cpu"), ranks=2)
    model = problem.full_precision_model(torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) > 95e6
    model.save_pretrained(tmp_path / "model", max_shard_size="80MB")
    chat = data_dir / "sgd_chat"
    options = [
        "--config", "configs/recipes/sgd_chat_stories260k.yaml", f"model.model_name_or_path={tmp_path / 'model'}",
        f"model.tokenizer_name_or_path={stories260k}", "model.load_in_4bit=true", "model.torch_dtype=float32",
        "model.bnb_4bit_compute_dtype=float32", f"data.train={chat / 'train.jsonl'}", f"data.eval={chat / 'dev.jsonl'}",
        "data.max_train_samples=4", "data.max_eval_samples=4", "data.max_length=64", "training.max_steps=6",
        "training.per_device_train_batch_size=2", "adalora.deltaT=1", "training.eval_on_start=false",
        "training.warmup_steps=0",  # every step sees the same four dialogues, whose loss must fall
    ]  # fmt: skip
    runs = {}
    for name, launcher, extra in (
        ("zero3", "deepspeed", ["--deepspeed", "configs/deepspeed/zero3.json"]),
        ("fsdp2", "torchrun", ["engine.name=fsdp2"]),
    ):
        folder = tmp_path / name
        arguments = [*options, *extra, f"training.output_dir={folder}"]
        run_ranks(ROOT / "launch" / "train.py", 2, arguments, launcher=launcher, timeout=550)
        runs[name] = json.loads((folder / "run.json").read_text())
        losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [record["loss"] for record in losses if "loss" in record]
        assert len(losses) == 6 and losses[-1] < losses[0]
    assert runs["zero3"]["engine"] == "zero3" and runs["fsdp2"]["engine"] == "fsdp2"
    assert runs["zero3"]["ranks"] == runs["fsdp2"]["ranks"] and len(set(runs["zero3"]["ranks"].values())) >= 3
    assert runs["zero3"]["final"]["eval_loss"] == pytest.approx(runs["fsdp2"]["final"]["eval_loss"], rel=1e-4)
