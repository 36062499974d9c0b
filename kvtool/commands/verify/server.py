"""verify-cache --server: is the cache of a running engine right, as seen from outside?"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NoReturn

from kvtool.commands.verify.server_against import run_against, show_against
from kvtool.commands.verify.server_dry import DryReport, dry_report, show_dry
from kvtool.commands.verify.server_report import VisitReport, draw, show
from kvtool.commands.verify.server_settings import (
    Settings,
    engine_at,
    names_of,
    prompts_for,
    require_other,
    require_same_ids,
    resolved,
    tail_of,
)  # fmt: skip
from kvtool.ending import until_ended
from kvtool.errors import ServerError
from kvtool.ui.output import Output, present

if TYPE_CHECKING:
    from kvtool.core.servers.engine import Engine


def present_visit(settings: Settings, out: Output) -> NoReturn:
    """Ask the server, or print the requests of a dry run. Raises typer.Exit and ServerError."""
    if settings.dry_run:
        present("verify-cache.server.dry-run", settings, run_dry, show_dry, out)
    if settings.against is not None:
        present("verify-cache.against", settings, run_against, show_against, out)
    if (path := settings.plot) is not None:
        out.draw_later(path, draw)
    present("verify-cache.server", settings, run, show, out, draw)


def run(settings: Settings, out: Output) -> VisitReport:
    """Ask the server, and the promoted one if it is given."""
    from kvtool.core.servers.session import Visit, visit
    from kvtool.core.servers.verdict import with_promoted

    started = time.perf_counter()
    short, long = names_of(settings)
    engine = engine_at(settings, settings.server)
    second = None if settings.promoted is None else engine_at(settings, settings.promoted)
    require_cache(engine, second)
    require_twin(engine, second)
    prompts = prompts_for(settings, engine, out)
    n = len(prompts) * (1 + len(short)) + len(long)
    plain, promoted = Visit(), Visit()
    bars = out.progress(engine.name, n * (1 if second is None else 2))
    with bars as bar, until_ended() as outcome:

        def progress(words: str) -> None:
            bar.update(words)
            bar.advance()

        asked = (prompts, short, long, tail_of(settings), progress)
        visit(engine, *asked, plain)
        if second is not None:
            visit(second, *asked, promoted)
    rows = plain.verdicts([*short, *long])
    if second is not None:
        others = {row.arm: row for row in promoted.verdicts([*short, *long])}
        rows = [with_promoted(row, others[row.arm]) if row.arm in others else row for row in rows]
    left = [name for name in (*short, *long) if name not in {row.arm for row in rows}]
    return VisitReport(
        rows,
        resolved(settings, engine, second, prompts),
        requests_sent=engine.client.n_sent + (second.client.n_sent if second else 0),
        seconds=time.perf_counter() - started,
        grown=plain.grown,
        cut=plain.cut,
        spent=plain.spent or promoted.spent,
        stopped=plain.stopped or promoted.stopped,
        not_run=left,
        not_asked=[] if settings.thorough or settings.scenarios else ["long (--thorough)"],
        ended=outcome.how,
    )


def require_cache(*engines: Engine | None) -> None:
    """Raise ServerError for a server that was started without a cache."""
    for engine in engines:
        if engine is not None and engine.no_cache:
            raise ServerError(
                f"{engine.client.url}: was started with {engine.no_cache}, so it has no cache to "
                "judge",
                "Start it without.",
            )


def require_twin(engine: Engine, second: Engine | None) -> None:
    """Raise UsageError if the promoted server is the same one, or tokenizes a text to other ids."""
    if second is None:
        return
    require_other(engine, second, "--promoted")
    require_same_ids(engine, second, "--promoted")


def run_dry(settings: Settings, out: Output) -> DryReport:
    """The report of a dry run. Only requests that identify a server are sent."""
    from kvtool.core.servers.against import compare
    from kvtool.core.servers.dry import DryEngine
    from kvtool.core.servers.session import Visit, visit

    short, long = names_of(settings)
    urls = [settings.server, settings.promoted or settings.against]
    first, *others = (DryEngine(engine_at(settings, url)) for url in urls if url is not None)

    def progress(words: str) -> None:
        for dry in (first, *others):
            dry.arm = words

    progress("prompts")
    flag = "--against" if settings.promoted is None else "--promoted"
    for dry in others:
        require_other(first, dry, flag)
        require_same_ids(first, dry, flag)
    prompts, tail = prompts_for(settings, first, out), tail_of(settings)
    if settings.against is not None:
        compare(first, others[0], prompts, progress, [], tail)
        for dry in (first, *others):  # before and after
            dry.n_identity += 2
    else:
        for dry in (first, *others):
            visit(dry, prompts, short, long, tail, progress, Visit())
    return dry_report(first, settings.requests, others)
