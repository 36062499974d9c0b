"""The engines that can be judged, and which of them is at an address."""

from __future__ import annotations

from typing import Any

from kvtool.core.servers.client import Client, Refused
from kvtool.core.servers.engine import Engine, first_answer
from kvtool.core.servers.llama_cpp import LlamaCpp
from kvtool.core.servers.sglang import MODEL_INFO, SGLang
from kvtool.core.servers.vllm import VLLM
from kvtool.errors import ServerError, UsageError

# Each engine, and the address that it alone answers as expected, that of newer versions first.
ENGINES: dict[str, tuple[tuple[str, ...], Any, tuple[str, ...]]] = {
    "llama.cpp": (("/props",), LlamaCpp, ("default_generation_settings",)),
    "sglang": (MODEL_INFO, SGLang, ("model_path",)),
    "vllm": (("/v1/models",), VLLM, ("data",)),
}


def connect(client: Client, name: str = "") -> Engine:
    """The engine at a client's address; by its answers, if it has no name.

    Raises UsageError for an unknown name, and ServerError for a server that is none of them.
    """
    if name and name not in ENGINES:
        raise UsageError(f"--engine: {name!r} is unknown (expected {', '.join(ENGINES)})")
    errors: list[ServerError] = []
    for paths, kind, keys in [ENGINES[name]] if name else ENGINES.values():
        try:
            answer = first_answer(client, paths)
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
