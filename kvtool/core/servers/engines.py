"""What llama.cpp, vLLM and SGLang are asked for, and what they answer: logprobs of token ids."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from kvtool.core.servers.client import Client, Refused
from kvtool.errors import ServerError, UsageError

WANTED = 256  # likeliest tokens asked for at each position, where a server gives as many
LEAST_LOGPROB = -110.0  # the logarithm of float32's least number is -103; less is a mark for 0
LARGEST_LOGPROB = 1e-3  # 0, as far as engines round it
MOST_ID = 2**31
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

    def identity(self) -> dict[str, str]:
        """What tells this model from another, asked for anew. Raises ServerError."""

    def requests(
        self, ids: Sequence[int], n: int = 1, cached: bool = False, salt: str = ""
    ) -> list[Request]:
        """What `complete` sends."""

    def complete(
        self, ids: Sequence[int], n: int = 1, cached: bool = False, salt: str = ""
    ) -> Completion:
        """Continue `ids` greedily by n tokens, with the cache or without it.

        salt: requests of one salt share a cache, where the engine has salts. Raises ServerError.
        """

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text. Raises ServerError."""


class LlamaCpp:
    """llama-server of llama.cpp, by its own /completion."""

    name = "llama.cpp"

    def __init__(self, client: Client, props: dict[str, Any]) -> None:
        self.client = client
        self.model = str(props.get("model_alias") or props.get("model_path") or "")
        settings = props.get("default_generation_settings")
        self.context = _whole(settings.get("n_ctx")) if isinstance(settings, dict) else 0
        self.slots = _whole(props.get("total_slots"))
        self.chunk = _whole(props.get("n_ubatch")) or 512  # it is not told, and by default 512

    def identity(self) -> dict[str, str]:
        """As Engine.identity."""
        props = self.client.get("/props")
        return {key: str(props.get(key, "")) for key in ("model_path", "model_ftype", "build_info")}

    def requests(
        self, ids: Sequence[int], n: int = 1, cached: bool = False, salt: str = ""
    ) -> list[Request]:
        """As Engine.requests. `cache_prompt: false` still leaves the prompt in the slot."""
        body = {
            "prompt": list(ids), "n_predict": n, "n_probs": WANTED, "cache_prompt": cached,
            "temperature": 0.0, "samplers": ["temperature"], "return_tokens": True,
            "ignore_eos": True,
        }  # fmt: skip
        return [("/completion", body)]

    def complete(
        self, ids: Sequence[int], n: int = 1, cached: bool = False, salt: str = ""
    ) -> Completion:
        """As Engine.complete."""
        ((path, body),) = self.requests(ids, n, cached, salt)
        answer = self.client.post(path, body)
        found, tokens = answer.get("completion_probabilities"), answer.get("tokens")
        if isinstance(tokens, list) and tokens and isinstance(found or [], list):
            # It leaves out tokens that end within a letter: what is behind one stands elsewhere.
            same = [_id_of(t) == token for t, token in zip(found or [], tokens, strict=False)]
            found = (found or [])[: [*same, False].index(False)]
            if not found:
                return Completion((), (), None)
        timings = answer.get("timings")
        reused = timings.get("cache_n") if isinstance(timings, dict) else None
        return _completion(self, found, lambda t: t["id"], _of_llama_cpp, reused)

    def tokenize(self, text: str) -> list[int]:
        """As Engine.tokenize, with the tokens that begin a text."""
        body = {"content": text, "add_special": True}
        return _ids(self, self.client.post("/tokenize", body))


def _id_of(token: Any) -> Any:
    return token.get("id") if isinstance(token, dict) else None


def _of_llama_cpp(token: Any) -> dict[int, float]:
    return {_id(t["id"]): _number(t["logprob"]) for t in token["top_logprobs"]}


class VLLM:
    """vLLM's server, by /v1/completions."""

    name = "vllm"

    def __init__(self, client: Client, models: dict[str, Any]) -> None:
        self.client = client
        first = _first(models)
        self.model, self.context = str(first.get("id", "")), _whole(first.get("max_model_len"))
        self.slots, self.chunk = 0, 2048  # max_num_batched_tokens is not told, and by default this
        self._own = f"kvtool-{os.urandom(8).hex()}"  # shares nothing with earlier visits
        self._unused = (f"{self._own}-cold-{i}" for i in itertools.count())
        self._n_wanted = 0

    def identity(self) -> dict[str, str]:
        """As Engine.identity."""
        first = _first(self.client.get("/v1/models"))
        return {key: str(first.get(key, "")) for key in ("id", "root", "max_model_len")}

    def requests(
        self, ids: Sequence[int], n: int = 1, cached: bool = False, salt: str = ""
    ) -> list[Request]:
        """As Engine.requests. Without the cache, a salt of its own shares nothing."""
        body = {
            "model": self.model, "prompt": list(ids), "max_tokens": n, "temperature": 0.0,
            "return_tokens_as_token_ids": True, "ignore_eos": True,
            "cache_salt": f"{self._own}-{salt}" if cached and salt else next(self._unused),
            "logprobs": self._n_wanted or WANTED,
        }  # fmt: skip
        return [("/v1/completions", body)]

    def complete(
        self, ids: Sequence[int], n: int = 1, cached: bool = False, salt: str = ""
    ) -> Completion:
        """As Engine.complete."""
        ((_, body),) = self.requests(ids, n, cached, salt)
        answer = self._with_logprobs(body)
        choices = answer.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        choice = (first.get("logprobs") if isinstance(first, dict) else None) or {}
        found = list(zip(choice.get("tokens", []), choice.get("top_logprobs", []), strict=False))
        usage = answer.get("usage") or {}
        details = usage.get("prompt_tokens_details")
        reused = details.get("cached_tokens") if isinstance(details, dict) else None
        return _completion(self, found, lambda t: _named(t[0]), _of_vllm, reused)

    def _with_logprobs(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer with as many logprobs as the server allows, found at the first request."""
        allowed = [self._n_wanted] if self._n_wanted else [WANTED, 20, NEEDED]
        for n in allowed:
            try:
                answer = self.client.post("/v1/completions", {**body, "logprobs": n})
            except Refused as error:
                if error.code != 400 or "logprob" not in error.message.lower():
                    raise
                continue
            self._n_wanted = n
            return answer
        raise _too_few(self)

    def tokenize(self, text: str) -> list[int]:
        """As Engine.tokenize."""
        return _ids(self, self.client.post("/tokenize", {"model": self.model, "prompt": text}))


def _first(models: dict[str, Any]) -> dict[str, Any]:
    """The model that a server names first."""
    found = models.get("data")
    return found[0] if isinstance(found, list) and found and isinstance(found[0], dict) else {}


def _of_vllm(token: Any) -> dict[int, float]:
    return {_named(name): _number(value) for name, value in token[1].items()}


def _named(name: str) -> int:
    """The id of vLLM's token_id:123."""
    return int(name.removeprefix("token_id:"))


class SGLang:
    """SGLang's server, by /generate."""

    name = "sglang"

    def __init__(self, client: Client, info: dict[str, Any]) -> None:
        self.client = client
        self.model = str(info.get("model_path", ""))
        self.context = _whole(info.get("context_length") or info.get("max_total_num_tokens"))
        self.slots, self.chunk = 0, 0

    def identity(self) -> dict[str, str]:
        """As Engine.identity."""
        info = self.client.get("/get_model_info")
        return {key: str(info.get(key, "")) for key in ("model_path", "weight_version")}

    def requests(
        self, ids: Sequence[int], n: int = 1, cached: bool = False, salt: str = ""
    ) -> list[Request]:
        """As Engine.requests. Without the cache, everything in it is dropped first."""
        body = {
            "input_ids": list(ids), "return_logprob": True, "top_logprobs_num": WANTED,
            "sampling_params": {"temperature": 0.0, "max_new_tokens": n, "ignore_eos": True},
        }  # fmt: skip
        flushed: list[Request] = [] if cached else [("/flush_cache", {})]
        return [*flushed, ("/generate", body)]

    def complete(
        self, ids: Sequence[int], n: int = 1, cached: bool = False, salt: str = ""
    ) -> Completion:
        """As Engine.complete."""
        for path, body in self.requests(ids, n, cached, salt):
            answer = self.client.post(path, body)
        meta = answer.get("meta_info")
        meta = meta if isinstance(meta, dict) else {}
        tokens, tops = meta.get("output_token_logprobs"), meta.get("output_top_logprobs")
        found = list(zip(tokens or [], tops or [], strict=False))
        return _completion(self, found, lambda t: t[0][1], _of_sglang, meta.get("cached_tokens"))

    def tokenize(self, text: str) -> list[int]:
        """As Engine.tokenize."""
        return _ids(self, self.client.post("/tokenize", {"prompt": text}))


def _of_sglang(token: Any) -> dict[int, float]:
    return {_id(t[1]): _number(t[0]) for t in token[1]}


def _completion(engine: Engine, found: Any, id_of: Any, likeliest: Any, reused: Any) -> Completion:
    """The Completion of a server's list of tokens. Raises ServerError for what lacks logprobs."""
    try:
        tokens = tuple(_id(id_of(token)) for token in found)
        tops = tuple(likeliest(token) for token in found)
    except (TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
        raise _no_logprobs(engine) from error
    if not tokens or not all(tops):
        raise _no_logprobs(engine)
    if not all(0 <= i < MOST_ID for top in tops for i in (*top, *tokens)):
        raise _no_logprobs(engine)
    if any(p > LARGEST_LOGPROB for top in tops for p in top.values()):
        text = f"{engine.client.url}: its logprobs are above 0, which no logarithm of a share is"
        raise ServerError(text, "Let it give natural logarithms, before any sampling.")
    if not all(math.isfinite(p) for top in tops for p in top.values()):
        raise NotFinite(f"{engine.client.url}: its logprobs are no numbers (NaN)")
    if min(map(len, tops)) < NEEDED:
        raise _too_few(engine, min(map(len, tops)))
    return Completion(tokens, tops, reused if type(reused) is int and reused >= 0 else None)


def _id(value: Any) -> int:
    """A token id, which some write as a text."""
    if isinstance(value, int | str) and not isinstance(value, bool):
        return int(value)
    raise TypeError


def _number(value: Any) -> float:
    """A logprob, not below what float32 can tell from 0; NaN for what JSON has as null."""
    if value is None:
        return math.nan
    if isinstance(value, bool):
        raise TypeError
    return max(float(value), LEAST_LOGPROB)


def _no_logprobs(engine: Engine) -> ServerError:
    return ServerError(
        f"{engine.client.url}: its answer has no logprobs of token ids as {engine.name} gives them",
        "Name the engine with --engine, and let its API give logprobs.",
    )


def _too_few(engine: Engine, n: int = 0) -> ServerError:
    found = f"{n} found" if n else "or none"
    return ServerError(
        f"{engine.client.url}: gives fewer than {NEEDED} logprobs at a token ({found})",
        "Let the server give more: --max-logprobs -1 of vLLM.",
    )


def _ids(engine: Engine, answer: dict[str, Any]) -> list[int]:
    found = answer.get("tokens")
    if not isinstance(found, list) or not all(type(i) is int and 0 <= i < MOST_ID for i in found):
        raise ServerError(f"{engine.client.url}: did not answer with the ids of a text")
    return found


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


# Each engine, and the address that it alone answers as expected.
ENGINES: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "llama.cpp": ("/props", LlamaCpp, ("default_generation_settings",)),
    "sglang": ("/get_model_info", SGLang, ("model_path",)),
    "vllm": ("/v1/models", VLLM, ("data",)),
}


def connect(client: Client, name: str = "") -> Engine:
    """The engine at a client's address; by its answers, if it has no name.

    Raises UsageError for an unknown name, and ServerError for a server that is none of them.
    """
    if name and name not in ENGINES:
        raise UsageError(f"--engine: {name!r} is unknown (expected {', '.join(ENGINES)})")
    errors: list[ServerError] = []
    for path, kind, keys in [ENGINES[name]] if name else ENGINES.values():
        try:
            answer = client.get(path)
        except Refused as error:  # after other errors no other path would help
            errors.append(error)
            continue
        if all(answer.get(key) for key in keys):
            engine: Engine = kind(client, answer)
            return engine
    if name:
        said = f" ({errors[0].message})" if errors else ""
        raise ServerError(
            f"{client.url}: does not answer as {name} does{said}",
            "Leave --engine out, or name another.",
        )
    raise ServerError(
        f"{client.url}: is no server of {', '.join(ENGINES)} that can be recognised",
        "Name the engine with --engine.",
    )
