"""docs/reference/ is what the docstrings say, of everything that is public; tests/reference.py makes it."""

import pytest

import adalora_scale
from tests import reference
from tests.reference import FOLDER, PAGES, found, pages, sections


def test_pages_are_the_docstrings():
    """Else they describe another version; `python -m tests.reference` makes them again."""
    made = pages()
    assert {path.name for path in FOLDER.iterdir()} == set(made)
    for name, text in made.items():
        assert (FOLDER / name).read_text() == text, f"{name} is out of date: python -m tests.reference"


def test_everything_public_is_on_one_page():
    """Else a new name is documented nowhere."""
    named = [name for _, names in PAGES.values() for name in names]
    assert sorted(named) == sorted(adalora_scale.__all__)
    text = "".join(pages().values())
    expected = (
        "### RankAllocator.attach", "- `total_step`: optimizer steps", "- `max_skipped_steps`: steps in a row",
        "- `adalora_config`: the method", "- `mask`: (matrices · r,) bool", "guard_every: int = 100",
    )  # fmt: skip
    for words in expected:
        assert words in text
    assert "_hold" not in text and "on_train_begin" not in text


@pytest.mark.parametrize("name", [name for name in adalora_scale.__all__ if name[0].islower()])
def test_every_argument_is_explained(name):
    """Else a page shows a name and a type, and nobody knows what to give."""
    item = found(name)
    explained = [one.name for part in sections(item) if part.kind.value == "parameters" for one in part.value]
    assert explained == [parameter.name for parameter in item.parameters]
    assert item.returns is not None


def test_a_section_that_would_be_lost_is_an_error(tmp_path):
    """Else an example in a docstring is missing from its page, in silence."""
    import griffe

    (tmp_path / "shown.py").write_text(
        'def call():\n    """Do it.\n\n    Warns:\n        UserWarning: often.\n    """\n'
    )
    item = griffe.load("shown", search_paths=[str(tmp_path)])["call"]
    with pytest.raises(ValueError, match="sections that this page does not show: warns"):
        reference._texts(item)
