"""Links from page to page: a page or a heading that was renamed would leave readers at a 404."""

import re

import pytest

from tests.conftest import ROOT
from tests.test_packaging import project_files
from tests.test_readme import FENCE

LINK = re.compile(r"\]\(([^()\s]+)\)|\b(?:src|href)=\"([^\"]+)\"")


def anchors(text):
    """Return the anchors of a page's headings, as GitHub makes them."""
    found, seen = set(), {}
    for heading in re.findall(r"^#{1,6} +(.+?) *$", FENCE.sub("", text), flags=re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = seen[name] = seen.get(name, -1) + 1
        found.add(f"{name}-{number}" if number else name)
    return found


def broken(path, text):
    """Return the relative links of a page that lead nowhere."""
    found = []
    for link in (one or other for one, other in LINK.findall(FENCE.sub("", text))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        known = anchors(text if target == path else target.read_text("utf-8")) if anchor and target.is_file() else set()
        if not target.exists() or (anchor and anchor not in known):
            found.append(link)
    return found


def test_links_lead_somewhere():
    pages = [path for path in project_files() if path.suffix == ".md"]
    links = {str(path.relative_to(ROOT)): broken(path, path.read_text("utf-8")) for path in pages}
    assert len(links) > 15
    assert {page: found for page, found in links.items() if found} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('[a](docs/config.md) [b](docs/config.md#adalora) [c](https://x.y/z) <img src="docs/api.md">\n', []),
        ("[a](docs/nowhere.md) [b](docs/config.md#nowhere)\n", ["docs/nowhere.md", "docs/config.md#nowhere"]),
        ('<img src="docs/nowhere.png">\n', ["docs/nowhere.png"]),
        ("# A `b` (c)\n[a](#a-b-c) [b](#a)\n", ["#a"]),
        ("```bash\n[a](nowhere)\n```\n", []),
    ],
)
def test_links_that_lead_nowhere_are_found(text, found):
    """The check above would pass on anything if it saw no link."""
    assert broken(ROOT / "README.md", text) == found


def test_every_page_is_reached_from_the_readme():
    """A page that no other names is read by nobody."""
    reached, left = set(), [ROOT / "README.md"]
    while left:
        path = left.pop()
        reached.add(path)
        for link in (one or other for one, other in LINK.findall(path.read_text("utf-8"))):
            target = (path.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.is_file() and target not in reached:
                left.append(target)
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {path.name for path in reached} == set()
