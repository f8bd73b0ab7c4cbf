"""docs/api.md: its loop runs, and it names every public call."""

import re
import subprocess
import sys

import adalora_scale
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text()


def test_the_loop_of_the_page_trains_and_saves(tmp_path):
    """Else the first thing a reader copies fails."""
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "RankAllocator(" in code]
    code = block.replace('"launch/quickstart', f'"{ROOT}/launch/quickstart')
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "unfinished" not in done.stderr and "q_proj" in done.stdout
    assert (tmp_path / "runs" / "by_hand" / "adapter_config.json").is_file()


def test_calls_named_on_the_page_are_public():
    """Else the page and the package drift apart."""
    named = set(re.findall(r"`(?:with )?(\w+)\(", PAGE))
    assert named <= set(adalora_scale.__all__)
    memory = {name for name, home in adalora_scale._HOME.items() if home in ("export.in_memory", "export.switching")}
    assert memory <= named
