"""The plan as a user asks for it: what it says, how fast, and what it refuses."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.cli import main
from adalora_scale.cluster.plan.advice import Traces, largest_micro_batch
from adalora_scale.cluster.plan.memory import MOMENTS, Memory, Part, describe, memory_of
from adalora_scale.cluster.plan.model import build
from adalora_scale.cluster.plan.planner import Planner
from adalora_scale.cluster.plan.request import Hardware, Request, parse_bytes
from adalora_scale.cluster.plan.shapes import SHAPES, model_config
from adalora_scale.cluster.plan.speed import flops_per_token, speed_of
from adalora_scale.cluster.plan.trace import trace_step
from adalora_scale.config import ModelConfig, load_config
from adalora_scale.quantization.linear import Linear4bit
from tests.conftest import ROOT

LLAMA3_70B = ROOT / "configs" / "recipes" / "llama3_70b_qadalora.yaml"


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape") / "config.json"
    tree = {"model_type": "llama", "vocab_size": 4000, "hidden_size": 256, "intermediate_size": 704}
    tree |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    path.write_text(json.dumps(tree))
    return str(path)


def plan(capsys, shape, *arguments):
    code = main(
        ["plan", "--config", str(LLAMA3_70B), f"model.model_name_or_path={shape}", "data.max_length=128", *arguments]
    )
    output = capsys.readouterr()
    return code, output.out, output.err


def test_llama3_70b_over_64_ranks_takes_less_than_30_seconds_of_cpu_time():
    """Else people guess. Processor time, because other work on this machine stretches the clock's."""
    command = [sys.executable, "-m", "adalora_scale", "plan", "--config", str(LLAMA3_70B), "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    before = os.times()
    result = subprocess.run(
        [*command, "--gpus", "64", "--nodes", "8"], env=environment, capture_output=True, text=True, timeout=500
    )
    after = os.times()
    assert result.returncode == 0, result.stderr
    assert (after.children_user + after.children_system) - (before.children_user + before.children_system) < 30
    answer = json.loads(result.stdout)
    assert set(answer["engines"]) == {"ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"}
    parts = {part["name"]: part["bytes"] for part in answer["engines"]["fsdp2"]["parts"]}
    weights = 80 * (8192 * (8192 * 2 + 1024 * 2) + 3 * 8192 * 28672)  # q, o, k, v; gate, up, down
    assert parts["4-bit weights"] == weights // 2 // 64
    assert parts["4-bit scales"] == weights // 64 // 64
    assert parts["adapters (fp32)"] == answer["adapter_bytes_init_r"] // 64 + _padding(80 * 7, 32, 64)


def _padding(matrices, rank, ranks):
    """Every lora_E has 32 elements: rank 0 holds one of them, not 32 / 64."""
    return round(matrices * 4 * (1 - rank / ranks))


def test_parts_add_up_and_the_table_shows_them(capsys, shape):
    """Else the sum in the table is not the sum of the table."""
    code, out, _ = plan(capsys, shape, "--gpus", "4", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["fits"]
    for engine in answer["engines"].values():
        assert engine["worst_moment"] != "step"
        moments = ("always", "pass", engine["worst_moment"])
        there = [part["bytes"] for part in engine["parts"] if part["moment"] in moments]
        assert sum(there) == engine["device_bytes"]
        assert engine["largest_micro_batch"] >= answer["sequences_per_micro_batch"]
        assert engine["speed"]["compute_s"] > 0 and engine["load"]["seconds"] > 0
    _, out, _ = plan(capsys, shape, "--gpus", "4")
    assert "4-bit scales" in out and "fits: " in out and "fewest GPUs: 1 " in out


def test_times_are_those_of_a_card_that_was_named(capsys, shape):
    """Else an H100's tokens/s are read as those of the card at hand, or kernels' start is planned as arithmetic."""
    options = ["--gpus", "1", "training.per_device_train_batch_size=64", "data.max_length=4096"]
    for named, expected, timed in (
        ([], "h100 assumed, 84.83 GB; name yours with --gpu", False),
        (["--gpu-memory", "24GB"], "h100 assumed, 24.00 GB; name yours with --gpu", False),
        (["--gpu", "A100", "--peak-tflops", "0.1"], "a100, 84.83 GB", True),
        (["--gpu", "h100", "data.max_length=32", "training.per_device_train_batch_size=1"], "h100, 84.83 GB", False),
    ):
        _, out, _ = plan(capsys, shape, *options, *named)
        assert f"1 GPU: {expected}" in out
        (row,) = [line.split() for line in out.splitlines() if line.startswith("ddp ")]
        assert (row[6] != "-", row[7] != "-") == (timed, timed), out
        assert timed or "No seconds and tokens/s" in out
    _, out, _ = plan(capsys, shape, *options, "--json")
    answer = json.loads(out)
    assert answer["hardware"]["name"] is None and answer["engines"]["ddp"]["speed"]["tokens_per_s"] is None


def test_a_model_that_cannot_fit_is_told_by_how_much_and_what_would_fit(capsys, shape):
    """Else the answer to a refusal is another guess."""
    small = ["--gpus", "2", "--gpu-memory", "1900MB"]
    kept = ["training.gradient_checkpointing=false", "training.per_device_train_batch_size=64", "engine.name=ddp"]
    _, out, _ = plan(capsys, shape, *small, *kept, "--json")
    answer = json.loads(out)
    code, out, _ = plan(capsys, shape, *small, *kept)
    assert code == 1 and not answer["fits"]
    missing = answer["engines"]["ddp"]["device_bytes"] - 1.9e9
    assert f"does not fit: {missing / 1e9:.2f} GB too much on every GPU" in out
    for way in answer["ways_out"]:
        if way.startswith("training."):
            assert plan(capsys, shape, *small, *kept, way)[0] == 0, way
    assert any(way.startswith("training.per_device_train_batch_size=") for way in answer["ways_out"])


def test_what_never_fits_says_so(capsys, shape):
    """Else a plan recommends zero GPUs."""
    code, out, _ = plan(capsys, shape, "--gpus", "2", "--gpu-memory", "1MB")
    assert code == 1 and "nothing that was tried would fit" in out and "fewest GPUs" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus is 0; it must be at least 1."),
        (["--gpus", "6", "--nodes", "4"], "--gpus 6 cannot be spread evenly over --nodes 4."),
        (["--gpus", "2", "--gpu", "h1000"], "Did you mean 'h100'?"),
        (["--gpus", "2", "--gpu-memory", "lots"], "--gpu-memory is 'lots'; write for example 80GB"),
        (["--gpus", "3", "--global-batch", "16"], "3 GPUs x 1 sequences = 3; use 15 or 18"),
        (["--gpus", "2", "model.model_name_or_path=nobody/nothing"], "or one of meta-llama/Meta-Llama-3-70B"),
        (["--gpus", "2", "--gpu-memory", "80"], "--gpu-memory is '80', 80 bytes; write for example 80GB."),
        (["--gpus", "2", "--global-batch", "0"], "--global-batch is 0; it must be at least 1."),
        (["--gpus", "2", "--efficiency", "0"], "--efficiency is 0; it must be a number above 0."),
        (["--gpus", "2", "--efficiency", "50"], "--efficiency is 50; it is a share, at most 1."),
        (["--gpus", "2", "--node-bandwidth", "-5"], "--node-bandwidth is -5; it must be a number above 0."),
        (["--gpus", "3", "training.global_batch_size=64"], "training.global_batch_size=64 cannot be divided over 3"),
        (["--gpus", "2", "--deepspeed", "no-such.json"], "no-such.json cannot be read"),
        (["--gpus", "2", "training.lerning_rate=1"], "unknown key 'training.lerning_rate'"),
        (["--gpus", "4", "engine.config.replicate=3"], "engine.config.replicate=3 does not divide the 4 ranks."),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, shape, arguments, message):
    """Else a slip looks like a plan."""
    code, out, err = plan(capsys, shape, *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert message in err


def test_a_global_batch_is_divided_over_the_gpus(capsys, shape):
    """Else a step is planned with the accumulation of another number of GPUs."""
    given = ["training.global_batch_size=64", "training.gradient_accumulation_steps=16"]
    code, out, _ = plan(capsys, shape, "--gpus", "4", "--json", *given)  # 4 x 1 x 16
    assert code == 0 and json.loads(out)["gradient_accumulation"] == 16
    quickstart = str(ROOT / "configs" / "recipes" / "quickstart.yaml")
    model = f"model.model_name_or_path={shape}"
    assert main(["plan", "--config", quickstart, "--gpus", "2", "--json", model, "training.global_batch_size=512"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["sequences_per_micro_batch"] * answer["gradient_accumulation"] * 2 == 512


def test_a_global_batch_fixed_in_deepspeeds_file_must_be_divided(capsys, shape, tmp_path):
    """Else DeepSpeed says so after the GPUs were rented."""
    config = tmp_path / "zero2.json"
    config.write_text(json.dumps({"train_batch_size": 32, "zero_optimization": {"stage": 2}}))
    engine = ["engine.name=deepspeed", f"engine.config={config}"]
    code, _, err = plan(capsys, shape, "--gpus", "5", *engine)
    assert code == 2 and "use 30 or 35" in err
    code, out, _ = plan(capsys, shape, "--gpus", "4", *engine, "--json")
    assert code == 0 and json.loads(out)["gradient_accumulation"] == 8


def test_flops_are_those_of_the_roofline():
    """Else the time is off by the factor somebody forgot: 297 GFLOP a token at 4096, 439 with all computed again."""
    model = describe(build(Request(config=load_config(LLAMA3_70B), gpus=1)))
    flops = flops_per_token(model.model, length=4096, checkpointing=True)
    adapters = 6 * 32 * 80 * 161792
    assert flops.forward + flops.backward - adapters == pytest.approx(297e9, rel=0.01)
    assert flops.total - adapters * 8 / 6 == pytest.approx(439e9, rel=0.01)


def test_tiled_mlps_take_less_memory_and_more_arithmetic(shape):
    """Else long rows are refused that would fit, or promised the speed of whole ones."""
    plans = {}
    for tiles in (1, 4):
        overrides = [f"model.model_name_or_path={shape}", "data.max_length=256", f"training.tiled_mlp={tiles}"]
        asked = Request(config=load_config(LLAMA3_70B, overrides), gpus=1)
        model = describe(build(asked))
        traced = trace_step(asked, sequences=1, checkpointing=False, autocast=False)
        memory = memory_of("ddp", asked, model, traced)
        plans[tiles] = traced, flops_per_token(model.model, length=256, checkpointing=False), memory, model, asked
    (whole, before, memory, model, asked), (tiled, after, less, other, _) = plans[1], plans[4]
    assert tiled.per_block < whole.per_block and less.device < memory.device
    mlps = [block.mlp for block in model.model.model.layers]
    weights = sum(m.in_features * m.out_features for mlp in mlps for m in mlp.modules() if isinstance(m, Linear4bit))
    adapters = sum(
        layer.r * (layer.in_features + layer.out_features) for mlp in mlps for _, layer in adapter_layers(mlp)
    )
    assert before.again == 0 and after.again == 2 * (weights + adapters)
    passes = [
        speed_of("ddp", asked, one, memory, checkpointing=False).dequantise_s for one in (model, other)
    ]  # fmt: skip
    assert passes[1] > 2 * passes[0]  # the MLP's weights are read once a part


def test_offloaded_activations_are_the_hosts(shape):
    """Else the plan refuses what TRL makes room for."""
    sums = {}
    for offload in ("false", "true"):
        overrides = [f"model.model_name_or_path={shape}", "data.max_length=256"]
        asked = Request(
            config=load_config(LLAMA3_70B, [*overrides, f"training.activation_offloading={offload}"]), gpus=1
        )
        model = dataclasses.replace(describe(build(asked)), blocks=8)
        traced = trace_step(asked, sequences=1, checkpointing=False, autocast=False)
        sums[offload] = memory_of("ddp", asked, model, traced)
    moved = sums["true"].host - sums["false"].host
    assert moved == 3 * traced.per_block == sums["false"].at("loss") - sums["true"].at("loss")


def test_layers_behind_hooks_are_planned_with_what_they_make(shape):
    """Else ZeRO-3, which brings weights in hooks, is promised the memory of engines whose layers are one function."""
    overrides = [f"model.model_name_or_path={shape}", "data.max_length=256"]
    planner = Planner(Request(config=load_config(LLAMA3_70B, overrides), gpus=2))
    hooked, others = planner._traces_for("zero3").of(1), planner._traces_for("fsdp2").of(1)
    assert hooked.backward_peak > others.backward_peak
    assert hooked.per_block >= others.per_block


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_traffic_follows_the_engines(shape, penalty):
    """Else engines are compared by the wrong bytes; Gram matrices go round for the penalty alone."""
    overrides = [
        f"model.model_name_or_path={shape}", "data.max_length=64", f"adalora.orth_reg_weight={penalty}"
    ]  # fmt: skip
    asked = Request(config=load_config(LLAMA3_70B, overrides), gpus=4)  # two micro-batches a step
    model = describe(build(asked))
    trained = sum(piece.tensor.numel() for piece in model.held if piece.kind == "adapters")
    gram = 0.75 * 2 * sum(2 * 32**2 * 4 for _ in range(3 * 7)) if penalty else 0

    def traffic(engine):
        speed = speed_of(engine, asked, model, Memory(engine), checkpointing=True)
        return speed.gathered, speed.reduced

    assert traffic("ddp") == (0, pytest.approx(0.75 * 2 * 4 * trained, abs=2))
    assert traffic("fsdp2")[1] == pytest.approx(0.75 * 4 * trained + gram, abs=2)
    assert traffic("zero2") == (0, pytest.approx(3 * 0.75 * 2 * trained + gram, abs=4))
    whole = sum(
        p.tensor.numel() * (2 if p.tensor.is_floating_point() else 1)
        for p in model.held
        if p.kind != "4-bit second level"
    )
    assert traffic("zero3")[0] == pytest.approx(2 * 2 * 0.75 * whole, abs=4)
    assert traffic("fsdp2")[0] < traffic("zero3")[0]  # embeddings and head stay gathered through the backward


def test_activations_grow_evenly_with_the_micro_batch(shape):
    """Else the largest micro-batch, extrapolated from one and two sequences, does not fit."""
    asked = Request(
        config=load_config(LLAMA3_70B, [f"model.model_name_or_path={shape}", "data.max_length=128"]), gpus=2
    )
    one, two, five = (trace_step(asked, sequences=count, checkpointing=True, autocast=False) for count in (1, 2, 5))
    assert Traces(one, two).of(5).total(80) == pytest.approx(five.total(80), rel=0.02)
    assert largest_micro_batch(lambda count: count <= 37) == 37
    assert largest_micro_batch(lambda count: False) == 0


def test_the_worst_moment_counts_and_not_the_sum_of_moments():
    """Else every plan is too high."""
    memory = Memory("ddp", [Part("a", 10), Part("b", 5, "loss"), Part("c", 7, "backward"), Part("d", 99, "host")])
    assert (memory.moment, memory.device, memory.host) == ("backward", 17, 99)
    assert [part.name for part in memory.peak_parts()] == ["a", "c"]
    memory.parts += [Part("activations", 20, "pass"), Part("fp32 gradients", 25, "step")]
    assert (memory.device, memory.at("step")) == (37, 35)


def test_offloading_moves_shards_to_the_host_and_keeps_the_second_level(shape):
    """Else a 24 GB card is promised what it cannot hold."""
    overrides = [f"model.model_name_or_path={shape}", "data.max_length=64"]
    activations = None
    sums = {}
    for offload in ("false", "true"):
        config = load_config(LLAMA3_70B, [*overrides, f"engine.config.cpu_offload={offload}"])
        asked = Request(config=config, gpus=2, hardware=Hardware(context=0))
        model = describe(build(asked))
        activations = activations or trace_step(asked, sequences=1, checkpointing=True, autocast=False)
        sums[offload] = memory_of("fsdp2", asked, model, activations)
    parts = {offload: {(part.name, part.moment): part.bytes for part in sums[offload].parts} for offload in sums}
    hosted = {name: size for (name, moment), size in parts["true"].items() if moment == "host"}
    assert {"4-bit weights", "4-bit scales", "adapters (fp32)", "Adam's moments", "gradients"} <= hosted.keys()
    assert "4-bit second level" not in hosted and sums["false"].host == 0
    for moment in MOMENTS:  # gradients are on the device at the step alone, the rest of what moves always
        moved = sum(size for name, size in hosted.items() if name != "gradients" or moment == "step")
        assert sums["false"].at(moment) - sums["true"].at(moment) == moved


@pytest.mark.parametrize("name", SHAPES)
def test_shipped_shapes_are_whole(name):
    """Else a 70 B model is planned as something else."""
    config = model_config(ModelConfig(model_name_or_path=name))
    sizes = (config.hidden_size, config.num_hidden_layers, config.vocab_size)
    expected = {
        "llama3_70b": (8192, 80, 128256), "llama3_8b": (4096, 32, 128256), "llama2_70b": (8192, 80, 32000),
        "llama3_2_3b": (3072, 28, 128256), "deberta_v3_base": (768, 12, 128100), "minilm_l6": (384, 6, 30522),
        "llama3_1_8b": (4096, 32, 128256), "qwen2_5_7b": (3584, 28, 152064), "qwen3_8b": (4096, 36, 151936),
        "mistral_7b": (4096, 32, 32768), "gemma3_1b": (1152, 26, 262144), "qwen3_30b_a3b": (2048, 48, 151936),
        "llama3_1_405b": (16384, 126, 128256),
    }  # fmt: skip
    assert sizes == expected[SHAPES[name]]
    assert getattr(config, "num_key_value_heads", 8) == {"qwen2_5_7b": 4, "qwen3_30b_a3b": 4, "gemma3_1b": 1}.get(
        SHAPES[name], 8
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.1-405B", 405_853_388_800),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-30B-A3B", 30_532_122_624),
        ("mistralai/Mistral-7B-v0.3", 7_248_023_552),
        ("google/gemma-3-1b-pt", 999_885_952),
    ],
)
def test_shapes_of_the_recipes_have_the_published_number_of_parameters(name, parameters):
    """Else a side that was written down wrongly plans another model: the numbers are those of the models' files."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(ModelConfig(model_name_or_path=name)))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_a_classifier_and_a_model_in_16_bits_can_be_planned(capsys, stories260k):
    """Else only the recipe it was written for works."""
    assert AutoConfig.from_pretrained(stories260k).model_type == "llama"
    for overrides in (["task=sequence_classification", "model.load_in_4bit=false"], ["model.load_in_4bit=false"]):
        code, out, err = plan(capsys, stories260k, "--gpus", "2", "--json", *overrides)
        assert code == 0, err
        names = {part["name"] for part in json.loads(out)["engines"]["fsdp2"]["parts"] if part["bytes"]}
        assert "linear weights" in names and "4-bit weights" not in names


def test_sizes_are_read_as_people_write_them():
    """Else 80GB is 80 bytes."""
    assert parse_bytes("x", "80GB") == 80 * 10**9
    assert parse_bytes("x", "24 gib") == 24 * 2**30
    assert parse_bytes("x", "1000") == 1000


def test_planning_leaves_the_random_state_and_the_environment_alone(shape):
    """Else a plan before a run changes the run."""
    import torch

    state, environment = torch.get_rng_state(), dict(os.environ)
    config = load_config(LLAMA3_70B, [f"model.model_name_or_path={shape}", "data.max_length=64"])
    began = time.monotonic()
    Planner(Request(config=config, gpus=2)).plan()
    assert time.monotonic() - began < 300
    assert torch.equal(torch.get_rng_state(), state) and dict(os.environ) == environment
