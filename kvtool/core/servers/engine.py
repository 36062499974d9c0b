"""What a serving engine is asked for, and how its answers are read: logprobs of token ids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from kvtool.core.servers.client import Client
from kvtool.errors import ServerError

WANTED = 256  # likeliest tokens asked for at each position, where a server gives as many
MIN_LOGPROB = -110.0  # the logarithm of float32's least number is -103; less is a mark for 0
MAX_LOGPROB = 1e-3  # 0, as far as engines round it
MAX_ID = 2**31
NEEDED = 5  # likeliest tokens without which nothing can be compared


class Completion(NamedTuple):
    """What a server continued: its greedy tokens, and the logprobs of the likeliest at each."""

    tokens: tuple[int, ...]
    likeliest: tuple[Mapping[int, float], ...]  # by token id, in nats; one a token
    reused: int | None  # prompt tokens that it took from its cache; None: it does not say


Request = tuple[str, dict[str, Any]]  # a path, and the body of a POST


class NotFinite(ServerError):
    """A server's logprobs are not numbers: what it computed was NaN or infinite."""


class Engine(Protocol):
    """A serving engine behind a Client."""

    name: str
    client: Client
    model: str  # what the server calls its model
    context: int  # tokens that it holds; 0: it does not say
    slots: int  # requests that it holds at a time, each in a place of its own; 0: it does not say
    chunk: int  # tokens of a prompt that it computes at a time; 0: it does not say
    to_tell_reuse: str  # what makes it say how much it took from its cache
    to_give_more: str  # what makes it give more logprobs

    def identity(self) -> dict[str, str]:
        """What tells this model from another, asked for anew. Raises ServerError."""

    def requests(
        self,
        ids: Sequence[int],
        n: int = 1,
        cached: bool = False,
        salt: str = "",
        slot: int | None = None,
    ) -> list[Request]:
        """What `complete` sends."""

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
        """Save a slot to a file on the server, or restore it; how many tokens. Raises
        ServerError."""

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text. Raises ServerError."""


class Slotless:
    """An engine without slots."""

    client: Client

    def file_slot(self, slot: int, action: str) -> int:
        """As Engine.file_slot: it cannot."""
        raise ServerError(f"{self.client.url}: has no slots")


def _token_id(token: Any) -> Any:
    return token.get("id") if isinstance(token, dict) else None


def completion(
    engine: Engine, n_prompt: int, found: Any, token: Any, likeliest: Any, reused: Any
) -> Completion:
    """The Completion of a server's list of tokens. Raises ServerError for what lacks logprobs."""
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
    return Completion(tokens, tops, reused if told else None)


def id_of(value: Any) -> int:
    """A token id, which some write as a text."""
    if isinstance(value, int | str) and not isinstance(value, bool):
        return int(value)
    raise TypeError


def number(value: Any) -> float:
    """A logprob, not below what float32 can tell from 0; NaN for what JSON has as null."""
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


def whole(value: Any) -> int:
    """A size that a server tells; 0 for what is none."""
    return value if type(value) is int and value > 0 else 0
