"""One export, from an adapter folder to a folder that others load, with a report of what was done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adalora_scale.adalora.adaptables import adaptable_of
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.adapter_record import UNFINISHED
from adalora_scale.export.base_checkpoint import BaseCheckpoint, local_base, rows_in
from adalora_scale.export.dequantise import Dequantised, dequantised_weights, refuse_quantised
from adalora_scale.export.fidelity import NotMeasurable
from adalora_scale.export.from_checkpoint import adapter_folder
from adalora_scale.export.measuring import measure, num_labels, samples, why_not_measured
from adalora_scale.export.merge import Plan, check_same_base, plan_merge
from adalora_scale.export.model_card import card_text, command_line, ranks_said, write_card
from adalora_scale.export.model_folder import shard_bytes, write_companions, write_model
from adalora_scale.export.output import Withdrawn, aside, output_folder
from adalora_scale.export.peft_forms import write_peft_adalora, write_peft_lora
from adalora_scale.export.pruned_adapter import SINGULAR_VALUES, Pruning, pruned_adapter
from adalora_scale.export.rank_pattern import write_rank_pattern
from adalora_scale.export.record import write_record
from adalora_scale.export.request import Request


def export_adapter(request: Request) -> dict[str, Any]:
    """Write the adapter (or a checkpoint's) in the asked form and return the report, which `export.json` holds too.

    Raises:
        UserError: the adapter or the base cannot be read, do not belong together, or the output folder is taken.
        Unsupported: the adapter, the base's architecture or its storage is not supported in this form.
    """
    with adapter_folder(request.adapter) as folder:
        whole, by = AdapterFile(folder), request.by or SINGULAR_VALUES
        with pruned_adapter(whole, request.size, by=by, source=request.adapter) as (adapter, pruning):
            return _export(request, adapter, whole, pruning)


def _export(request: Request, adapter: AdapterFile, whole: AdapterFile, pruning: Pruning | None) -> dict[str, Any]:
    base = _base(request, whole)
    if base is not None:
        adapter.require_own_copies(base.tensor)  # of a pruned one
    report: dict[str, Any] = {
        "format": request.format + (" --uniform" if request.uniform else ""),
        "adapter": str(request.adapter),
        "output": str(request.output),
        "base": str(request.base or adapter.base),
        "notes": [],
    }
    if adapter.unfinished is not None:
        report["unfinished"] = adapter.unfinished
        report["notes"].append(f"the adapter is unfinished: {UNFINISHED[adapter.unfinished]}")
    if base is not None and base.grown:
        report["vocabulary"], old = rows_in(base), next(iter(base.grown.values()))
        if request.format.startswith("peft"):
            report["notes"].append(
                f"the adapter has {report['vocabulary']} embeddings and the base {old}: before PEFT opens it, call "
                f"base.resize_token_embeddings({report['vocabulary']})"
            )
    if pruning is not None:
        report |= {"pruning": pruning.as_dict(), "pruning_text": str(pruning)}
        if adapter is whole:
            report["notes"].append(
                f"--prune-to {request.prune_to} allows {pruning.budget:,} parameters and the adapter has "
                f"{pruning.parameters_before:,}: nothing was pruned"
            )
    reason = why_not_measured(request, adapter, base)
    batches = [] if reason or base is None else samples(request, adapter, base)
    quantised: Dequantised | None = None
    plan: Plan | None = None
    if request.format == "merged":
        if base is None:
            raise UserError("--format merged needs the base model; name it with --base.")
        quantised = dequantised_weights(adapter, base) if request.dequantise else None
        if quantised is None:
            refuse_quantised(base)
        plan = plan_merge(adapter, base, quantised)
    inputs = [request.adapter, *([base.directory] if base else [])]
    needed = sum(tensor.size for tensor in plan.tensors) if plan else 0
    with output_folder(request.output, overwrite=request.overwrite, inputs=inputs, needed_bytes=needed) as folder:
        if plan is not None and base is not None:
            _merge(request, adapter, base, plan, quantised, report, folder)
        else:
            _rearrange(request, adapter, base, report, folder)
        fidelity = None
        try:
            if batches and base is not None:
                fidelity = measure(request, adapter, base, quantised, batches, folder)
        except NotMeasurable as error:
            reason = str(error)
        if fidelity and base is not None and adapter is not whole:
            # Whether the form is right is a question to the pruned adapter; what pruning costs, to the one it was.
            cost = measure(request, whole, base, quantised, batches, folder, form_of=adapter)
            report["pruning"]["fidelity"] = cost.as_dict()
            report["pruning_text"] += f"\nagainst the adapter before pruning, {cost}"
        report["fidelity"] = fidelity.as_dict() if fidelity else None
        report["fidelity_text"] = str(fidelity) if fidelity else f"fidelity: not measured ({reason})"
        report["failed"] = fidelity is not None and not fidelity.faithful
        kept: Path | None = None
        if fidelity is not None and report["failed"]:
            kept = aside(request.output) if request.format == "merged" else None
            where = f"what was merged is in {kept}" if kept else "--no-fidelity writes it unmeasured"
            report["what"] = (
                f"{request.output} was not written: the form differs from the adapter by {fidelity.unexplained:.2g} in "
                f"a logit where {fidelity.allowed:.2g} is allowed (the adapter changes {fidelity.adapter_effect:.2g}; "
                f"{where})"
            )
            if kept is None:
                raise Withdrawn
        _write_card(request, adapter, report, folder)
        report.update(write_record(folder, report))
        if kept is not None:
            raise Withdrawn(kept)
    return report


def _write_card(request: Request, adapter: AdapterFile, report: dict[str, Any], folder: Path) -> None:
    """Write the model card where the form's users look for one; a rank pattern is no model."""
    if request.format == "rank-pattern":
        return
    ranks = report.get("ranks") or {name: shape.rank for name, shape in adapter.modules.items()}
    table = {"base model": str(report["base"]), "form": str(report["format"]), "ranks": ranks_said(ranks)}
    if fidelity := report.get("fidelity_text"):
        table["compared with the adapter"] = str(fidelity)
    text = card_text(
        title=Path(request.output).name,
        base=report["base"],
        task=adapter.task,
        merged=request.format == "merged",
        datasets=[],
        table=table | {"command": command_line()},
        notes=report["notes"],
    )
    write_card(folder, text)


def _base(request: Request, adapter: AdapterFile) -> BaseCheckpoint | None:
    """Open the base model, and see that the adapter belongs to it; PEFT's forms can do without one."""
    name = request.base or adapter.base
    needed = request.format == "merged" or request.base is not None or request.fidelity
    if name is None:
        if needed:
            raise UserError("the adapter does not name its base model; say where it is with --base.")
        return None
    try:
        base = BaseCheckpoint(
            local_base(name, None if request.base else adapter.config.get("revision")),
            task=adapter.task,
            num_labels=num_labels(adapter),
            held=adapter.others,
            trust_remote_code=request.trust_remote_code,
        )
    except (UserError, Unsupported):
        if needed:
            raise
        return None
    check_same_base(adapter, base)
    return base


def _rearrange(
    request: Request, adapter: AdapterFile, base: BaseCheckpoint | None, report: dict[str, Any], folder: Path
) -> None:
    pruned: dict[str, int] = report.get("pruning", {}).get("kept", {})
    names = {*pruned, *(name for name, _ in base.model.named_modules())} if base else set(pruned)
    model = base.model if base else None
    if request.format == "peft-adalora":
        report |= write_peft_adalora(adapter, folder, base=request.base)
        what = "PEFT AdaLoRA"
    elif request.format == "rank-pattern":
        _refuse_other_function(adapter, base)
        report |= write_rank_pattern(adapter, folder, base=request.base, names=names, model=model)
        what = f"a LoraConfig of the learnt ranks, {report['parameters']:,} parameters to train, no weights"
    else:
        _refuse_other_function(adapter, base)
        report |= write_peft_lora(
            adapter, folder, base=request.base, uniform=request.uniform, rank=request.rank, names=names, model=model,
            own_tensors=base.expert_tensors() if base else None,
        )  # fmt: skip
        what = "plain LoRA, zero-padded to one rank" if request.uniform else "plain LoRA, a rank for every matrix"
    if "left_out" in report:  # a pruned plain LoRA does not name them any more
        report["left_out"] += [name for name in pruned if name not in adapter.modules]
    ranks = report["ranks"].values()
    report["what"] = f"{request.output}: {what}; {len(ranks)} matrices, ranks {min(ranks)} to {max(ranks)}"
    report["notes"] += _notes(request, adapter, report)


def _notes(request: Request, adapter: AdapterFile, report: dict[str, Any]) -> list[str]:
    """Say what is not in the form, or is more than was asked for."""
    notes = []
    if left_out := report.get("left_out"):
        names = f": {', '.join(left_out)}" if request.format == "rank-pattern" else ""
        notes.append(f"{len(left_out)} matrices have rank 0 and are left out, PEFT's LoRA has none{names}")
    if served := report.get("served"):
        notes.append(
            f"{served} tensors of experts have a LoRA each, as vLLM reads it; PEFT opens the form without --uniform"
        )
    if stacks := report.get("experts"):
        dropout = ", and PEFT has no lora_dropout for those, in any layer" if adapter.config.get("lora_dropout") else ""
        notes.append(
            f"{len(stacks)} tensors of experts stand in target_parameters, where PEFT has one rank for all experts of "
            f"one: the largest, the others padded with zeros{dropout}"
        )
    if as_parameters := report.get("as_parameters"):
        dropout = " and without lora_dropout" if adapter.config.get("lora_dropout") else ""
        notes.append(
            f"{len(as_parameters)} matrices stand in target_parameters{dropout}, because PEFT would take them for "
            f"experts of the model in target_modules; PEFT 0.17 and later read that"
        )
    if request.format == "rank-pattern":
        if adapter.method == "LORA" and adapter.record:
            notes.append("the adapter is plain LoRA with λ and the run's scale folded in: its scale is not the run's")
        if len(set(report["scalings"].values())) > 1:
            notes.append("the adapter's matrices have different scalings, and so has the LoraConfig")
    if request.uniform and adapter.others:
        notes.append("servers such as vLLM take no modules_to_save; this adapter has some")
    if request.uniform and request.prune_to:
        padded = sum(report["ranks"][n] * (m.in_features + m.out_features) for n, m in adapter.modules.items())
        notes.append(f"zero-padding to one rank gives the file {padded:,} parameters, whatever --prune-to allows")
    return notes


def _refuse_other_function(adapter: AdapterFile, base: BaseCheckpoint | None) -> None:
    """Refuse settings of an adapted layer under which PEFT's LoRA would compute something else."""
    if base is None:
        return
    of_experts = {name for matrices in adapter.stacks.values() for name in matrices}
    for name in adapter.modules.keys() - of_experts:
        layer = base.model.get_submodule(name)
        if (reason := adaptable_of(layer).why_not_peft(layer)) is not None:
            raise Unsupported(f"'{name}' cannot be exported for PEFT: {reason}. Use --format merged.")


def _merge(
    request: Request,
    adapter: AdapterFile,
    base: BaseCheckpoint,
    plan: Plan,
    quantised: Dequantised | None,
    report: dict[str, Any],
    folder: Path,
) -> None:
    report |= write_model(plan, folder, max_shard_bytes=shard_bytes(request.max_shard_size))
    dtype = quantised.dtypes()[0] if quantised and base.quantization else None
    write_companions(adapter, base, plan, folder, dtype)
    into = quantised.said if quantised else f"the weights of {base.directory}, in their own dtype"
    heads = f", {len(plan.replaced)} tensors trained in full replaced" if plan.replaced else ""
    report["merged"], report["replaced"] = plan.merged, plan.replaced
    report["what"] = f"{request.output}: {len(plan.merged)} matrices merged into {into}{heads}"
    if plan.untied:
        report["notes"].append(
            "the adapter is on one side of the tie between output head and embedding, so they are no longer tied"
        )
    if quantised is None and (trained := adapter.record.get("quantisation")):
        report["notes"].append(
            f"the adapter was trained on the {trained.get('quant_type')} values of its base; these are the original "
            f"ones, so the result differs from training by the quantisation error (--dequantise keeps it)"
        )
