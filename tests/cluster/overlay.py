"""Another version of a package for one rank, without installing it: a folder that PYTHONPATH puts in front."""

import os
from pathlib import Path

from tests.conftest import ROOT


def other_version(folder: Path, package: str, version: str) -> dict[str, str]:
    """Write the package's metadata with another version into `folder`; return the environment that shows it first."""
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
