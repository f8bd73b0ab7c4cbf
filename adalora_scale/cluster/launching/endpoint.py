"""Where ranks meet: `host:port` of the rendezvous, resolved, its port seen to be free."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass

import psutil

from adalora_scale.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A rendezvous that can be used."""

    host: str
    port: int
    local_address: str
    """This host's address on the way there; ranks elsewhere can reach it under this one."""

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def split_endpoint(text: str) -> tuple[str, int]:
    """Split `host:port`.

    Raises:
        UserError: it is something else.
    """
    host, separator, port = text.rpartition(":")
    if not separator or not port.isdecimal() or int(port) > 65535:
        raise UserError(f"the rendezvous is '{text}'; write host:port, for example node1:29400.")
    return host, int(port)


def check_endpoint(text: str, *, patience_s: float = 0) -> Endpoint:
    """Resolve a rendezvous and, if it is on this host, see that its port is free; port 0 means any free port of it.

    torchrun takes a foreign listener for another node's rendezvous and waits for it until a time-out.

    Args:
        text: `host:port`.
        patience_s: how long to wait for the host's name to get an address. Kubernetes gives one when the pod starts,
            and pods start in any order.

    Raises:
        UserError: the text is not `host:port`, the name is unknown, or the port is taken.
    """
    host, port = split_endpoint(text)
    host = host or "localhost"
    address = _address(host, patience_s)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:  # a datagram socket's connect sends nothing
        try:
            way.connect((address, port or 1))
        except OSError as error:
            raise UserError(f"no route from this host to {host} ({address}): {error.strerror}.") from None
        local_address = way.getsockname()[0]
    if _is_here(address):
        port = _bind(host, port)
    elif port == 0:
        raise UserError(f"a free port can be looked for on this host only, not on {host}; name one.")
    return Endpoint(host=host, port=port, local_address=local_address)


def _address(host: str, patience_s: float) -> str:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return socket.gethostbyname(host)
        except OSError:
            if time.monotonic() >= deadline:
                message = f"the rendezvous host '{host}' has no address here; check its name, or write its address."
                raise UserError(message) from None
        time.sleep(1)


def _is_here(address: str) -> bool:
    own = (entry.address for entries in psutil.net_if_addrs().values() for entry in entries)
    return address.startswith("127.") or address in own


def _bind(host: str, port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that only lingers can be used
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"port {port} of this host ({host}) cannot be used for the rendezvous: {error.strerror}. Choose "
                f"another one, or end what listens there."
            ) from None
        return probe.getsockname()[1]
