"""SGLang's server: its requests and answers, as documented."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvtool.core.servers.client import Client, Refused
from kvtool.core.servers.engine import (
    WANTED,
    Completion,
    Request,
    Slotless,
    completion,
    id_of,
    ids_in,
    number,
    pairs_in,
    whole,
)
from kvtool.errors import ServerError

FLUSH: Request = ("/flush_cache", {})


class SGLang(Slotless):
    """SGLang's server, by /generate."""

    name = "sglang"
    to_tell_reuse = "Ask SGLang itself, of a version whose answers have meta_info.cached_tokens."
    cold_by = "/flush_cache"
    to_give_more = "Ask SGLang itself: it gives as many as top_logprobs_num asks for."

    def __init__(self, client: Client, info: dict[str, Any]) -> None:
        self.client = client
        self.model = client.masked(str(info.get("model_path", "")))
        self.context = whole(info.get("context_length") or info.get("max_total_num_tokens"))
        self.slots, self.chunk = 0, 0
        self._salt = ""  # of what it keeps

    def identity(self) -> dict[str, str]:
        """As Engine.identity."""
        info = self.client.get("/get_model_info")
        return {
            key: self.client.masked(str(info.get(key, "")))
            for key in ("model_path", "weight_version")
        }

    def requests(
        self,
        ids: Sequence[int],
        n: int = 1,
        cached: bool = False,
        salt: str = "",
        slot: int | None = None,
    ) -> list[Request]:
        """As Engine.requests. Everything in the cache is dropped first, unless it is to be used."""
        body = {
            "input_ids": list(ids), "return_logprob": True, "top_logprobs_num": WANTED,
            "sampling_params": {"temperature": 0.0, "max_new_tokens": n, "ignore_eos": True},
        }  # fmt: skip
        kept = cached and salt == self._salt
        self._salt = salt if cached else ""
        return [*([] if kept else [FLUSH]), ("/generate", body)]

    def complete(
        self,
        ids: Sequence[int],
        n: int = 1,
        cached: bool = False,
        salt: str = "",
        slot: int | None = None,
    ) -> Completion:
        """As Engine.complete."""
        *before, (path, body) = self.requests(ids, n, cached, salt, slot)
        for _ in before:
            self._flush()
        answer = self.client.post(path, body)
        meta = answer.get("meta_info")
        meta = meta if isinstance(meta, dict) else {}
        found = pairs_in(meta, "output_token_logprobs", "output_top_logprobs")
        return completion(
            self, len(ids), n, found, lambda t: t[0][1], _of_sglang, meta.get("cached_tokens")
        )

    def _flush(self) -> None:
        """Drop everything in the cache. The answer is plain text."""
        try:
            self.client.order(*FLUSH)
        except Refused as error:
            if error.code != 400:
                raise
            raise ServerError(
                f"{self.client.url}: did not drop its cache, since it is serving other requests",
                "Ask while nobody else uses the server.",
            ) from error

    def tokenize(self, text: str) -> list[int]:
        """As Engine.tokenize."""
        return ids_in(self, self.client.post("/tokenize", {"prompt": text}))


def _of_sglang(token: Any) -> dict[int, float]:
    return {id_of(t[1]): number(t[0]) for t in token[1]}
