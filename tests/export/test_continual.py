"""A run that goes on from an earlier adapter has its whole function at step 0; what would lose some is refused."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.cli import main
from adalora_scale.config import load_config
from adalora_scale.controller import RankAllocator
from adalora_scale.errors import UserError
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.continual import start_from_adapter, svd_form
from adalora_scale.export.peft_adalora import load_adapter
from adalora_scale.training.run import train as train_run
from tests.export.adapters import base_folder, copy, edit_json, export, load, logits, options, train, trained
from tests.sizes import assert_spent

FORMS = {"run": None, "adalora": ["peft-adalora"], "lora": ["peft-lora"], "uniform": ["peft-lora", "--uniform"]}


@pytest.mark.parametrize("kind", ["stories260k", "gpt2", "bert"])
@pytest.mark.parametrize("form", FORMS)
def test_logits_at_step_0_are_the_earlier_adapters_whatever_its_form(request, tmp_path, kind, form):
    """Larger and smaller budgets, another alpha: λ carries the ratio of the scalings."""
    base = base_folder(kind, tmp_path, request)
    expected = logits(trained(base, kind, tmp_path / "run"))
    size = expected.abs().max()
    assert (logits(load(base, kind)) - expected).abs().max() > 1e-2 * size
    if FORMS[form]:
        export(tmp_path / "run", tmp_path / form, "--base", base, "--format", *FORMS[form])
    for r, target, alpha in ((4, 1, 8), (4, 3, 2), (9, 6, 32)):
        config = options(kind, init_r=r, target_r=target, lora_alpha=alpha)
        model = inject_adalora(load(base, kind), config)
        start_from_adapter(model, tmp_path / form)
        assert (logits(model) - expected).abs().max() <= 2e-6 * size
        assert {layer.r for _, layer in adapter_layers(model)} == {r}


@pytest.mark.shows("features", feature="going on from an adapter", engine="one process")
def test_ranks_reopen_and_the_new_budget_is_met(request, tmp_path):
    """New triplets must be able to grow: a factor's gradient needs another one that is not zero."""
    base = base_folder("stories260k", tmp_path, request)
    trained(base, "stories260k", tmp_path / "run")
    old = {name: shape.rank for name, shape in AdapterFile(tmp_path / "run").modules.items()}
    config = options("stories260k", init_r=6, target_r=4)
    model = inject_adalora(load(base, "stories260k"), config)
    start_from_adapter(model, tmp_path / "run")
    for name, layer in adapter_layers(model):
        working = (layer.lora_E != 0) & (layer.lora_B != 0).any(0)
        assert working[: old[name]].all() and not working[old[name] :].any()
        assert layer.lora_A[:, old[name] :].std() > 0.01 and (layer.lora_E[old[name] :] != 0).all()
    allocator = train(model, "stories260k", config)
    new = allocator.ranks()
    assert_spent(new, 4)
    assert any(new[name] > old[name] for name in new)


def test_new_modules_may_join_but_none_may_be_left_out(request, tmp_path):
    """An adapted module that the new run does not know would lose its update without a word."""
    base = base_folder("stories260k", tmp_path, request)
    expected = logits(trained(base, "stories260k", tmp_path / "run", target_modules=["q_proj", "down_proj"]))
    wide = inject_adalora(load(base, "stories260k"), options("stories260k"))
    start_from_adapter(wide, tmp_path / "run")
    assert (logits(wide) - expected).abs().max() <= 2e-6 * expected.abs().max()
    narrow = inject_adalora(load(base, "stories260k"), options("stories260k", target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"down_proj.*adalora\.target_modules"):
        start_from_adapter(narrow, tmp_path / "run")


def test_triplets_that_do_not_fit_are_refused_and_pruned_ones_are_not_counted(request, tmp_path):
    """Cutting by singular values would change the function; triplets with λ = 0 do not carry any."""
    base = base_folder("gpt2", tmp_path, request)
    expected = logits(trained(base, "gpt2", tmp_path / "run"))
    ranks = {name: shape.rank for name, shape in AdapterFile(tmp_path / "run").modules.items()}
    largest = max(ranks, key=ranks.get)
    assert ranks[largest] > 1
    small = inject_adalora(load(base, "gpt2"), options("gpt2", init_r=ranks[largest] - 1, target_r=1))
    with pytest.raises(UserError, match=rf"'{re.escape(largest)}' has {ranks[largest]} .*at least {ranks[largest]}"):
        start_from_adapter(small, tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    for name, rank in ranks.items():  # as a file from before the final allocation: everything is stored
        key = f"base_model.model.{name}.lora_"
        tensors[key + "A"] = torch.cat([torch.ones(9, tensors[key + "A"].shape[1]), tensors[key + "A"]])
        tensors[key + "E"] = torch.cat([torch.zeros(9, 1), tensors[key + "E"]])
        tensors[key + "B"] = torch.cat([torch.ones(tensors[key + "B"].shape[0], 9), tensors[key + "B"]], dim=1)
        assert tensors[key + "E"].shape == (9 + rank, 1)
    save_file(tensors, tmp_path / "run" / "adapter_model.safetensors")
    model = inject_adalora(load(base, "gpt2"), options("gpt2"))
    start_from_adapter(model, tmp_path / "run")
    assert (logits(model) - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_another_base_other_classes_and_a_frozen_head_are_refused(request, tmp_path):
    """Each gives a model that answers, wrongly."""
    base = base_folder("bert", tmp_path, request)
    trained(base, "bert", tmp_path / "run")
    moved = load(base, "bert")
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1.01)
    model = inject_adalora(moved, options("bert"))
    with pytest.raises(UserError, match="another base model"):
        start_from_adapter(model, tmp_path / "run")
    others = {"id2label": {0: "red", 1: "blue", 2: "green"}}
    with pytest.raises(UserError, match="other classes"):
        start_from_adapter(inject_adalora(load(base, "bert", **others), options("bert")), tmp_path / "run")
    frozen = inject_adalora(load(base, "bert"), options("bert", modules_to_save=None))
    with pytest.raises(UserError, match=r"classifier.*adalora\.modules_to_save"):
        start_from_adapter(frozen, tmp_path / "run")
    head = load(base, "bert")
    head.classifier.weight.data.zero_()
    start_from_adapter(inject_adalora(head, options("bert")), tmp_path / "run")
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.equal(head.classifier.weight, saved) and saved.any()


def test_svd_form_is_the_same_product_with_orthonormal_factors():
    """The regulariser expects orthonormal columns; padding must not count as triplets."""
    torch.manual_seed(0)
    a, b = torch.randn(5, 20), torch.randn(30, 5)
    a[4], b[:, 3] = 0, 0
    p, e, q = svd_form(a, b)
    assert (p.shape, e.shape, q.shape) == ((20, 3), (3,), (30, 3))
    torch.testing.assert_close((q * e) @ p.T, b @ a, rtol=1e-5, atol=1e-5)
    for factor in (p, q):
        torch.testing.assert_close(factor.T @ factor, torch.eye(3), rtol=0, atol=1e-6)


@pytest.fixture
def recipe(stories260k, tmp_path):
    """A run of a few steps on the quickstart's rows."""
    rows = "".join(json.dumps({"text": f"Once upon a time there was a dog number {i}."}) + "\n" for i in range(32))
    (tmp_path / "train.jsonl").write_text(rows)
    (tmp_path / "run.yaml").write_text(f"""
model: {{model_name_or_path: {stories260k}, torch_dtype: float32}}
data: {{train: {tmp_path}/train.jsonl, eval_fraction: 0.25, max_length: 32}}
adalora: {{init_r: 3, target_r: 2, lora_alpha: 6, deltaT: 2, tinit: 1, tfinal: 2}}
training: {{max_steps: 8, per_device_train_batch_size: 4, learning_rate: 0.01, logging_steps: 1, use_cpu: true}}
""")
    return tmp_path / "run.yaml"


def test_a_run_goes_on_from_another_ones_adapter(recipe, tmp_path, stories260k):
    """model.adapter_path through the whole program: the second run's first loss is near the first one's last."""
    first = train_run(load_config(recipe, [f"training.output_dir={tmp_path}/one"]))
    changes = [f"training.output_dir={tmp_path}/two", f"model.adapter_path={tmp_path}/one", "adalora.init_r=5",
               "adalora.target_r=3", "training.learning_rate=1e-9", "adalora.orth_reg_weight=0"]  # fmt: skip
    second = train_run(load_config(recipe, changes))
    # Steps of 1e-9 change nothing, and pruned triplets are new ones: the function stays the first run's.
    assert second["final"]["eval_loss"] == pytest.approx(first["final"]["eval_loss"], rel=1e-4)
    fresh = train_run(load_config(recipe, [*changes[2:], f"training.output_dir={tmp_path}/three"]))
    assert fresh["final"]["eval_loss"] > first["final"]["eval_loss"] + 0.01
    assert_spent(second["ranks"], 3)
    one = load_adapter(load(stories260k, "stories260k"), tmp_path / "one")
    two = load_adapter(load(stories260k, "stories260k"), tmp_path / "two")
    assert (logits(two) - logits(one)).abs().max() < 1e-3 * logits(one).abs().max()


def test_mistakes_show_before_rows_are_tokenised(recipe, tmp_path, capsys):
    """A missing folder or an init_r that is too small must not cost an hour of preparation."""
    train_run(load_config(recipe, [f"training.output_dir={tmp_path}/one"]))
    capsys.readouterr()
    out = f"training.output_dir={tmp_path}/two"
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.jsonl").write_text("{")  # whoever prepares these says something else
    for path, more, message in (
        (tmp_path / "none", [], f"model.adapter_path={tmp_path}/none is not a folder"),
        (tmp_path / "empty", [], "no adapter_config.json"),
        (tmp_path / "one", ["adalora.init_r=1", "adalora.target_r=1"], "Set adalora.init_r to at least"),
    ):
        more.append(f"data.train={tmp_path}/rows.jsonl")
        arguments = ["train", "--config", str(recipe), out, f"model.adapter_path={path}", *more]
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    broken = copy(tmp_path / "one", tmp_path / "broken")
    edit_json(broken / "adapter_config.json", peft_type="IA3")
    assert main(["train", "--config", str(recipe), out, f"model.adapter_path={broken}"]) == 2
    assert "'IA3'" in capsys.readouterr().err


def test_allocator_accepts_a_started_model(request, tmp_path):
    """Users of the Python interface call the same function between inject and attach."""
    import adalora_scale

    base = base_folder("gpt2", tmp_path, request)
    trained(base, "gpt2", tmp_path / "run")
    config = options("gpt2", init_r=5)
    model = adalora_scale.inject_adalora(load(base, "gpt2"), config)
    adalora_scale.start_from_adapter(model, tmp_path / "run")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    one_of_each = sum(layer.triplet_size for _, layer in adapter_layers(model))
    assert RankAllocator(model, config, total_step=10).attach(optimizer).budget == 5 * one_of_each
