"""The requests that a server would get, without sending them."""

from __future__ import annotations

from collections.abc import Sequence

from kvtool.core.servers.engine import Completion, Engine, Request
from kvtool.core.servers.llama_cpp import slot_request
from kvtool.core.servers.prompts import MIN_TOKENS

UNKNOWN = -1  # stands for a token that the server would have answered
LETTERS = 4  # letters for each token of a text, since no server counts them


class DryEngine:
    """An engine that records its requests, and answers with placeholder tokens."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.client = engine, engine.client
        self.name, self.model = engine.name, engine.model
        self.context, self.slots, self.chunk = engine.context, engine.slots, engine.chunk
        self.cold_by, self.no_cache = engine.cold_by, engine.no_cache
        self.to_tell_reuse, self.to_give_more = engine.to_tell_reuse, engine.to_give_more
        self.requests_made: list[tuple[str, Request]] = []  # and for which arm
        self.n_identity = 0  # requests for what the server is
        self.arm = ""

    def identity(self) -> dict[str, str]:
        """As Engine.identity: nothing."""
        self.n_identity += 1
        return {}

    def requests(
        self,
        ids: Sequence[int],
        n: int = 1,
        cached: bool = False,
        salt: str = "",
        slot: int | None = None,
    ) -> list[Request]:
        """As Engine.requests."""
        return self.engine.requests(ids, n, cached, salt, slot)

    def complete(
        self,
        ids: Sequence[int],
        n: int = 1,
        cached: bool = False,
        salt: str = "",
        slot: int | None = None,
    ) -> Completion:
        """As Engine.complete, with placeholder tokens. All tokens count as reused, so that no
        request is left out."""
        for request in self.requests(ids, n, cached, salt, slot):
            self.requests_made.append((self.arm, request))
        nothing = dict.fromkeys(range(UNKNOWN, 30), 0.0)
        return Completion((UNKNOWN,) * n, (nothing,) * n, len(ids) if cached else 0)

    def file_slot(self, slot: int, action: str) -> int:
        """As Engine.file_slot."""
        self.requests_made.append((self.arm, slot_request(slot, action)))
        return 1

    def tokenize(self, text: str) -> list[int]:
        """As Engine.tokenize, with placeholder ids."""
        self.requests_made.append((self.arm, self.tokenize_request(text)))
        return [UNKNOWN] * max(len(text) // LETTERS, MIN_TOKENS)

    def tokenize_request(self, text: str) -> Request:
        """As Engine.tokenize_request."""
        return self.engine.tokenize_request(text)
