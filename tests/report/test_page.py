"""report.html in a real browser: complete, silent, fetching nothing, readable at every width; and its PNGs."""

import json
import re

import pytest

from adalora_scale.cli import main
from tests.report.browser import PROGRAM, browser
from tests.report.runs import matrices, write_run

EVIL = '<script>alert("x")</script><img src=http://192.0.2.1/a onerror=alert(1)> "><b> & $x_2$ \u202e'
SINGLE = {"At a glance", "Loss", "Budget", "Ranks", "How ranks moved", "Why these ranks", "Parameters by type", "Speed",
          "Steps skipped", "How it was made"}  # fmt: skip
COMPARED = {
    "What differs in their configs",
    "Figures",
    "Loss",
    "Budget",
    "Ranks",
    "Ranks and parameters by type",
    "Speed",
}


@pytest.fixture(scope="module")
def tab():
    if PROGRAM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two plain runs, one with experts, and one whose names and config a stranger wrote."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "one", matrices(), adalora={"target_r": 4, "init_r": 8}, model={"name": EVIL})
    write_run(folder / "two", matrices(), seed=1, adalora={"target_r": 2, "init_r": 8}, model={"name": EVIL})
    write_run(folder / "moe", matrices(experts=4, also=["score"]), seed=2, finished=False)
    write_run(folder / "evil <b>&", {f"model.layers.0.{EVIL}": (8, 8), "model.layers.1.$a$": (8, 8)}, text={EVIL: EVIL})
    return folder


def texts(tab, selector):
    return tab.value(f"[...document.querySelectorAll({json.dumps(selector)})].map(one => one.textContent.trim())")


@pytest.mark.parametrize(
    ("names", "sections", "pictures"),
    [
        (["one"], SINGLE, 6 + 7),
        (["moe"], SINGLE - {"How it was made"}, 6 + 1 + 8),
        (["evil <b>&"], SINGLE, 6 + 2),
        (["one", "two", "moe"], COMPARED, 4 + 4),
    ],
    ids=["one", "experts", "hostile", "three"],
)
def test_the_page_is_complete_silent_and_alone(tab, runs, tmp_path, names, sections, pictures):
    """A picture that is missing, a script that runs, a font that is fetched: a file sent by mail shows it to others."""
    page = tmp_path / "page.html"
    assert main(["report", *(str(runs / name) for name in names), "--output", str(page)]) == 0
    colours = {}
    for width, dark in ((1100, False), (1100, True), (390, False)):
        tab.open(page, width=width, dark=dark)
        assert tab.complaints == [] and tab.requested == [page.as_uri()]
        assert set(texts(tab, "h2")) == sections
        # Of every picture: whether it has size, words for screen readers, and something in it.
        shown = tab.value(
            "[...document.querySelectorAll('figure svg')].map(one => [one.getBoundingClientRect().width, "
            "one.getAttribute('aria-label').length, one.querySelectorAll('path').length, "
            "one.querySelectorAll('text').length])"
        )
        assert len(shown) == pictures and all(w > 120 and label > 10 and p and t for w, label, p, t in shown)
        assert tab.value("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"
        # Letters in pictures, in CSS pixels as they are seen.
        sizes = tab.value("[...document.querySelectorAll('svg text')].map(one => one.getBoundingClientRect().height)")
        assert min(size for size in sizes if size) >= (8 if width == 390 else 10)
        inks = tab.value("[...document.querySelectorAll('svg text')].map(one => getComputedStyle(one).fill)")
        colours[dark] = set(inks) | {tab.value("getComputedStyle(document.body).backgroundColor")}
        ids = tab.value("[...document.querySelectorAll('[id]')].map(one => one.id)")
        assert len(ids) == len(set(ids))
        lost = tab.value(
            "[...document.querySelectorAll('use, [clip-path]')].map(one => (one.getAttribute('href') || "
            "one.getAttribute('clip-path')).replace(/^url[(]|[)]$/g, '')).filter(to => !document.querySelector(to))"
        )
        assert lost == []
    assert "rgb(27, 30, 35)" in colours[False] and "rgb(230, 232, 235)" in colours[True]
    assert not {"rgb(27, 30, 35)", "rgb(253, 253, 252)"} & colours[True], "ink on ink"
    assert tab.value("document.querySelectorAll('script, b, img, iframe').length") == 0
    assert tab.value("[...document.querySelectorAll('table')].every(one => one.caption && one.tHead)")


@pytest.mark.parametrize("name", ["moe", "wide"])
def test_text_in_pictures_stays_inside_and_apart(tab, runs, tmp_path, name):
    """Clipped or overlapping labels cannot be read; the longer an axis' numbers, the less room its label has."""
    page = tmp_path / "page.html"
    if name == "wide":
        write_run(runs / "wide", matrices(2), spread=7.0, cost=10**5)
    assert main(["report", str(runs / name), "--output", str(page)]) == 0
    tab.open(page, width=1100, dark=False)
    clipped = tab.value(
        "[...document.querySelectorAll('figure svg')].flatMap(svg => { const out = svg.getBoundingClientRect(); return "
        "[...svg.querySelectorAll('text')].filter(one => { const box = one.getBoundingClientRect(); return box.left < "
        "out.left - 1 || box.right > out.right + 1 || box.top < out.top - 1 || box.bottom > out.bottom + 1; })"
        ".map(one => svg.getAttribute('aria-label') + ': ' + one.textContent); })"
    )
    assert clipped == []
    crossed = tab.value(
        "[...document.querySelectorAll('figure svg')].flatMap(svg => { const all = [...svg.querySelectorAll('text')], "
        "turned = one => /rotate[(]-90/.test(one.getAttribute('transform') || ''), box = one => "
        "one.getBoundingClientRect(); return all.filter(turned).flatMap(one => all.filter(other => !turned(other))"
        ".map(other => [box(one), box(other), one.textContent + ' / ' + other.textContent]).filter(([a, b]) => a.right "
        "> b.left + 1 && a.left < b.right - 1 && a.bottom > b.top + 2 && a.top < b.bottom - 2).map(all => all[2])); })"
    )
    assert crossed == []
    # Upright labels only: the boxes of slanted ones overlap where the letters do not.
    overlapping = tab.value(
        "[...document.querySelectorAll('figure svg')].flatMap(svg => { const boxes = [...svg.querySelectorAll('text')]"
        ".filter(one => !/rotate[(](?!-?0[ )])/.test(one.getAttribute('transform') || '')).map(one => "
        "[one.getBoundingClientRect(), one.textContent]); return boxes.flatMap(([a, s], i) => boxes.slice(i + 1)"
        ".filter(([b, t]) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom"
        " - 3).map(([b, t]) => svg.getAttribute('aria-label') + ': ' + s + ' / ' + t)); })"
    )
    assert overlapping == []


@pytest.mark.parametrize(("name", "width"), [("one", 1100), ("one", 390), ("moe", 390)])
def test_open_tables_of_one_run_fit(tab, runs, tmp_path, name, width):
    """What has to be pushed aside to be read is not seen."""
    page = tmp_path / "page.html"
    assert main(["report", str(runs / name), "--output", str(page)]) == 0
    tab.open(page, width=width, dark=False)
    open_ones = (
        "[...document.querySelectorAll('.scroll')].filter(one => one.querySelector('table') && !one.closest('details'))"
    )
    assert tab.value(f"{open_ones}.length") >= 2
    wider = tab.value(f"{open_ones}.filter(one => one.scrollWidth > one.clientWidth).map(one => one.ariaLabel)")
    assert wider == []


def test_the_checks_see_what_they_look_for(tab, tmp_path):
    """Else they pass on anything."""
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.log(1); throw Error('x')</script>")
    tab.open(page, width=390, dark=True)
    assert len(tab.requested) == 2 and len(tab.complaints) >= 2


def test_figures_are_the_records(tab, runs, tmp_path):
    """A report that disagrees with its run is worse than none."""
    page = tmp_path / "page.html"
    assert main(["report", str(runs / "one"), "--output", str(page)]) == 0
    tab.open(page, width=1100, dark=False)
    rows = dict(zip(*[iter(texts(tab, "table:first-of-type tbody tr:nth-child(n) > *")[:2000])] * 2, strict=False))
    last = json.loads((runs / "one" / "ranks.jsonl").read_text().splitlines()[-1])
    assert rows["triplets kept"] == str(sum(last["ranks"].values()))
    assert rows["parameters of the kept triplets"] == f"{last['spent']:,}"
    assert (rows["evaluation loss"], rows["wall time"]) == ("1.25", "1 min 15 s")
    assert (rows["peak host memory of a rank"], rows["steps skipped (no finite gradient)"]) == ("2.00 GiB", "2")
    grid = tab.value(
        "[...document.querySelectorAll('figure svg')].find(one => /^Ranks in/.test(one.getAttribute('aria-label')))"
        ".textContent.split('\\n').map(word => word.trim()).filter(word => word)"
    )
    ranks = [str(rank) for rank in last["ranks"].values()]
    assert any(grid[at : at + len(ranks)] == ranks for at in range(len(grid))), (grid, ranks)


def test_a_comparison_says_what_differs(runs, tmp_path, tab):
    """Two curves without the key that parts them explain nothing."""
    page = tmp_path / "page.html"
    assert main(["report", *(str(runs / name) for name in ("one", "two", "moe")), "--output", str(page)]) == 0
    tab.open(page, width=1100, dark=False)
    assert texts(tab, "section:first-of-type tbody tr") == ["adalora.target_r\n42not known".replace("\n", "")]
    assert "No run.json, so the config is not known: moe." in page.read_text()


def test_the_file_is_small_for_560_matrices(tmp_path):
    """It is sent by mail."""
    folder = write_run(tmp_path / "run", matrices(80), r=12, steps=1000, deltas=60)
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert 3e5 < len(page.encode()) < 1.5e6
    assert not re.search(r"(?:src|href)=\"(?!#|data:)|url\((?!#)|@import|<script", page)


def test_pictures_as_png(runs, tmp_path, capsys):
    """For slides and papers."""
    page, folder = tmp_path / "x.html", tmp_path / "png"
    assert main(["report", str(runs / "evil <b>&"), "--output", str(page), "--png", str(folder)]) == 0
    names = ("loss", "budget", "ranks", "moved", "why-0", "why-1", "parameters", "speed")
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in names}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())
    assert str(page) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{runs}"], "is no run: it has no metrics.jsonl and no run.json"),
        (["{runs}/none"], "is not a folder"),
        (["{runs}/one", "{runs}/two/../one"], "is named twice"),
        (["{runs}/one"] * 13, "at most 12 runs"),
        (["{runs}/one", "--output", "{runs}"], "is a folder; name a file"),
        (["{runs}/one", "--output", "{runs}/a/b.html"], "there is no folder"),
        (["{runs}/one", "--png", "{runs}/one/run.json", "--output", "{runs}/x.html"], "is a file; name a folder"),
        (["{runs}/broken"], "ranks.jsonl, line 1 is not valid JSON"),
        (["{runs}/edited"], "holds ranks that are no whole numbers"),
        (["{runs}/newer"], "scores.jsonl has format 9, not 1"),
    ],
)
def test_what_is_no_run_is_one_line(runs, capsys, arguments, message):
    """Nobody reads a traceback for a mistyped folder."""
    for name, file, text in (
        ("broken", "ranks.jsonl", "{oops\n"),
        ("edited", "ranks.jsonl", '{"step": 1, "budget": 2, "ranks": {"a": "x"}}\n'),
        ("newer", "scores.jsonl", '{"step": 0, "format": 9}\n'),
    ):
        (runs / name).mkdir(exist_ok=True)
        (runs / name / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        (runs / name / file).write_text(text)
    assert main(["report", *(word.format(runs=runs) for word in arguments)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (runs / "x.html").exists()


def test_runs_with_little_in_them_have_a_report(tmp_path):
    """A run that was stopped early is looked at more often than one that went well."""
    folder = tmp_path / "early"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 2, "lo')
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    for words in ("not ended, at step 1", "No loss was logged", "No allocation yet", "the run has not ended"):
        assert words in page
    assert (
        main(["report", str(folder), str(write_run(tmp_path / "whole", matrices())), "--output", str(tmp_path / "x")])
        == 0
    )


def test_what_an_earlier_run_left_is_not_taken_for_this_ones(tmp_path):
    """An overwritten folder holds the old run.json until the new run ends."""
    import os

    folder = write_run(tmp_path / "run", matrices())
    (folder / "metrics.jsonl").write_text('{"step": 3, "loss": 2.5}\n')
    for name in ("ranks.jsonl", "scores.jsonl"):
        (folder / name).write_text("")
    os.utime(folder / "run.json", (1, 1))
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "run.json is an earlier run" in page and "1 min 15 s" not in page
