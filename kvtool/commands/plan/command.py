"""kvtool plan: what a model will take, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

import typer

from kvtool.commands.plan.report import PlanReport, Row
from kvtool.commands.plan.show import show
from kvtool.commands.plan.sizes import read_size
from kvtool.config import DTYPES, OWN, check_int
from kvtool.errors import UsageError
from kvtool.registry import IMPLEMENTATIONS, choose, with_own_window
from kvtool.ui import options as o
from kvtool.ui.lists import list_option
from kvtool.ui.output import Output, present

TRANSFORMERS_KINDS = ("dynamic", "static")
TOKENS = 8192  # or the context, if that is shorter
LOAD = "Load"


@dataclass(frozen=True)
class Settings:
    """Everything that plan was asked for. Sizes are in bytes, and bytes a second."""

    model: str
    tokens: int | None
    batch_size: int
    source_tokens: int | None
    dtype: str | None
    memory: int | None
    bandwidth: int | None
    weights: int | None
    caches: list[str]  # none: those that suit the model
    impl: list[str]

    def __post_init__(self) -> None:
        check_int("--batch-size", self.batch_size, 1)
        for flag, value in (("--tokens", self.tokens), ("--source-tokens", self.source_tokens)):
            if value is not None:
                check_int(flag, value, 1)
        if self.dtype is not None:
            choose(self.dtype, DTYPES, "--dtype")


def run(settings: Settings, out: Output) -> PlanReport:
    """Read the configuration and add up. Raises UsageError and FileError, in one line each."""
    from kvtool.core.plan.source import ITEMSIZES, Weights, describe
    from kvtool.core.plan.sums import Load

    found = describe(settings.model, settings.dtype)
    shapes, weights = found.shapes, found.weights
    if settings.weights is not None:
        share = Fraction(weights.read, weights.nbytes) if weights else found.read_share
        weights = Weights(settings.weights, int(settings.weights * share), "option")
    for flag, value in (("--memory", settings.memory), ("--bandwidth", settings.bandwidth)):
        if value is not None and weights is None:
            raise UsageError(
                f"{flag}: needs the size of the weights: {found.unknown}",
                "Say it: --weights SIZE; or give a folder with safetensors.",
            )
    n = settings.tokens or min(TOKENS, shapes.context or TOKENS)
    if settings.source_tokens is not None and not shapes.cross:
        raise UsageError("--source-tokens: is for encoder-decoders", "Leave it out.")
    source = (settings.source_tokens or shapes.source_tokens or n) if shapes.cross else 0
    load = Load(settings.batch_size, n, source)
    size = ITEMSIZES[found.dtype]
    return PlanReport(
        model=found.name,
        model_type=found.model_type,
        dtype=found.dtype,
        dtype_assumed=found.dtype_assumed,
        rows_planned=load.rows,
        tokens=n,
        source_tokens=source,
        context=shapes.context,
        layers=_layers(shapes),
        weights_bytes=weights.nbytes if weights else None,
        weights_read_bytes=weights.read if weights else None,
        weights_said_by=weights.said_by if weights else "",
        weights_unknown="" if weights else found.unknown,
        expanded_token_bytes=len(shapes.layers) * shapes.expanded * size or None,
        memory=settings.memory,
        bandwidth=settings.bandwidth,
        caches=[_row(cache, load, weights, settings) for cache in _caches(settings, found, size)],
        resolved={"model": found.name, "dtype": found.dtype},
    )


def _layers(shapes: Any) -> list[dict[str, Any]]:
    """Layers that are alike, once, with their number."""
    found: dict[Any, int] = {}
    for layer in shapes.layers:
        found[layer] = found.get(layer, 0) + 1
    rows = [{"layers": n, **vars(layer)} for layer, n in found.items()]
    if sharing := shapes.n_layers - len(shapes.layers):
        rows.append({"layers": sharing, "n_heads": 0, "key_dim": 0, "value_dim": 0, "window": 0})
    return rows


def _caches(settings: Settings, described: Any, size: int) -> list[Any]:
    from kvtool.core.plan.sums import KVTOOL, Cache, kinds_of

    shapes = described.shapes
    kinds = settings.caches or kinds_of(shapes)
    window = max(shapes.windows, default=0)
    found = []
    for impl in settings.impl:
        if impl != KVTOOL and described.model_type.startswith(OWN) and KVTOOL in settings.impl:
            continue  # transformers has no such model
        for kind in kinds:
            if impl == KVTOOL:
                found.append(Cache(impl, with_own_window(kind, window), shapes, size))
            elif kind in TRANSFORMERS_KINDS:
                found.append(Cache(impl, kind, shapes, size))
    if not found:
        raise UsageError(
            f"--caches: {kinds[0]} is no kind of transformers "
            f"(expected {' or '.join(TRANSFORMERS_KINDS)})",
            "Add kvtool to --impl.",
        )
    return found


def _row(cache: Any, load: Any, weights: Any, settings: Settings) -> Row:
    held, peak = cache.held(load), cache.peak(load)
    fits = most_rows = most_tokens = floor = None
    if settings.memory is not None:
        room = settings.memory - weights.nbytes
        fits = peak <= room
        most_rows, most_tokens = cache.most_rows(load, room), cache.most_tokens(load, room)
    if settings.bandwidth is not None:
        floor = (weights.read + held.live) / settings.bandwidth
    return Row(
        cache=cache.kind,
        impl=cache.impl,
        exact=cache.exact,
        bytes=held.allocated,
        peak_bytes=peak,
        bytes_read=held.live,
        bytes_per_token=cache.token_nbytes(load),
        source_bytes=cache.source_nbytes(load),
        fits=fits,
        most_rows=most_rows,
        most_tokens=most_tokens,
        floor_s=floor,
        **cache.pages(load),
    )


def _size(flag: str, text: str | None, per_second: bool = False) -> int | None:
    return None if text is None else read_size(flag, text, per_second)


def implementation(text: str, flag: str) -> str:
    """One implementation. Raises UsageError with the nearest name."""
    return choose(text, IMPLEMENTATIONS, flag)


def cache_kinds(text: str, flag: str) -> list[str]:
    """One kind, or "all". Raises UsageError with the kinds of both implementations."""
    try:
        return o.cache_kinds(text, flag)
    except UsageError as error:
        of_theirs = f"Kinds of transformers: {' and '.join(TRANSFORMERS_KINDS)}."
        raise UsageError(error.message, f"{error.hint} {of_theirs}".strip()) from error


def command(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="PATH|TYPE",
            show_default="the shipped decoder",
            help="A model's folder or its config.json, a GGUF file, or a type of transformers "
            "(llama, gemma3_text, ...), which then has its default sizes.",
            rich_help_panel=o.MODEL,
        ),
    ] = "",
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            metavar="N",
            show_default="8192, or the context",
            help="Tokens of each row, the prompt's and the new ones.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size", metavar="N", help="Sequences side by side.", rich_help_panel=LOAD
        ),
    ] = 1,
    source_tokens: Annotated[
        int | None,
        typer.Option(
            "--source-tokens",
            metavar="N",
            show_default="the model's own, or --tokens",
            help="Tokens of each source that an encoder-decoder reads.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Say what fits into it beside the weights: 24GiB, 80GB.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            "--bandwidth",
            metavar="SIZE/s",
            help="Say how long a token takes at least, if weights and cache are read once: "
            "300GB/s.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="SIZE",
            show_default="counted",
            help="The weights' size, where it is not known or will be another.",
            rich_help_panel=o.MODEL,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            show_default="as stored, else bfloat16",
            help=f"Number format of weights, keys and values: {', '.join(DTYPES)}.",
            rich_help_panel=o.MODEL,
        ),
    ] = None,
    caches: Annotated[list[str], o.caches_option(cache_kinds)] = [],  # noqa: B006
    impl: Annotated[
        list[str],
        list_option(
            "--impl",
            element=implementation,
            example="kvtool transformers",
            help="Whose caches: kvtool's, or those of transformers (dynamic, static).",
            metavar="NAME...",
            unique=True,
            complete=lambda: list(IMPLEMENTATIONS),
        ),
    ] = list(IMPLEMENTATIONS),  # noqa: B006
    window: o.Window = None,
    sinks: o.Sinks = None,
    group: o.Group = None,
    residual: o.Residual = None,
    page: o.Page = None,
    as_json: o.Json = False,
    output_file: o.OutputFile = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Say what weights and caches will take, before anything runs or is downloaded.

    All of it follows from config.json, or from a GGUF file's header: no weight is read. Bytes are
    those of keys and values, and of the weights; what a pass needs besides, and what a runtime
    takes, is not counted. --memory says how many rows and tokens fit, and exit code 1 that the
    load does not fit with any kind. What is not understood is refused, never guessed.

      kvtool plan --model llama --tokens 8192 --batch-size 16

      kvtool plan --model config.json --memory 80GB

      kvtool plan --model model.gguf --bandwidth 3.35TB/s
    """
    out = Output(as_json, output_file, quiet, verbose)
    given = {"window": window, "sinks": sinks, "group": group, "residual": residual, "page": page}
    settings = Settings(
        model=model,
        tokens=tokens,
        batch_size=batch_size,
        source_tokens=source_tokens,
        dtype=dtype,
        memory=_size("--memory", memory),
        bandwidth=_size("--bandwidth", bandwidth, per_second=True),
        weights=_size("--weights", weights),
        caches=_kinds(caches, given),
        impl=impl,
    )
    present("plan", settings, run, show, out)


def _kinds(caches: list[str], given: dict[str, int | None]) -> list[str]:
    """The kinds with their settings; without --caches, all that a setting may belong to."""
    asked = any(value is not None for value in given.values())
    if not caches and not asked:
        return []
    usual = [kind for kind in o.ALL_CACHES if kind not in ("none", "sliding")]
    if given["window"] is not None or given["sinks"] is not None:
        usual.insert(2, "sliding")
    return o.kinds_with_settings(caches or usual, **given)
