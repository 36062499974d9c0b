"""What is the address of a server, and what is said of what is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cli_probe import Ran, refused


def asked(kv: Callable[..., Ran], url: str) -> str:
    return refused(kv("--server", url, command="verify-cache"))


@pytest.mark.parametrize("url", [
    "ftp://here", "http://", "http://:80", "http://me:pw@host", "http://[::1", "http://a b",
    "höst:1", "http://me:pw@host:99999",
])  # fmt: skip
def test_what_is_no_address(kv: Callable[..., Ran], url: str) -> None:
    said = asked(kv, url)
    assert "address" in said and "pw" not in said.replace("password", "")


@pytest.mark.parametrize("port", ["", "0", "65536", "x", "-1", "8_0"])
def test_what_is_no_port(kv: Callable[..., Ran], port: str) -> None:
    url = f"http://127.0.0.1:{port}"
    how = "its port is none (expected 1 to 65535). Give http://HOST:PORT."
    assert asked(kv, url) == f"{url!r}: {how}"


@pytest.mark.parametrize("path", ["/v1/completions", "/completion", "/v1/chat/completions/"])
def test_the_address_of_a_request_is_led_back_to_the_server(
    kv: Callable[..., Ran], path: str
) -> None:
    said = asked(kv, f"http://host:1/api{path}")
    assert said.endswith("is the address of a request, not of a server. Give http://host:1/api.")
