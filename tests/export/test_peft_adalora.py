"""Adapters on disk: PEFT reads ours, we read PEFT's, and damaged or foreign ones are refused before anything moves."""

import copy
import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export import whole_adapter
from adalora_scale.export.peft_adalora import load_adapter, save_adapter
from tests.adalora import tiny

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOTAL, FINAL = 12, 9
IDS = torch.arange(2, 26).view(2, 12)
KINDS = ["stories260k", "gpt2", "bert"]


def options(kind, **changes):
    values = {"init_r": 4, "target_r": 2, "lora_alpha": 4, "tinit": 2, "tfinal": 3, "deltaT": 3}
    if kind == "bert":
        values["modules_to_save"] = ["classifier"]
    return AdaLoraConfig(**{**values, **changes})


pytestmark = [
    # PEFT says of rank 0 that ZeRO-3 shards were forgotten, and looks for `rank_pattern` as LoRA means it.
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),
]


@pytest.fixture
def base_of(request):
    def base_of(kind):
        if kind == "stories260k":
            return AutoModelForCausalLM.from_pretrained(request.getfixturevalue("stories260k")).eval()
        return {"gpt2": tiny.gpt2, "bert": tiny.bert}[kind]().eval()

    return base_of


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)


def loss_of(model, kind, step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 60, (4, 12), generator=generator)
    return model(input_ids=ids, labels=ids[:, 0] % 3 if kind == "bert" else ids).loss


def trained(base_of, kind, steps=TOTAL, **changes):
    """Really train; at 12 steps past the freeze (9), at 5 before any pruning is final."""
    torch.manual_seed(0)
    model = inject_adalora(base_of(kind), options(kind, **changes))
    optimizer = optimizer_of(model)
    allocator = RankAllocator(model, options(kind, **changes), total_step=TOTAL).attach(optimizer)
    for step in range(steps):
        loss_of(model, kind, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert allocator.frozen == (steps >= FINAL)
    return model, allocator


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def assert_same_function(got, expected, base):
    """Equal to 1e-5 of the largest logit, and the adapter does something: one that does nothing is equal to nothing.

    PEFT divides by (rank + 1e-5), so its scale is 2.5e-6 below lora_alpha / init_r at init_r = 4.
    """
    size = expected.abs().max()
    assert (logits(got) - expected).abs().max() <= 1e-5 * size
    assert (expected - logits(base)).abs().max() > 1e-3 * size


# ---- ours → PEFT, ours → ours


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [5, TOTAL], ids=["before the freeze", "frozen"])
def test_saved_adapter_gives_the_same_logits_in_peft_and_here(base_of, tmp_path, kind, steps):
    """The file's whole purpose; a transposed factor, a lost head or a scale by the wrong rank shows only here."""
    model, allocator = trained(base_of, kind, steps)
    expected = logits(model)
    save_adapter(model, tmp_path)
    assert_same_function(peft.PeftModel.from_pretrained(base_of(kind), tmp_path), expected, base_of(kind))
    loaded = load_adapter(base_of(kind), tmp_path)
    assert_same_function(loaded, expected, base_of(kind))
    ranks = {name: layer.r for name, layer in adapter_layers(loaded)}
    assert ranks == (allocator.ranks() if steps == TOTAL else dict.fromkeys(allocator.ranks(), 4))
    if steps == TOTAL:
        costs = {name: layer.triplet_size for name, layer in adapter_layers(model)}
        spent, budget = sum(rank * costs[name] for name, rank in ranks.items()), 2 * sum(costs.values())
        assert budget - max(costs.values()) < spent <= budget
        assert len(set(ranks.values())) > 1
    assert not any(p.requires_grad for name, p in loaded.named_parameters() if "lora_" in name)


def test_module_that_lost_all_triplets_loads_in_peft_and_here(base_of, tmp_path):
    """Rank 0 writes empty tensors."""
    model = inject_adalora(base_of("gpt2"), options("gpt2"))
    tiny.randomise(model)
    for index, (_, layer) in enumerate(adapter_layers(model)):
        layer.keep_mask = [False] * 4 if index % 3 == 0 else [True, False, index % 2 == 0, False]
        with torch.no_grad():
            layer.lora_E *= torch.tensor(layer.keep_mask)
    expected = logits(model)
    save_adapter(model, tmp_path)
    assert_same_function(peft.PeftModel.from_pretrained(base_of("gpt2"), tmp_path), expected, base_of("gpt2"))
    loaded = load_adapter(base_of("gpt2"), tmp_path)
    assert_same_function(loaded, expected, base_of("gpt2"))
    assert min(layer.r for _, layer in adapter_layers(loaded)) == 0


def test_file_has_pefts_names_shapes_and_config(base_of, tmp_path):
    """Other tools (vLLM, converters) read these without PEFT."""
    model, allocator = trained(base_of, "gpt2")
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["peft_type"] == "ADALORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["fan_in_fan_out"] is True
    assert (config["init_r"], config["target_r"], config["lora_alpha"]) == (4, 2, 8)
    assert (config["tinit"], config["tfinal"], config["deltaT"], config["total_step"]) == (2, 3, 3, TOTAL)
    assert config["rank_pattern"] == allocator.rank_pattern()
    assert config["target_modules"] == list(allocator.ranks())
    tensors = load_file(tmp_path / WEIGHTS)
    assert len(tensors) == 3 * 8
    for name, rank in allocator.ranks().items():
        layer = model.get_submodule(name)
        key = f"base_model.model.{name}.lora_"
        assert tensors[key + "A"].shape == (rank, layer.in_features)
        assert tensors[key + "E"].shape == (rank, 1)
        assert tensors[key + "B"].shape == (layer.out_features, rank)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_task_and_head_of_a_classifier_are_written(base_of, tmp_path):
    """Without the head's weights a classifier adapter is useless."""
    model, _ = trained(base_of, "bert")
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    tensors = load_file(tmp_path / WEIGHTS)
    assert torch.equal(tensors["base_model.model.classifier.weight"], model.classifier.weight)
    assert not torch.equal(model.classifier.weight, tiny.bert().classifier.weight)
    loaded = load_adapter(base_of("bert"), tmp_path)
    assert torch.equal(loaded.classifier.bias, model.classifier.bias)
    assert not loaded.classifier.weight.requires_grad


def test_half_precision_base_keeps_the_adapter_in_float32(base_of, tmp_path):
    """Rounding λ to bf16 on the way through the file would change a trained model."""
    model, _ = trained(base_of, "gpt2")
    save_adapter(model, tmp_path)
    loaded = load_adapter(base_of("gpt2").to(torch.bfloat16), tmp_path)
    exact = load_adapter(base_of("gpt2"), tmp_path)
    for (_, half), (_, full) in zip(adapter_layers(loaded), adapter_layers(exact), strict=True):
        assert half.lora_E.dtype == torch.float32
        assert torch.equal(half.lora_A, full.lora_A)
        assert half.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 5, TOTAL])
def test_save_load_save_is_byte_identical(base_of, tmp_path, kind, steps):
    """An adapter that changes when copied through a program cannot be checked by checksum."""
    model, _ = trained(base_of, kind, steps)
    save_adapter(model, tmp_path / "a")
    save_adapter(load_adapter(base_of(kind), tmp_path / "a"), tmp_path / "b")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_saving_does_not_change_the_training(base_of, tmp_path):
    """Checkpoints are saved in the middle of a run."""
    straight, _ = trained(base_of, "gpt2")
    model = inject_adalora(base_of("gpt2"), options("gpt2"))
    model.load_state_dict(trained(base_of, "gpt2", 0)[0].state_dict())
    optimizer = optimizer_of(model)
    RankAllocator(model, options("gpt2"), total_step=TOTAL).attach(optimizer)
    for step in range(TOTAL):
        loss_of(model, "gpt2", step).backward()
        optimizer.step()
        optimizer.zero_grad()
        save_adapter(model, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), straight.parameters(), strict=True))


class Wrapper(nn.Module):
    """DDP's name for what it wraps."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [Wrapper, torch.compile, lambda m: Wrapper(torch.compile(m))])
def test_wrapped_model_saves_the_same_files(base_of, tmp_path, wrap):
    """`module.` or `_orig_mod.` in a file's names loads nowhere."""
    model, _ = trained(base_of, "bert", FINAL)
    save_adapter(model, tmp_path / "plain")
    save_adapter(wrap(model), tmp_path / "wrapped")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "wrapped" / name).read_bytes()


class WithModule(nn.Module):
    """Real submodules called `module`, and one layer under two names."""

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        self.tied = self.module[1]

    def forward(self, x):
        return self.tied(torch.tanh(self.module(x)))


def test_odd_models_round_trip(tmp_path):
    """Names that look like a wrapper's, and shared layers, must come back to where they were."""
    torch.manual_seed(0)
    base = WithModule()
    model = tiny.randomise(inject_adalora(copy.deepcopy(base), options("plain")))
    save_adapter(model, tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    x = torch.randn(3, 6)
    assert torch.equal(loaded(x), model(x))
    assert not torch.allclose(base(x), model(x), atol=1e-2)


def test_loaded_adapter_can_be_left_trainable(base_of, tmp_path):
    """Continuing to train a finished adapter needs its parameters and its head, and nothing else, trainable."""
    model, _ = trained(base_of, "bert")
    save_adapter(model, tmp_path)
    loaded = load_adapter(base_of("bert"), tmp_path, trainable=True)
    trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in loaded.named_parameters() if "lora_" in name or "classifier" in name}
    loss_of(loaded, "bert", 0).backward()
    assert loaded.classifier.weight.grad.abs().sum() > 0


# ---- PEFT → ours


def trained_by_peft(base_of, kind, steps, tmp_path):
    torch.manual_seed(0)
    names = {"stories260k": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "bert": ["query", "dense"]}
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=8, tinit=2, tfinal=3, deltaT=3, total_step=TOTAL, target_modules=names[kind],
        fan_in_fan_out=kind == "gpt2", task_type="SEQ_CLS" if kind == "bert" else "CAUSAL_LM", lora_dropout=0.0,
    )  # fmt: skip
    model = peft.get_peft_model(base_of(kind), config)
    optimizer = optimizer_of(model)
    for step in range(1, steps + 1):
        loss_of(model, kind, step).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    return expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [2, TOTAL], ids=["never pruned", "pruned"])
def test_adapter_trained_by_peft_loads_here(base_of, tmp_path, kind, steps):
    """Users bring adapters they have; their head and scale must be taken as PEFT takes them."""
    expected = trained_by_peft(base_of, kind, steps, tmp_path / "theirs")
    saved = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    assert bool(saved["rank_pattern"]) == (steps == TOTAL)
    loaded = load_adapter(base_of(kind), tmp_path / "theirs")
    assert_same_function(loaded, expected, base_of(kind))
    ranks = [layer.r for _, layer in adapter_layers(loaded)]
    assert sum(ranks) == (2 if steps == TOTAL else 4) * len(ranks)
    save_adapter(loaded, tmp_path / "ours")  # and back again
    assert_same_function(peft.PeftModel.from_pretrained(base_of(kind), tmp_path / "ours"), expected, base_of(kind))


# ---- refusals


@pytest.fixture
def saved(base_of, tmp_path):
    """A good adapter of the tiny GPT-2, in a folder."""
    model, _ = trained(base_of, "gpt2", FINAL)
    save_adapter(model, tmp_path / "good")
    return tmp_path / "good"


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def assert_refused_and_untouched(model, folder, kind, message):
    modules = [(name, id(module)) for name, module in model.named_modules()]
    state = copy.deepcopy(model.state_dict())
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(kind, match=message) as error:
        load_adapter(model, folder)
    assert "\n" not in str(error.value).strip()
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert not hasattr(model, "adalora")


Q = "base_model.model.transformer.h.0.attn.c_attn.lora_"
DAMAGE = {
    "no config": (lambda f: (f / CONFIG).unlink(), UserError, "no adapter_config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), UserError, "no adapter_model.safetensors"),
    "no folder": (shutil.rmtree, UserError, "no adapter_config.json"),
    "config no JSON": (lambda f: (f / CONFIG).write_text('{"peft_type": '), UserError, "not valid JSON"),
    "config binary": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), UserError, "not valid JSON"),
    "config a list": (lambda f: (f / CONFIG).write_text("[]"), (UserError, Unsupported), "adapter_config.json"),
    "LoRA": (lambda f: edit_config(f, peft_type="LORA"), Unsupported, "'LORA'"),
    "no alpha": (lambda f: edit_config(f, lora_alpha=None), UserError, "lora_alpha"),
    "init_r zero": (lambda f: edit_config(f, init_r=0), UserError, "init_r"),
    "init_r below target_r": (lambda f: edit_config(f, init_r=1), UserError, "init_r"),
    "dropout out of range": (lambda f: edit_config(f, lora_dropout=1.5), UserError, "lora_dropout"),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), UserError, "damaged"),
    "cut in the header": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:50]), UserError, "damaged"),
    "empty file": (lambda f: (f / WEIGHTS).write_bytes(b""), UserError, "damaged"),
    "no triplets": (lambda f: save_file({"x": torch.zeros(1)}, f / WEIGHTS), UserError, "no AdaLoRA tensors"),
    "factor missing": (lambda f: edit_weights(f, lambda t: t.pop(Q + "B")), UserError, "no complete triplets"),
    "E missing": (lambda f: edit_weights(f, lambda t: t.pop(Q + "E")), UserError, r"h\.0\.attn\.c_attn"),
    "A narrow": (lambda f: edit_weights(f, lambda t: t.update({Q + "A": t[Q + "A"][:, 1:] + 0})), UserError, "shapes"),
    "unknown tensor": (lambda f: edit_weights(f, lambda t: t.update(zzz=torch.zeros(2))), UserError, "'zzz'"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_adapter_is_refused_and_the_model_untouched(base_of, saved, name):
    """A half-loaded model answers, wrongly; a traceback of safetensors does not say which file to copy again."""
    damage, kind, message = DAMAGE[name]
    damage(saved)
    assert_refused_and_untouched(base_of("gpt2"), saved, kind, message)


def test_undamaged_adapter_loads(base_of, saved):
    """The refusals above would all pass if nothing ever loaded."""
    assert len(list(adapter_layers(load_adapter(base_of("gpt2"), saved)))) == 8


def test_wrong_base_is_refused_and_untouched(base_of, saved, tmp_path):
    """Another model of the family with other sizes, with fewer layers, or with another head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    assert_refused_and_untouched(base_of("stories260k"), saved, UserError, r"transformer\.h\.0\.attn\.c_attn")
    shape = {"n_head": 2, "vocab_size": 64, "n_positions": 32}
    wide = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, **shape))
    assert_refused_and_untouched(wide, saved, UserError, "shapes")
    short = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, **shape))
    assert_refused_and_untouched(short, saved, UserError, r"transformer\.h\.1\.")
    model, _ = trained(base_of, "bert", FINAL)
    save_adapter(model, tmp_path / "bert")
    assert_refused_and_untouched(tiny.bert(num_labels=5), tmp_path / "bert", UserError, r"classifier.*num_labels")


def test_loading_twice_and_saving_nothing_are_refused(base_of, saved, tmp_path):
    """Both are slips in a notebook."""
    model = load_adapter(base_of("gpt2"), saved)
    with pytest.raises(UserError, match="already"):
        load_adapter(model, saved)
    with pytest.raises(UserError, match="inject_adalora"):
        save_adapter(base_of("gpt2"), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


# ---- crashes while writing


@pytest.mark.parametrize("moment", ["weights", "config", "half a file"])
def test_crash_while_writing_leaves_the_old_adapter(base_of, saved, monkeypatch, moment):
    """A full disk at the last checkpoint must not take the one before with it, nor mix the two."""
    before = {name: (saved / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    other, _ = trained(base_of, "gpt2", FINAL, lora_alpha=16)

    def fails(tensors, path, metadata=None):
        if moment == "half a file":
            path.write_bytes(b"\x00" * 50)
        raise OSError("No space left on device")

    if moment == "config":
        monkeypatch.setattr(whole_adapter.Path, "write_text", lambda self, *a, **k: fails({}, self))
    else:
        monkeypatch.setattr(whole_adapter, "save_adapter_file", fails)
    with pytest.raises(UserError, match="No space left"):
        save_adapter(other, saved)
    monkeypatch.undo()
    assert sorted(p.name for p in saved.iterdir()) == [CONFIG, WEIGHTS]  # half a file takes room that is needed
    assert {name: (saved / name).read_bytes() for name in (CONFIG, WEIGHTS)} == before
    save_adapter(other, saved)  # and the next attempt succeeds over what the crash left
    assert sorted(p.name for p in saved.iterdir()) == [CONFIG, WEIGHTS]
    assert {name: (saved / name).read_bytes() for name in (CONFIG, WEIGHTS)} != before
    torch.testing.assert_close(logits(load_adapter(base_of("gpt2"), saved)), logits(other), rtol=1e-5, atol=1e-5)
