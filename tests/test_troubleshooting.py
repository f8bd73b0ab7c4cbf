"""docs/troubleshooting.md quotes what the package says."""

import ast
import re

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SHORTEST = 8  # letters of a fixed part; less would be found anywhere


def quoted(page):
    """Return the messages in the first columns of the tables under `| message |`."""
    found = []
    for table in re.findall(r"^\| message \|.*\n\|---\|---\|\n((?:\|.*\n)+)", page, flags=re.M):
        found += re.findall(r"^\| `(.+?)` \| ", table, flags=re.M)
    return found


@pytest.fixture(scope="module")
def said():
    """Every text of the package's sources, what is filled in at run time as a NUL."""
    texts = set()
    for path in (ROOT / "adalora_scale").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                texts.add("".join(str(p.value) if isinstance(p, ast.Constant) else "\0" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
                texts.add(re.sub(r"\{\w*\}|%[sd]", "\0", node.value))
    return texts


def is_said(message, texts):
    """Whether the fixed parts of a message stand in one text in their order, with something filled in between."""
    parts = [re.escape(part) for part in re.split("…", message)]
    pattern = re.compile(r"[^\0]*\0.*".join(parts) if len(parts) > 1 else parts[0], flags=re.S)
    return any(pattern.search(text) for text in texts)


def test_the_page_quotes_messages():
    """The check below would pass on a page in which it finds nothing, or parts so short that any text has them."""
    found = quoted(PAGE)
    assert len(found) > 50 and len(set(found)) == len(found)
    assert [message for message in found if len(max(re.split("…", message), key=len)) < SHORTEST] == ["hang: …"]


def test_quoted_messages_are_said(said):
    """A message that was reworded would be looked for in vain."""
    assert [message for message in quoted(PAGE) if not is_said(message, said)] == []


def test_a_message_that_nobody_says_is_found(said):
    """Else the test above passes on anything."""
    assert is_said("unknown key '…'.", said)
    assert not is_said("unknown key '…' here", said) and not is_said("unknown key …'…'…", said)
    assert not is_said("the model has no AdaLoRA … layers", said)  # nothing is filled in there
