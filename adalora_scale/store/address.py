"""What the URL of a store may be, told before anything is imported that takes time and before anything is asked."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import NoReturn
from urllib.parse import urlsplit

from adalora_scale.errors import UserError, nearest
from adalora_scale.files import is_url

S3 = ("s3", "s3a")
"""What pyarrow's own client reads; the others belong to the packages that fsspec knows."""
LOCAL = ("file", "local")
_GONE = ("memory",)
"""Gone with the process."""
_SIGNED_BY_ENVIRONMENT = (*S3, "gs", "gcs")
"""Where nothing but a secret can stand before an @."""
_EXAMPLE = "such as s3://bucket/run"
_PACKAGE = re.compile(r"(?:please )?install ([\w\-]+)", re.IGNORECASE)


def check_address(key: str, url: str) -> None:
    """See that a URL can be a store's, as far as this is known without asking the store.

    Args:
        key: the key or argument that it was given for, for the message.
        url: what was given.

    Raises:
        UserError: it is no URL, holds a secret (which is not repeated) or options, or names a kind of store that nobody
            here writes to.
    """
    protocol, _, rest = url.partition("://")
    if not is_url(url) or not rest.strip("/"):
        raise UserError(f"{key}={_shown(url)} is not the URL of a store; name a folder in one, {_EXAMPLE}.")
    protocol = protocol.lower()
    _refuse_secrets(key, url, protocol)
    if protocol in _GONE:
        raise UserError(f"{key}={url} is gone with the process; name a store that stays, {_EXAMPLE}.")
    if protocol in LOCAL and not rest.startswith("/"):
        raise UserError(f"{key}={url} is not a whole path; write it with three slashes, as file:///mnt/store/run.")
    if protocol not in (*S3, *LOCAL):
        _require_client(key, url, protocol)


def _refuse_secrets(key: str, url: str, protocol: str) -> None:
    parts = urlsplit(url)
    user = parts.netloc.rpartition("@")[0]
    if ":" in user or (user and protocol in _SIGNED_BY_ENVIRONMENT):
        raise UserError(
            f"{key}={_shown(url)} holds a user or password, which would stand in run.json and in logs; leave it out, "
            f"and set what the store's client reads (AWS_PROFILE or AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY of S3)."
        )
    if protocol not in LOCAL and (parts.query or parts.fragment):
        raise UserError(
            f"{key}={_shown(url)} has options behind ? or #; leave them out, and set what the store's client reads "
            f"(AWS_ENDPOINT_URL and AWS_REGION of S3)."
        )


def _require_client(key: str, url: str, protocol: str) -> None:
    from fsspec.registry import known_implementations, registry

    if protocol in registry:  # registered by a package that is here
        return
    if (known := known_implementations.get(protocol)) is None:
        hint = nearest(protocol, (*S3, *LOCAL, *known_implementations))
        raise UserError(f"{key}={url}: no store of kind '{protocol}' is known.{hint}")
    package = known["class"].partition(".")[0]
    if package == "fsspec":
        return
    if find_spec(package) is None:
        _missing(key, url, known.get("err", ""), package)


def _missing(key: str, url: str, said: str, module: str) -> NoReturn:
    found = _PACKAGE.search(said)
    name = found.group(1) if found else module
    raise UserError(f"{key}={url} needs a package that is not here: pip install {name}.")


def _shown(url: str) -> str:
    """Return a URL without what may be a secret: what stands before an @, and behind a ? or #."""
    shown = re.sub(r"[?#].*", "?…", url, flags=re.DOTALL)
    return re.sub(r"://.*@", "://…@", shown, flags=re.DOTALL)
