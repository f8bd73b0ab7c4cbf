"""docs/api.md names every public call on adapters in memory; tests/test_readme.py runs its code."""

import re

import adalora_scale
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text()


def test_calls_named_on_the_page_are_public():
    """Else the page and the package drift apart."""
    named = set(re.findall(r"`(?:with )?(\w+)\(", PAGE))
    assert named <= set(adalora_scale.__all__)
    memory = {name for name, home in adalora_scale._HOME.items() if home in ("export.in_memory", "export.switching")}
    assert memory <= named
