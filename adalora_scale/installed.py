"""Which version of a package is installed."""

from importlib import metadata

ABSENT = "not installed"


def version_of(package: str) -> str:
    """Return an installed package's version, or `ABSENT` (of this package too, when it runs from its source folder)."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ABSENT
