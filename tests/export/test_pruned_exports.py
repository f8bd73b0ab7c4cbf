"""`adalora-scale export --prune-to`: every form computes the truncated update, of our adapters and of PEFT's LoRA."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainingArguments

from adalora_scale.adalora.adaptables import adaptable_of
from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.checkpoint.format import checkpoints
from adalora_scale.cli import main
from adalora_scale.errors import UserError
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.exporting import export_adapter
from adalora_scale.export.peft_adalora import load_adapter
from adalora_scale.export.pruned_adapter import pruned_adapter
from adalora_scale.export.pruning import Size
from adalora_scale.export.request import Request
from adalora_scale.export.saved_scores import saved_scores
from adalora_scale.training.trainers import AdaLoraTrainer
from tests.adalora import tiny
from tests.export.adapters import (
    assert_same_function,
    base_folder,
    edit_json,
    export,
    load,
    logits,
    options,
    train,
    trained,
)
from tests.export.test_inspection import write_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),
]
FORMS = {
    "adalora": ["peft-adalora"],
    "lora": ["peft-lora"],
    "uniform": ["peft-lora", "--uniform"],
    "merged": ["merged"],
}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LORA = {
    "plain": {"r": 4, "lora_alpha": 8},
    "patterns": {"r": 4, "lora_alpha": 8, "rank_pattern": {"c_fc": 2}, "alpha_pattern": {"h.0.mlp.c_fc": 5}},
    "rslora": {"r": 3, "lora_alpha": 8, "use_rslora": True},
}


def peft_lora(base, kind, folder, **changes):
    """A plain LoRA of PEFT's own with random factors, saved by PEFT."""
    torch.manual_seed(0)
    names = {"gpt2": ["c_attn", "c_fc"], "bert": ["query", "value", "dense"]}[kind]
    heads = {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"} if kind == "bert" else {}
    config = peft.LoraConfig(
        **{"target_modules": names, "init_lora_weights": False, "fan_in_fan_out": kind == "gpt2", **heads, **changes}
    )
    model = peft.get_peft_model(load(base, kind), config)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.data.normal_(std=0.2)
    model.save_pretrained(folder)
    return model.eval()


def truncated(adapter: AdapterFile, budget: int, more: int):
    """Matrix → dense ΔW after the cut, by one SVD of every dense ΔW: another way than the package's."""
    deltas = {n: adapter.update(n).delta(0, s.out_features, transposed=False) for n, s in adapter.modules.items()}
    parts = {name: torch.linalg.svd(delta.double(), full_matrices=False) for name, delta in deltas.items()}
    found = [(-float(s), n, k) for n, (_, values, _) in parts.items() for k, s in enumerate(values) if s > 1e-5]
    kept = {name: torch.zeros_like(delta).double() for name, delta in deltas.items()}
    ranks = dict.fromkeys(kept, 0)
    for sigma, name, k in sorted(found):
        cost = sum(kept[name].shape) + more
        if cost <= budget:
            budget -= cost
            kept[name] -= sigma * torch.outer(parts[name][0][:, k], parts[name][2][k])
            ranks[name] += 1
    lost = sum(float((kept[name] - deltas[name]).square().sum()) for name in kept)
    return kept, ranks, (lost / sum(float(delta.double().square().sum()) for delta in deltas.values())) ** 0.5


@torch.no_grad()
def with_deltas(model, deltas, adapter):
    """The base with ΔW added to its weights and the head copied."""
    for name, delta in deltas.items():
        layer = model.get_submodule(name)
        layer.weight += (delta.T if adaptable_of(layer).is_transposed(layer) else delta).float()
    for name in adapter.others:
        dict(model.named_parameters())[name].copy_(adapter.other(name))
    return logits(model)


def check_forms(run, base, kind, out, forms, share, more, capsys):
    adapter = AdapterFile(run)
    whole = sum(s.rank * (s.in_features + s.out_features + more) for s in adapter.modules.values())
    budget = int(whole * share)
    deltas, ranks, error = truncated(adapter, budget, more)
    spent = sum(r * (adapter.modules[n].in_features + adapter.modules[n].out_features + more) for n, r in ranks.items())
    assert 0 < spent <= budget
    expected = with_deltas(load(base, kind), deltas, adapter)
    for name in forms:
        measured = name == "lora" or share == 0.2
        form = [*FORMS[name], "--fidelity" if measured else "--no-fidelity"]
        report = export(run, out / name, "--base", base, "--format", *form, "--prune-to", budget, capsys=capsys)
        assert report["pruning"]["kept"] == ranks
        assert (report["pruning"]["parameters_before"], report["pruning"]["parameters"]) == (whole, spent)
        assert report["pruning"]["relative_error"] == pytest.approx(error, rel=1e-4)
        assert json.loads((out / name / "export.json").read_text()) == report
        if name == "merged":
            got = load(out / name, kind)
        else:
            got = peft.PeftModel.from_pretrained(load(base, kind), out / name)
        assert_same_function(got, expected, load(base, kind))
        if measured:
            assert report["fidelity"]["relative"] < 1e-5 < report["pruning"]["fidelity"]["relative"]
        if name == "lora":
            left_out = [n for n, r in ranks.items() if r == 0]
            assert sorted(report["left_out"]) == sorted(left_out)
            stored = [t.numel() for key, t in load_file(out / name / WEIGHTS).items() if "lora_" in key]
            assert sum(stored) == spent - more * sum(ranks.values())
    return ranks


@pytest.mark.shows(
    "exports", form=("peft-adalora", "peft-lora", "peft-lora --uniform", "merged"), of="cut by --prune-to"
)
@pytest.mark.parametrize("share", [0.2, 0.6])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_every_form_of_our_adapters_computes_the_truncated_update(request, tmp_path, capsys, kind, share):
    """Else a cut adapter is not the best of its size, or loses its scale or its head on the way into the form."""
    base = base_folder(kind, tmp_path, request)
    trained(base, kind, tmp_path / "run")
    ranks = check_forms(tmp_path / "run", base, kind, tmp_path, FORMS, share, 1, capsys)
    assert len(set(ranks.values())) > 1
    if share == 0.2:
        assert 0 in ranks.values()
    again = load_adapter(load(base, kind), tmp_path / "adalora")  # our own reader takes it too
    expected = logits(peft.PeftModel.from_pretrained(load(base, kind), tmp_path / "lora"))
    assert_same_function(again, expected, load(base, kind))


@pytest.mark.shows(
    "exports", form=("peft-lora", "merged", "rank-pattern"), of=("plain LoRA of PEFT", "cut by --prune-to")
)
@pytest.mark.parametrize("name", LORA)
def test_plain_lora_of_others_is_cut_with_peft_s_scaling(request, tmp_path, capsys, name):
    """Singular values of B A alone, without alpha / r or alpha / √r, would keep the wrong triplets."""
    base = base_folder("gpt2", tmp_path, request)
    peft_lora(base, "gpt2", tmp_path / "run", **LORA[name])
    check_forms(tmp_path / "run", base, "gpt2", tmp_path, ["lora", "merged"], 0.25, 0, capsys)
    report = export(
        tmp_path / "run", tmp_path / "pattern", "--format", "rank-pattern", "--prune-to", "50%", capsys=capsys
    )
    assert report["scalings"] == {n: pytest.approx(AdapterFile(tmp_path / "run").scaling(n)) for n in report["ranks"]}


def test_heads_of_a_plain_lora_travel_along(request, tmp_path, capsys):
    """A classifier without its trained head answers at random."""
    base = base_folder("bert", tmp_path, request)
    peft_lora(base, "bert", tmp_path / "run", r=4, lora_alpha=8)
    assert AdapterFile(tmp_path / "run").others
    check_forms(tmp_path / "run", base, "bert", tmp_path, ["lora", "merged"], 0.4, 0, capsys)


@pytest.mark.parametrize("method", ["ours", "lora"])
def test_embeddings_and_convolutions_are_cut_like_matrices(tmp_path, method):
    """Their factors have shapes and names of their own in files."""
    model, run = tiny.mixed(), tmp_path / "run"
    targets = ["words", "wide", "along", "pointwise", "out"]
    if method == "ours":
        from tests.export.test_adaptables_export import saved

        saved(model, run, targets)
    else:
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False))
        adapted.save_pretrained(run)
    adapter = AdapterFile(run)
    whole = sum(s.rank * (s.in_features + s.out_features + (method == "ours")) for s in adapter.modules.values())
    deltas, ranks, _ = truncated(adapter, whole // 2, int(method == "ours"))
    with pruned_adapter(adapter, Size(str(whole // 2)), by="singular-values", source=run) as (cut, figures):
        assert figures.kept == ranks
        for name, shape in cut.modules.items():
            assert shape.form == adapter.modules[name].form
            got = cut.update(name).delta(0, shape.out_features, transposed=False)
            torch.testing.assert_close(got.double(), deltas[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["100%", "100000000"])
def test_more_than_there_is_changes_nothing_and_says_so(request, tmp_path, capsys, text):
    """A script over many adapters must not fail on, or touch, those that are small enough."""
    base = base_folder("gpt2", tmp_path, request)
    trained(base, "gpt2", tmp_path / "run")
    form = ["--base", base, "--format", "peft-lora", "--no-fidelity"]
    export(tmp_path / "run", tmp_path / "plain", *form)
    report = export(tmp_path / "run", tmp_path / "out", *form, "--prune-to", text, capsys=capsys)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()
    assert any("nothing was pruned" in note for note in report["notes"])
    assert report["pruning"]["relative_error"] == 0 and report["pruning"]["kept"] == report["ranks"]


def refused(capsys, run, out, *arguments) -> str:
    capsys.readouterr()
    assert main(["export", str(run), str(out), *map(str, arguments)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and not out.exists()
    return lines[0]


def test_what_cannot_be_cut_is_refused_in_one_line(request, tmp_path, capsys):
    """Half of a triplet cannot be kept, and a rule that cannot be followed must not become another one."""
    base, run, out = base_folder("gpt2", tmp_path, request), tmp_path / "run", tmp_path / "out"
    trained(base, "gpt2", run)
    form = ["--format", "peft-lora"]
    for arguments, message in (
        (["--prune-to", "10"], "has 65, the fewest of all"),
        (["--prune-to", "0.01%"], "allows 0 parameters"),
        (["--prune-to", "half"], "--prune-to is 'half'"),
        (["--by", "scores"], "--by belongs to --prune-to"),
        (["--prune-to", "50%", "--by", "taste"], "choose singular-values or scores"),
        (["--prune-to", "50%", "--by", "scores"], "holds no scores, an adapter has none"),
        (["--prune-to", "100%", "--by", "scores"], "holds no scores, an adapter has none"),
    ):
        assert message in refused(capsys, run, out, *form, *arguments)
    export(run, out, *form, "--prune-to", "65", "--no-fidelity")  # exactly one triplet
    assert sum(t.numel() for t in load_file(out / WEIGHTS).values()) == 64
    tensors = load_file(run / WEIGHTS)
    save_file({k: v * (not k.endswith("lora_E")) for k, v in tensors.items()}, run / WEIGHTS)
    assert "every update is zero" in refused(capsys, run, tmp_path / "zero", *form, "--prune-to", "50%")


def test_another_base_is_refused_after_pruning_too(request, tmp_path, capsys):
    """A plain LoRA that lost matrices has no fingerprint of them any more: it is the whole adapter that is compared."""
    base = base_folder("gpt2", tmp_path, request)
    trained(base, "gpt2", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "lora", "--base", base, "--format", "peft-lora")
    other = load(base, "gpt2")
    other.transformer.h[1].mlp.c_proj.weight.data.add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    for source in ("run", "lora"):
        form = ["--base", tmp_path / "other", "--format", "merged", "--prune-to", "10%"]
        assert "weights differ" in refused(capsys, tmp_path / source, tmp_path / "out", *form)


OPTIONS = {
    "use_dora": True,
    "bias": "lora_only",
    "lora_bias": True,
    "use_bdlora": {"nblocks": 2},
    "alora_invocation_tokens": [3],
    "trainable_token_indices": [1, 2],
    "target_parameters": ["mlp.experts"],
    "init_lora_weights": "pissa_niter_4",
    "alpha_pattern": {"c_fc": 0},
}


@pytest.mark.parametrize("key", OPTIONS)
def test_lora_that_is_more_than_a_product_is_refused_by_its_key(request, tmp_path, capsys, key):
    """Else its function is cut as if it were W + s · B A, and what it was is lost in silence."""
    base = base_folder("gpt2", tmp_path, request)
    peft_lora(base, "gpt2", tmp_path / "run", r=2)
    edit_json(tmp_path / "run" / CONFIG, **{key: OPTIONS[key]})
    for form in ("peft-lora", "rank-pattern"):
        assert key in refused(capsys, tmp_path / "run", tmp_path / "out", "--format", form, "--prune-to", "50%")


class Scores(TrainerCallback):
    """Remembers what the allocator itself says at a checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        allocator = self.trainer.allocator
        self.scores = dict(zip(allocator.modules, allocator._scores().view(-1, allocator.r).clone(), strict=True))


@pytest.mark.parametrize("score", ["sensitivity_uncertainty", "taylor"])
def test_scores_are_those_of_the_run(tmp_path, capsys, score):
    """Else `--by scores` ranks triplets by something that only looks like the run's own importance."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 60, (24, 12), generator=generator).tolist()]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=10, save_strategy="steps", save_steps=5, per_device_train_batch_size=4,
        use_cpu=True, report_to=[], learning_rate=1e-2, disable_tqdm=True, save_total_limit=None,
    )  # fmt: skip
    config = options("gpt2", tinit=1, tfinal=2, deltaT=2, score=score)
    seen = []

    class Watch(Scores):
        def on_save(self, args, state, control, **kwargs):
            if not self.trainer.allocator.frozen:
                super().on_save(args, state, control, **kwargs)
                seen.append(state.global_step)

    watch = Watch()
    watch.trainer = AdaLoraTrainer(
        tiny.gpt2(), args=arguments, train_dataset=rows, adalora_config=config, callbacks=[watch]
    )
    watch.trainer.train()
    assert seen == [5]
    later, early = checkpoints(tmp_path / "run")
    scores = saved_scores(early)
    assert scores.keys() == watch.scores.keys()
    for name, value in scores.items():
        torch.testing.assert_close(value, watch.scores[name], rtol=1e-5, atol=0)
    assert len({float(s) for value in scores.values() for s in value}) > 20
    with pytest.raises(UserError, match="not kept after the final allocation"):
        saved_scores(later)

    export(early, tmp_path / "all", "--format", "peft-lora", "--no-fidelity")
    whole = AdapterFile(tmp_path / "all")
    request = Request(
        adapter=early, output=tmp_path / "out", format="peft-adalora", prune_to="40%", by="scores", fidelity=False
    )
    report = export_adapter(request)
    assert report["pruning"]["parameters"] <= report["pruning"]["budget"]
    assert report["pruning"]["by"] == "scores" and 0 < report["pruning"]["relative_error"] < 1
    pruned, lost, size = AdapterFile(tmp_path / "out"), 0.0, 0.0
    assert pruned.final
    for name, shape in pruned.modules.items():
        places = [k for k, kept in enumerate(pruned.config["rank_pattern"][f"{name}.lora_E"]) if kept]
        assert len(places) == shape.rank == report["pruning"]["kept"][name]
        dense = [f.update(name).delta(0, shape.out_features, transposed=False).double() for f in (whole, pruned)]
        assert shape.rank == 0 or min(scores[name][places]) >= max(
            [s for k, s in enumerate(scores[name]) if k not in places], default=0
        )
        lost += float((dense[0] - dense[1]).square().sum())
        size += float(dense[0].square().sum())
    assert report["pruning"]["relative_error"] == pytest.approx((lost / size) ** 0.5, rel=1e-4)


@pytest.mark.shows("exports", form="peft-adalora", of="checkpoint-N")
def test_a_checkpoint_is_cut_by_singular_values_before_its_end(request, tmp_path, capsys):
    """A run that was killed leaves init_r triplets of every matrix; cut, its ranks are settled."""
    base, config = base_folder("gpt2", tmp_path, request), options("gpt2")
    torch.manual_seed(0)
    model = inject_adalora(load(base, "gpt2"), config)
    allocator = train(model, "gpt2", config, steps=6)
    folder = tmp_path / "checkpoint-6"
    write_checkpoint(model, allocator, folder, base, frozen=False)
    report = export(folder, tmp_path / "out", "--format", "peft-adalora", "--prune-to", "50%", capsys=capsys)
    adapter = AdapterFile(tmp_path / "out")
    assert adapter.final and not any("final allocation" in note for note in report["notes"])
    assert [s.rank for s in adapter.modules.values()] == list(report["pruning"]["kept"].values())
    assert report["pruning"]["triplets_before"] == sum(layer.r for _, layer in adapter_layers(model))
    assert report["fidelity"]["relative"] < 1e-5
    assert "holds no 'sensitivity'" in refused(
        capsys, folder, tmp_path / "no", "--format", "peft-lora", "--prune-to", "50%", "--by", "scores"
    )


def test_the_screen_says_what_was_cut(request, tmp_path, capsys):
    """Someone decides by it whether the smaller adapter is worth it."""
    base = base_folder("gpt2", tmp_path, request)
    trained(base, "gpt2", tmp_path / "run")
    form = ["--base", base, "--format", "peft-lora", "--uniform", "--prune-to", "50%"]
    assert main(["export", str(tmp_path / "run"), str(Path(tmp_path / "out")), *map(str, form)]) == 0
    text = capsys.readouterr().out
    for words in ("pruned by singular values: ", "relative error of the updates 0.", "against the adapter before"):
        assert words in text
    assert "zero-padding to one rank gives the file" in text
