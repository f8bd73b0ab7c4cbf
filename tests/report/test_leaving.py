"""The report that a run leaves, whoever trains; and the images that TensorBoard gets."""

import json
import subprocess
import sys

from adalora_scale.report import writing
from adalora_scale.training.reporting import leave_report
from adalora_scale.training.run import train
from tests.report.runs import matrices, write_run
from tests.training.short_run import config


def test_a_run_leaves_its_report_and_tensorboard_its_heat_map(tmp_path, monkeypatch):
    """The two places where people look after a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("ADALORA_REPORT", "1")
    train(config(tmp_path / "out", "training.report_to=tensorboard", "training.save_steps=14"))
    assert f"{tmp_path / 'out'}: finished" in (tmp_path / "out" / "report.html").read_text()
    folders = {path.parent for path in (tmp_path / "out").rglob("events.out.tfevents.*")}
    assert len(folders) == 1
    events = EventAccumulator(str(folders.pop()))
    events.Reload()
    assert events.Tags()["images"] == ["adalora/ranks"]
    (image,) = events.Images("adalora/ranks")
    assert image.step == 14 and image.width > 200 and image.encoded_image_string.startswith(b"\x89PNG")
    assert "train/adalora/budget" in events.Tags()["scalars"]


def test_a_report_that_fails_takes_nothing_with_it(tmp_path, monkeypatch, capsys):
    """The run is over and its adapter is there: an error now would look as if it had failed."""
    folder = write_run(tmp_path / "run", matrices(1))
    monkeypatch.setenv("ADALORA_REPORT", "1")
    (folder / "ranks.jsonl").write_text("damaged\n")
    leave_report(folder)
    said = capsys.readouterr().err
    assert said.startswith("note: report.html is not complete (UserError: ") and said.count("\n") == 1
    assert f"`adalora-scale report {folder}`" in said and not (folder / "report.html").exists()
    monkeypatch.setenv("ADALORA_REPORT", "0")
    leave_report(folder)
    assert capsys.readouterr().err == ""


def test_nothing_of_it_slows_the_start():
    """Refusals and --help answer at once; plotting loads when a report is drawn."""
    script = "import sys, adalora_scale.cli as c; c._parser(); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"import json; {script}"], capture_output=True, text=True, check=True)
    heavy = {"matplotlib", "jinja2", "numpy", "rich", "torch"}
    assert heavy.isdisjoint(json.loads(done.stdout)), heavy & set(json.loads(done.stdout))
    assert writing.MOST_RUNS >= 3
