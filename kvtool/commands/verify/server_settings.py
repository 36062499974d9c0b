"""The settings of verify-cache --server: arms, prompts, and the engine at an address."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.config import check_float, check_int
from kvtool.errors import FileError, ServerError, UsageError
from kvtool.reading import require_file
from kvtool.registry import choose
from kvtool.ui.output import Output

if TYPE_CHECKING:
    from kvtool.core.servers.engine import Engine

N_PROMPTS, N_THOROUGH = 5, 10
MIN_TAIL = 8
MAX_TOKENS = 4096
MAX_TIMEOUT = 86400.0  # seconds, a day


@dataclass(frozen=True)
class Settings:
    """All settings of verify-cache --server."""

    server: str
    engine: str = ""
    prompts: Path | None = None
    tokens: int | None = None  # behind each prompt; None: as many as suit the engine
    requests: int = 600
    timeout: float = 120.0
    dry_run: bool = False
    promoted: str | None = None
    against: str | None = None
    scenarios: list[str] | None = None
    thorough: bool = False
    lossy: bool = False
    plot: Path | None = None

    def __post_init__(self) -> None:
        check_int("--requests", self.requests, 1)
        check_float("--timeout", self.timeout, 0.0, MAX_TIMEOUT, open_low=True)
        if self.tokens is not None:
            check_int("--tokens", self.tokens, MIN_TAIL, MAX_TOKENS)
        if self.prompts is not None:
            require_file(self.prompts, "prompts, one a line", "--prompts")
        if self.plot is not None and not self.plot.parent.is_dir():
            raise FileError(f"--plot {self.plot}: the folder {self.plot.parent} does not exist")


def names_of(settings: Settings) -> tuple[list[str], list[str]]:
    """The arms on short prompts, and those on long ones. Raises UsageError for an unknown name."""
    from kvtool.core.servers.arms import ARMS, SHORT

    for name in settings.scenarios or []:
        choose(name, list(ARMS), "--scenarios")
    asked = settings.scenarios or (list(ARMS) if settings.thorough else SHORT)
    return [n for n in ARMS if n in asked and not ARMS[n].long], [
        n for n in ARMS if n in asked and ARMS[n].long
    ]


def engine_at(settings: Settings, url: str) -> Engine:
    """The engine at an address. Raises UsageError and ServerError."""
    from kvtool.core.servers.client import Client
    from kvtool.core.servers.engines import connect

    return connect(Client(url, settings.timeout, settings.requests), settings.engine)


def prompts_for(settings: Settings, engine: Engine, out: Output) -> list[list[int]]:
    """The ids of all prompts. Raises FileError, UsageError and ServerError."""
    from kvtool.core.servers.prompts import built_in, ids_of, read_prompts
    from kvtool.core.servers.session import require_room

    if settings.prompts is None:
        ids = built_in(engine, N_THOROUGH if settings.thorough else N_PROMPTS)
    else:
        ids = ids_of(engine, read_prompts(settings.prompts, out.note))
    require_room(engine, ids, tail_of(settings))
    if settings.prompts is not None and len(ids) < N_PROMPTS:
        few = f"{len(ids)} prompt{'s' * (len(ids) != 1)}"
        out.note(f"--prompts: {few}; a verdict of fewer than {N_PROMPTS} is less sure")
    return ids


def tail_of(settings: Settings) -> int:
    """How many tokens follow each prompt."""
    from kvtool.core.servers.texts import TAIL

    return TAIL if settings.tokens is None else settings.tokens


def require_other(engine: Engine, second: Engine, flag: str) -> None:
    """Raise UsageError if two addresses are of one server."""
    from kvtool.core.servers.address import same_server

    if same_server(engine.client.url, second.client.url):
        raise UsageError(f"{flag}: is the same address as --server", "Start a second server.")


def require_same_ids(engine: Engine, second: Engine, flag: str) -> None:
    """Raise UsageError if two servers tokenize one text to different ids."""
    from kvtool.core.servers.prompts import TEXTS

    try:
        ours, others = engine.tokenize(TEXTS[0]), second.tokenize(TEXTS[0])
    except ServerError:
        return  # one has no tokenizer to ask
    if ours != others:
        raise UsageError(
            f"{flag} {second.client.url}: makes other ids of a text than {engine.client.url}",
            "Serve the same model.",
        )


def resolved(
    settings: Settings, engine: Engine, second: Engine | None, prompts: list[list[int]]
) -> dict[str, Any]:
    """The resolved facts about the servers."""
    lengths = [len(ids) for ids in prompts]
    return {
        "url": engine.client.url,
        "engine": engine.name,
        "model": engine.client.masked(Path(engine.model).name or engine.model),
        "context": engine.context,
        "tail": tail_of(settings),
        "prompt_tokens": lengths,
        "prompts": prompts,
        **({} if second is None else {"promoted_url": second.client.url}),
        **(
            {}
            if second is None
            else {"promoted_model": second.client.masked(Path(second.model).name)}
        ),
    }
