"""`price.py`: what it counts on a shape that takes seconds, and the page that shows what it measured."""

import json
import re

from tests.benchmarks.test_benchmarks import ROOT, run

RESULTS = ROOT / "benchmarks" / "results"
MEASURED = RESULTS / "price_2_cores_cpu.json"
PAGE = ROOT / "docs" / "benchmarks.md"


def test_the_price_of_a_step_at_a_tiny_shape(tmp_path):
    """Every method trains, PEFT's over bitsandbytes' own layers; counts are in order whatever the machine."""
    output = tmp_path / "price.json"
    done = run("price.py", "--shapes", "seconds", "--bases", "4bit", "--rounds", 2, "--ranks", 0, "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(output.read_text())
    assert [one["base"] for one in figures["tables"]] == ["4bit"]
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", figures["commit"])
    for one in figures["tables"]:
        methods = one["methods"]
        assert len(methods) == 10 and all(len(m["step_seconds"]) == 2 for m in methods.values())
        work = {name: m["step"]["operations"] for name, m in methods.items()}
        assert (
            work["the base alone"]
            < work["ours, no allocator"]
            < work["ours"]
            < work["ours, paper"]
            < work["AdaLoRA (PEFT)"]
        )
        assert methods["ours"]["step"]["reads"] == methods["ours, no allocator"]["step"]["reads"] + 1
        assert (
            methods["ours, resumed"]["trained_parameters"] <= methods["LoRA (PEFT), half"]["trained_parameters"] * 1.02
        )
        ratio = one["ratios"]["ours / ours, no allocator"]
        assert ratio["low"] <= ratio["median"] <= ratio["high"]


def test_the_page_shows_what_was_measured():
    """Else docs/benchmarks.md keeps the figures of a measurement that nobody has."""
    page = PAGE.read_text("utf-8")
    shown = run("price.py", "--show", MEASURED).stdout.strip()
    assert shown.count("\n|") > 25 and shown in page
    for name in ("ours / ours, no allocator", "ours / LoRA (PEFT)"):
        assert f"| {name} | {in_words(MEASURED, name)} |" in page


def in_words(file, name):
    """A ratio of the file's first table; the file is of a state of the project, with nothing changed in it."""
    written = json.loads(file.read_text("utf-8"))
    assert re.fullmatch(r"[0-9a-f]{12}", written["commit"]) and written["commit"] in PAGE.read_text("utf-8")
    ratio = written["tables"][0]["ratios"][name]
    return f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def test_a_file_that_is_no_measurement_is_named():
    """Else a wrong path is a traceback, or an empty page."""
    for file in ("README.md", "no/such/file.json"):
        done = run("price.py", "--show", file)
        assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(f"error: --show: {file} is not what --output writes")
