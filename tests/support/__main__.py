"""Make docs/support.md from the marks of the tests, without running any.

python -m tests.support            # write the page
python -m tests.support --check    # compare; exit code 1 and the difference where they differ
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.support.collecting import collect
from tests.support.page import PAGE, page


def main() -> int:
    """Write or compare the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is another")
    options = parser.parse_args()
    made = page(collect())
    if not options.check:
        PAGE.write_text(made, encoding="utf-8")
        return 0
    stands = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    lines = difflib.unified_diff(stands.splitlines(), made.splitlines(), "docs/support.md", "the tests", lineterm="")
    for line in lines:
        print(line)
    return int(stands != made)


if __name__ == "__main__":
    sys.exit(main())
