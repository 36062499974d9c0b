"""Addresses of servers: what is one, and whether two are the same."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from kvtool.errors import UsageError

REQUESTS = (
    "/v1/chat/completions", "/v1/completions", "/v1/models", "/chat/completions", "/completions",
    "/completion", "/generate", "/props", "/v1",
)  # fmt: skip
PORTS = {"http": 80, "https": 443}
HOW = "Give http://HOST:PORT."


def base_address(url: str, instead: str = "") -> str:
    """A server's address without what follows it. instead: the advice for a password in it.

    Raises UsageError for what is no address, and for the address of a request.
    """
    if "@" in url:
        raise UsageError("a server's address must hold no password", instead)
    none = UsageError(f"{url!r} is no address of a server", HOW)
    if not url.isascii() or not url.isprintable() or " " in url:
        raise none
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        text = str(error).partition("Port")
        raise (_no_port(url) if text[1] else none) from None
    if parts.scheme not in PORTS or not host:
        raise none
    if port == 0 or parts.netloc.endswith(":"):
        raise _no_port(url)
    path = parts.path.rstrip("/")
    end = next((end for end in REQUESTS if path.endswith(end)), "")
    base = f"{parts.scheme}://{parts.netloc}{path.removesuffix(end)}"
    if end not in ("", "/v1"):
        raise UsageError(f"{url!r} is the address of a request, not of a server", f"Give {base}.")
    return base


def _no_port(url: str) -> UsageError:
    return UsageError(f"{url!r}: its port is none (expected 1 to 65535)", HOW)


def same_server(a: str, b: str) -> bool:
    """Whether two base addresses are of one server, under whatever names of its host."""
    return a == b or bool(_places(a) & _places(b))


def _places(url: str) -> set[tuple[str, int, str]]:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, port)}
    except OSError:
        found = {host}
    return {(_own(address), port, parts.path) for address in found}


def _own(address: str) -> str:
    """One name for all addresses of this machine alone."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    found = getattr(found, "ipv4_mapped", None) or found
    return "localhost" if found.is_loopback or found.is_unspecified else str(found)
