"""A URL where a folder is written: refused in one line, or hours of training lie in a folder `s3:` of one machine."""

import pytest
import yaml

from adalora_scale.cli import main, train_main
from adalora_scale.errors import UserError
from adalora_scale.training.arguments import convert_training_section
from tests.training.short_run import config

URLS = ("s3://bucket/run", "gs://bucket/run", "file:///tmp/run", "s3:/bucket/run")


@pytest.mark.parametrize("url", URLS)
def test_the_training_section_names_the_key_and_the_one_for_stores(url, tmp_path):
    with pytest.raises(UserError, match=rf"training\.output_dir={url} is a URL.*name a folder.*training\.output_store"):
        convert_training_section(config(tmp_path, f"training.output_dir={url}"))


def test_paths_with_colons_are_paths(tmp_path):
    """Times of day stand in names of runs."""
    for path in ("runs/12:30", "c:/runs", "runs/s3://x"):
        assert convert_training_section(config(tmp_path, f"training.output_dir={path}"))["output_dir"] == path


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("training.output_dir", lambda file: train_main(["--config", file, "--skip-preflight"])),
        ("--output", lambda file: main(["sweep", "--config", file, "--output", "s3://bucket/sweep"])),
        ("OUT", lambda file: main(["quantize", "model", "s3://bucket/base"])),
    ],
    ids=["train", "sweep", "quantize"],
)
def test_verbs_that_write_refuse_it_and_make_nothing(name, call, tmp_path, monkeypatch, capsys, stories260k):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(stories260k)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    output_dir = "s3://bucket/run" if name == "training.output_dir" else "out"
    tree = {
        "model": {"model_name_or_path": "model"},
        "data": {"train": "rows.jsonl", "eval": "rows.jsonl"},
        "training": {"output_dir": output_dir, "max_steps": 4},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    assert call("run.yaml") == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(said) == 1 and f"{name}=s3:/" in said[0] and "is a URL" in said[0], said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "rows.jsonl", "run.yaml"]
