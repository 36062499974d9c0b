"""SGLang's server: its requests and answers, as documented and as SGLang 0.5.23 has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvtool.core.servers.client import Client, Refused
from kvtool.core.servers.engine import (
    FIRST,
    WANTED,
    Completion,
    Request,
    Salts,
    Slotless,
    completion,
    first_answer,
    id_of,
    ids_in,
    number,
    pairs_in,
    whole,
)
from kvtool.errors import ServerError

# Paths of newer versions first; 0.5.8 has both.
MODEL_INFO = ("/model_info", "/get_model_info")
SERVER_INFO = ("/server_info", "/get_server_info")
FLUSH: Request = ("/flush_cache", {})
N_FLUSHES = 5  # at most; its scheduler takes a moment to notice that it is idle
PAUSE = 0.5  # seconds between them


class SGLang(Slotless):
    """SGLang's server, by /generate.

    `extra_key` tells it whose cache a request may use. Versions before 0.5.3 do not know it, and
    report reuse where there should be none: from then on all that is kept is dropped in between.
    """

    name = "sglang"
    to_tell_reuse = "Ask SGLang itself, of a version whose answers have meta_info.cached_tokens."
    to_give_more = "Ask SGLang itself: it gives as many as top_logprobs_num asks for."

    def __init__(self, client: Client, info: dict[str, Any]) -> None:
        self.client = client
        self.model = client.masked(str(info.get("model_path", "")))
        sizes = _server_info(client)
        limits = [whole(sizes.get(key)) for key in ("max_req_input_len", "max_total_num_tokens")]
        self.context = min(filter(None, limits), default=0)
        self.slots, self.chunk = 0, whole(sizes.get("chunked_prefill_size"))
        self.no_cache = "--disable-radix-cache" if sizes.get("disable_radix_cache") is True else ""
        self.cold_by = "extra_key"
        self._salts = Salts()
        self._salt = ""  # of what it keeps, where it is flushed

    def identity(self) -> dict[str, str]:
        """As Engine.identity."""
        info = first_answer(self.client, MODEL_INFO)
        return {
            key: self.client.masked(str(info.get(key, "")))
            for key in ("model_path", "weight_version")
        }

    @property
    def _is_flushed(self) -> bool:
        return self.cold_by == FLUSH[0]

    def requests(
        self,
        ids: Sequence[int],
        n: int = 1,
        cached: bool = False,
        salt: str = "",
        slot: int | None = None,
    ) -> list[Request]:
        """As Engine.requests. Without the cache, a key of its own shares nothing."""
        body = {
            "input_ids": list(ids), "return_logprob": True, "top_logprobs_num": WANTED,
            "sampling_params": {"temperature": 0.0, "max_new_tokens": n, "ignore_eos": True},
            "extra_key": self._salts.of(cached, salt),
        }  # fmt: skip
        if not self._is_flushed:
            return [("/generate", body)]
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
        reused = meta.get("cached_tokens")
        if not cached and not self._is_flushed and whole(reused) > FIRST:
            self.cold_by = FLUSH[0]
            return self.complete(ids, n, cached, salt, slot)
        found = pairs_in(meta, "output_token_logprobs", "output_top_logprobs")
        return completion(self, len(ids), n, found, lambda t: t[0][1], _of_sglang, reused)

    def _flush(self) -> None:
        """Drop everything in the cache. The answer is plain text."""
        for left in reversed(range(N_FLUSHES)):
            try:
                self.client.order(*FLUSH)
                return
            except Refused as error:
                if error.code != 400:
                    raise
                if not left:
                    raise ServerError(
                        f"{self.client.url}: did not drop its cache, since it is serving other "
                        "requests",
                        "Ask while nobody else uses the server.",
                    ) from error
            self.client.sleep(PAUSE)

    def tokenize(self, text: str) -> list[int]:
        """As Engine.tokenize."""
        return ids_in(self, self.client.post(*self.tokenize_request(text)))

    def tokenize_request(self, text: str) -> Request:
        """As Engine.tokenize_request."""
        return "/tokenize", {"prompt": text}


def _of_sglang(token: Any) -> dict[int, float]:
    return {id_of(t[1]): number(t[0]) for t in token[1]}


def _server_info(client: Client) -> dict[str, Any]:
    """The server's settings and sizes; {} of one that does not tell them, or not with this key."""
    try:
        return first_answer(client, SERVER_INFO)
    except ServerError:
        return {}
