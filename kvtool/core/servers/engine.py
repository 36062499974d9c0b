"""The interface to a serving engine: requests for logprobs of token ids, and their answers."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from kvtool.core.servers.client import Client, Refused
from kvtool.errors import ServerError

WANTED = 256  # likeliest tokens asked for at each position, where a server gives as many
MIN_LOGPROB = -110.0  # the logarithm of float32's least number is -103; less is a mark for 0
MAX_LOGPROB = 1e-3  # 0, as far as engines round it
MAX_ID = 2**31
FIRST = 1  # token with which every text may begin, so that to keep it is no reuse of a prompt
TIE = 1e-4  # nats: tokens as near to each other are equally likely, as far as engines round it
NEEDED = 5  # likeliest tokens without which nothing can be compared


class Completion(NamedTuple):
    """A server's continuation: its greedy tokens, and the logprobs of the likeliest tokens at
    each."""

    tokens: tuple[int, ...]
    likeliest: tuple[Mapping[int, float], ...]  # by token id, in nats; one a token
    reused: int | None  # prompt tokens that it took from its cache; None: it does not say
    lacking: int = 0  # tokens fewer than it was asked for

    def passed_over(self) -> list[dict[int, float]]:
        """The likelier ids of each token that is not the likeliest by its own logprobs, and by how
        many nats they are."""
        found = []
        for token, top in zip(self.tokens, self.likeliest, strict=True):
            own = top.get(token, -math.inf)
            found.append({i: p - own for i, p in top.items() if p - own > TIE})
        return [ids for ids in found if ids]


Request = tuple[str, dict[str, Any]]  # a path, and the body of a POST


class NotFinite(ServerError):
    """A server's logprobs are NaN or infinite."""


class Engine(Protocol):
    """A serving engine behind a Client."""

    name: str
    client: Client
    model: str  # what the server calls its model
    context: int  # its context length in tokens; 0: it does not say
    slots: int  # slots, each with the cache of one request; 0: it does not say
    chunk: int  # tokens of a prefill chunk; 0: it does not say
    to_tell_reuse: str  # the setting that makes it report cached tokens
    to_give_more: str  # the setting that makes it give more logprobs
    cold_by: str  # what it is told to compute a prompt anew
    no_cache: str  # how it was started, if that leaves it without a cache

    def identity(self) -> dict[str, str]:
        """The identity of the served model, requested anew. Raises ServerError."""

    def requests(
        self,
        ids: Sequence[int],
        n: int = 1,
        cached: bool = False,
        salt: str = "",
        slot: int | None = None,
    ) -> list[Request]:
        """The requests that `complete` sends."""

    def complete(
        self,
        ids: Sequence[int],
        n: int = 1,
        cached: bool = False,
        salt: str = "",
        slot: int | None = None,
    ) -> Completion:
        """Continue `ids` greedily by n tokens, with the cache or without it.

        salt: requests of one salt share a cache, where the engine can tell them apart. slot: which
        one is to answer, where it has slots; None: whichever it likes. Raises ServerError.
        """

    def file_slot(self, slot: int, action: str) -> int:
        """Save a slot to a file on the server, or restore it -> its number of tokens. Raises
        ServerError."""

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text. Raises ServerError."""

    def tokenize_request(self, text: str) -> Request:
        """The request that `tokenize` sends."""


class Slotless:
    """An engine without slots."""

    client: Client
    no_cache = ""

    def file_slot(self, slot: int, action: str) -> int:
        """As Engine.file_slot, which it lacks."""
        raise ServerError(f"{self.client.url}: has no slots")


class Salts:
    """Texts that divide a server's cache: only requests of one text share what is kept."""

    def __init__(self) -> None:
        self._own = f"kvtool-{os.urandom(8).hex()}"  # shares nothing with earlier visits
        self._unused = (f"{self._own}-cold-{i}" for i in itertools.count())

    def of(self, cached: bool, salt: str) -> str:
        """That of a request, by the arguments of Engine.requests: an unused one if it is to share
        nothing."""
        return f"{self._own}-{salt}" if cached and salt else next(self._unused)


def first_answer(client: Client, paths: Sequence[str]) -> dict[str, Any]:
    """The answer to GET of the first path that is not refused. Raises ServerError, of the last if
    all are."""
    *others, last = paths
    for path in others:
        try:
            return client.get(path)
        except Refused:
            continue
    return client.get(last)


def completion(
    engine: Engine, n_prompt: int, n: int, found: Any, token: Any, likeliest: Any, reused: Any
) -> Completion:
    """The Completion of a server's list of tokens, of which n were asked for.

    Raises ServerError for what lacks logprobs.
    """
    try:
        tokens = tuple(id_of(token(item)) for item in found)
        tops = tuple(likeliest(item) for item in found)
    except (TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
        raise _no_logprobs(engine) from error
    if not tokens or not all(tops):
        raise _no_logprobs(engine)
    if not all(0 <= i < MAX_ID for top in tops for i in (*top, *tokens)):
        raise _no_logprobs(engine)
    if any(p > MAX_LOGPROB for top in tops for p in top.values()):
        text = f"{engine.client.url}: its logprobs are above 0, which no logarithm of a share is"
        raise ServerError(text, "Let it give natural logarithms, before any sampling.")
    if not all(math.isfinite(p) for top in tops for p in top.values()):
        raise NotFinite(f"{engine.client.url}: its logprobs are no numbers (NaN)")
    if min(map(len, tops)) < NEEDED:
        raise too_few(engine, min(map(len, tops)))
    told = type(reused) is int and 0 <= reused <= n_prompt
    return Completion(tokens, tops, reused if told else None, max(n - len(tokens), 0))


def require_cold(engine: Engine, found: Completion) -> None:
    """Raise ServerError for an answer that was to use no cache, and used one."""
    if (found.reused or 0) > FIRST:
        raise ServerError(
            f"{engine.client.url}: took {found.reused:,} tokens from its cache when asked not to",
            f"Is a gateway in between that drops {engine.cold_by}?",
        )


def id_of(value: Any) -> int:
    """A token id, which some servers write as a string."""
    if isinstance(value, int | str) and not isinstance(value, bool):
        return int(value)
    raise TypeError


def number(value: Any) -> float:
    """A logprob, raised to MIN_LOGPROB; NaN for null."""
    if value is None:
        return math.nan
    if isinstance(value, bool):
        raise TypeError
    return max(float(value), MIN_LOGPROB)


def _no_logprobs(engine: Engine) -> ServerError:
    return ServerError(
        f"{engine.client.url}: its answer has no logprobs of token ids as {engine.name} gives them",
        "Name the engine with --engine, and let its API give logprobs.",
    )


def too_few(engine: Engine, n: int = 0) -> ServerError:
    """What is said of a server that names so few tokens at a position; of 0, none at all."""
    found = f"{n} found" if n else "or none"
    return ServerError(
        f"{engine.client.url}: gives fewer than {NEEDED} logprobs at a token ({found})",
        engine.to_give_more,
    )


def ids_in(engine: Engine, answer: dict[str, Any]) -> list[int]:
    """The ids that a tokenizer's answer names. Raises ServerError."""
    found = answer.get("tokens")
    if not isinstance(found, list) or not all(type(i) is int and 0 <= i < MAX_ID for i in found):
        raise ServerError(f"{engine.client.url}: did not answer with the ids of a text")
    return found


def pairs_in(answer: Any, tokens: str, tops: str) -> list[tuple[Any, Any]]:
    """Each token of an answer with its likeliest ones; none if it has no lists of these names."""
    lists = [answer.get(name) for name in (tokens, tops)] if isinstance(answer, dict) else []
    if not lists or not all(isinstance(each, list) for each in lists):
        return []
    return list(zip(*lists, strict=False))


def whole(value: Any) -> int:
    """A size that a server reports; 0 if it is none."""
    return value if type(value) is int and value > 0 else 0
