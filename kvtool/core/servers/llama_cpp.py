"""llama.cpp's server: its requests and answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvtool.core.servers.client import Client
from kvtool.core.servers.engine import (
    WANTED,
    Completion,
    Request,
    completion,
    id_of,
    ids_in,
    number,
    whole,
)

LETTER = 4  # bytes of the longest letter in UTF-8
SLOT_FILE = "kvtool-verify-cache.bin"  # in the server's own folder for slots


class LlamaCpp:
    """llama-server of llama.cpp, by its own /completion."""

    name = "llama.cpp"
    to_tell_reuse = "Ask llama-server itself, of a version whose answers have timings.cache_n."
    cold_by = "cache_prompt"
    to_give_more = "Ask llama-server itself: it gives as many as n_probs asks for."
    no_cache = ""

    def __init__(self, client: Client, props: dict[str, Any]) -> None:
        self.client = client
        self.model = client.masked(str(props.get("model_alias") or props.get("model_path") or ""))
        settings = props.get("default_generation_settings")
        self.context = whole(settings.get("n_ctx")) if isinstance(settings, dict) else 0
        self.slots = whole(props.get("total_slots"))
        self.chunk = whole(props.get("n_ubatch")) or 512  # it is not told, and by default 512

    def identity(self) -> dict[str, str]:
        """As Engine.identity."""
        props = self.client.get("/props")
        return {
            key: self.client.masked(str(props.get(key, "")))
            for key in ("model_path", "model_ftype", "build_info")
        }

    def requests(
        self,
        ids: Sequence[int],
        n: int = 1,
        cached: bool = False,
        salt: str = "",
        slot: int | None = None,
    ) -> list[Request]:
        """As Engine.requests. `cache_prompt: false` still leaves the prompt in the slot."""
        body = {
            "prompt": list(ids), "n_predict": n, "n_probs": WANTED, "cache_prompt": cached,
            "temperature": 0.0, "samplers": ["temperature"], "return_tokens": True,
            "ignore_eos": True, **({} if slot is None else {"id_slot": slot}),
        }  # fmt: skip
        return [("/completion", body)]

    def complete(
        self,
        ids: Sequence[int],
        n: int = 1,
        cached: bool = False,
        salt: str = "",
        slot: int | None = None,
    ) -> Completion:
        """As Engine.complete."""
        ((path, body),) = self.requests(ids, n, cached, salt, slot)
        answer = self.client.post(path, body)
        found, tokens = answer.get("completion_probabilities"), answer.get("tokens")
        if isinstance(tokens, list) and tokens:
            if not found and _within_a_letter(answer.get("content"), tokens):
                return Completion((), (), None)
            if isinstance(found, list) and found:
                # It leaves out tokens that end within a letter: what is behind one stands
                # elsewhere.
                names, first = [str(token) for token in tokens], _token_id(found[0])
                same = [_token_id(t) == i for t, i in zip(found, names, strict=False)]
                found = found[: [*same, False].index(False)]
                if not found and first in names:
                    return Completion((), (), None)
        timings = answer.get("timings")
        reused = timings.get("cache_n") if isinstance(timings, dict) else None
        told = completion(self, len(ids), n, found, lambda t: t["id"], _of_llama_cpp, reused)
        if isinstance(tokens, list) and len(tokens) >= n:  # it decoded what has no logprobs
            return told._replace(lacking=0)
        return told

    def tokenize(self, text: str) -> list[int]:
        """As Engine.tokenize, with the tokens that begin a text."""
        return ids_in(self, self.client.post(*self.tokenize_request(text)))

    def tokenize_request(self, text: str) -> Request:
        """As Engine.tokenize_request."""
        return "/tokenize", {"content": text, "add_special": True}

    def file_slot(self, slot: int, action: str) -> int:
        """As Engine.file_slot."""
        answer = self.client.post(*slot_request(slot, action))
        return whole(answer.get(f"n_{action}d"))


def slot_request(slot: int, action: str) -> Request:
    """The request to save or restore a slot. Each save replaces the file."""
    return f"/slots/{slot}?action={action}", {"filename": SLOT_FILE}


def _token_id(token: Any) -> str:
    return str(token.get("id")) if isinstance(token, dict) else ""


def _within_a_letter(content: Any, tokens: Sequence[Any]) -> bool:
    """Whether an answer ends within its first letter, so that it has no logprobs yet."""
    return isinstance(content, str) and not content.strip("\ufffd") and len(tokens) < LETTER


def _of_llama_cpp(token: Any) -> dict[int, float]:
    return {id_of(t["id"]): number(t["logprob"]) for t in token["top_logprobs"]}
