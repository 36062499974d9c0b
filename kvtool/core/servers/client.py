"""Requests to a server, as JSON over HTTP: bounded in number, in time and in size."""

from __future__ import annotations

import http.client
import json
import math
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from typing import Any

from kvtool.core.servers.address import base_address
from kvtool.errors import ServerError, UsageError
from kvtool.reading import parse_json

KEYS = ("KVTOOL_API_KEY", "OPENAI_API_KEY")  # environment variables; the first that is set counts
READ_AT_ONCE = 2**16
MAX_ANSWER_BYTES = 64 * 2**20  # bytes of an answer
RETRIED = (429, 502, 503, 504)  # busy, or limited in rate
N_TRIES = 4
LONGEST_WAIT = 20.0  # seconds before the next try


class Refused(ServerError):
    """The server answered with an HTTP error, `code`."""

    def __init__(self, code: int, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.code = code


class RequestsSpent(ServerError):
    """The allowed number of requests is used up."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key must not follow to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Client:
    """One server. `n_sent` counts its requests, tries again included.

    url: its address, as http://127.0.0.1:8080. timeout: seconds for one request. most: how many
    requests may be sent. Raises UsageError for what is no address.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 120.0,
        most: int = 10_000,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = base_address(url, f"Set {KEYS[0]} instead.")
        self.timeout, self.most, self.n_sent = timeout, most, 0
        self.sleep = sleep
        self._key = _key()
        self._opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))

    def get(self, path: str) -> dict[str, Any]:
        """The answer to GET. Raises ServerError."""
        return self._parsed(path, self._ask(path, None))

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to POST. Raises ServerError."""
        return self._parsed(path, self.order(path, body))

    def order(self, path: str, body: dict[str, Any]) -> bytes:
        """POST what is answered by a status, and words of no form. Raises ServerError."""
        return self._ask(path, json.dumps(body).encode())

    def masked(self, text: str) -> str:
        """What a server said, without the key."""
        return text.replace(self._key, "***") if self._key else text

    def _ask(self, path: str, body: bytes | None) -> bytes:
        for attempt in range(1, N_TRIES + 1):
            if self.n_sent >= self.most:
                raise RequestsSpent(
                    f"{self.url}: {self.most} requests were sent and more are needed",
                    "Allow more with --requests, or give fewer prompts.",
                )
            self.n_sent += 1
            try:
                return self._answer(path, body)
            except urllib.error.HTTPError as error:
                if error.code not in RETRIED or attempt == N_TRIES:
                    raise self._refused(path, error) from error
                self.sleep(min(_wait(error.headers, attempt), self.timeout))
            except (
                OSError,
                ValueError,
                http.client.HTTPException,
            ) as error:  # a name, a port, TLS, a time-out, no HTTP
                raise self._unreachable(error) from error
        raise AssertionError("the last try answers or raises")

    def _answer(self, path: str, body: bytes | None) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url + path, body, headers)
        return _within(self.timeout, lambda: self._exchanged(request))

    def _parsed(self, path: str, data: bytes) -> dict[str, Any]:
        if data.lstrip()[:1] == b"<":
            text = f"{self.url}{path}: answers with HTML, a page for browsers"
            raise ServerError(text, "Give the address of the engine's own API.")
        try:
            found = parse_json(data, finite=False)
        except ValueError as error:
            why = self.masked(str(error))
            raise ServerError(f"{self.url}{path}: its answer is not valid JSON ({why})") from None
        if not isinstance(found, dict):
            raise ServerError(f"{self.url}{path}: its answer is no JSON object")
        return found

    def _exchanged(self, request: urllib.request.Request) -> bytes:
        with self._opener.open(request, timeout=self.timeout) as answer:
            return self._read(answer)

    def _read(self, answer: http.client.HTTPResponse) -> bytes:
        """The whole answer. Raises ServerError if it is larger than an answer may be."""
        parts, size = [], 0
        while part := answer.read1(READ_AT_ONCE):
            parts.append(part)
            size += len(part)
            if size > MAX_ANSWER_BYTES:
                most = f"{MAX_ANSWER_BYTES // 2**20} MiB"
                raise ServerError(f"{self.url}: its answer is larger than {most}")
        if answer.length:
            total = size + answer.length
            raise ServerError(f"{self.url}: its answer is cut short ({size:,} of {total:,} bytes)")
        return b"".join(parts)

    def _refused(self, path: str, error: urllib.error.HTTPError) -> ServerError:
        said, where = _message(error, self.timeout, self.masked), f"{self.url}{path}"
        if error.code in (401, 403):
            wrong = "does not accept the key" if self._key else "needs a key"
            return ServerError(f"{where}: {wrong} (HTTP {error.code})", f"Set {KEYS[0]}.")
        if error.code == 404:
            return Refused(404, f"{where}: there is no such address (HTTP 404)")
        if error.code in RETRIED:
            text = f"{where}: is busy, or limits requests (HTTP {error.code}, {N_TRIES} tries)"
            return ServerError(text, "Try again later.")
        if 300 <= error.code < 400:
            to = self.masked(error.headers.get("Location", "another address"))
            text = f"{where}: redirects to {to[:200]} (HTTP {error.code}), which is not followed"
            return ServerError(text, "Give that address, if you trust it.")
        return Refused(error.code, f"{where}: refused the request (HTTP {error.code}{said})")

    def _unreachable(self, error: Exception) -> ServerError:
        why = getattr(error, "reason", error)
        if isinstance(why, TimeoutError):
            text = f"{self.url}: gave no answer within {self.timeout:g} s"
            return ServerError(text, "Wait longer with --timeout.")
        said = getattr(why, "strerror", None) or str(why) or type(why).__name__
        said = self.masked(said)
        return ServerError(f"{self.url}: cannot be reached ({said})", "Is the server running?")


def _key() -> str:
    """The key in the environment; "" if there is none. Raises UsageError, which does not show it,
    for what no header can hold."""
    name = next((name for name in KEYS if os.environ.get(name)), "")
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and (key.isprintable() or not key)):
        raise UsageError(f"{name}: holds characters that no key has", "Set it anew.")
    return key


def _wait(headers: Message, attempt: int) -> float:
    """Seconds to the next try: what the server asks for, within reason, or 0.5, 1, 2."""
    try:
        asked = float(headers.get("Retry-After", ""))
    except ValueError:
        asked = math.nan
    return min(asked, LONGEST_WAIT) if asked >= 0 else 0.5 * 2 ** (attempt - 1)


def _within(seconds: float, call: Callable[[], bytes]) -> bytes:
    """What `call` gives. Raises what it raises, and TimeoutError after that many seconds.

    A socket's own time-out bounds the wait for the next byte, and a server may send one at a time.
    """
    given: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            given.put(call())
        except BaseException as error:
            given.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        found = given.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(found, BaseException):
        raise found
    return found


def _message(error: urllib.error.HTTPError, seconds: float, masked: Callable[[str], str]) -> str:
    """What the server says of its refusal, after a colon; "" if nothing."""
    try:
        found = parse_json(_within(seconds, lambda: error.read(65536)))
    except (ValueError, OSError, http.client.HTTPException):
        return ""
    while isinstance(found, dict):
        found = next((found[k] for k in ("error", "message", "detail") if k in found), None)
    return f": {masked(found)[:300]}" if isinstance(found, str) and found else ""
