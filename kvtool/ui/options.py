"""The options that commands share, each declared once: name, help, completion, place in the help.

Use them as annotations: `def command(model: Model = "", lengths: Lengths = LENGTHS) -> None`.
Texts and numbers are checked by the configuration that a command builds, not here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kvtool.config import DEVICES, DTYPES, LENGTH_PENALTY, check_setting, require_cache_kind
from kvtool.errors import UsageError
from kvtool.files import model_folder, shipped_models
from kvtool.reading import require_file
from kvtool.registry import CACHE_SETTINGS, CACHES, KERNELS, choose, split_kind, with_settings
from kvtool.ui.lists import lengths, list_option

MODEL = "Model"
MACHINE = "Machine"
WITH_SETTINGS = "with settings: sliding:window=64"
KIND = "Settings of cache kinds"
REPORT = "Output"
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
ALL_CACHES = list(CACHES)
ALL_KERNELS = list(KERNELS)


def _complete(names: Callable[[], list[str]]) -> Callable[[str], list[str]]:
    def suggest(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return suggest


def cache_kinds(text: str, flag: str) -> list[str]:
    """One registered cache kind, or "all" of them. Raises UsageError with the nearest name."""
    return list(CACHES) if text == "all" else [require_cache_kind(text, flag)]


def caches_option(element: Callable[[str, str], list[str]]) -> typer.models.OptionInfo:
    """--caches, each of whose values `element` reads."""
    return list_option(
        "--caches",
        element=element,
        example="none static",
        help=f"Cache kinds: {', '.join(CACHES)}; or all; {WITH_SETTINGS}.",
        metavar="KIND...",
        unique=True,
        complete=lambda: list(CACHES),
    )


def _cache(value: str) -> str:
    return require_cache_kind(value, "--cache")


def kernels_kind(text: str, flag: str) -> str:
    """One registered kind of kernels. Raises UsageError with the nearest name."""
    return choose(text, list(KERNELS), flag)


def _kernels(value: str) -> str:
    return kernels_kind(value, "--kernels")


def utf8_text(param: typer.CallbackParam, value: str | None) -> str | None:
    """The text of an option. Raises UsageError with the offset of a byte that is not UTF-8."""
    if value is None:
        return None
    data = value.encode("utf-8", "surrogateescape")  # how Python keeps such bytes in sys.argv
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        flag = param.opts[0]
        raise UsageError(f"{flag}: is not UTF-8 ({found})", "Convert it to UTF-8.") from error


def require_inputs(model: str, *files: tuple[str, Path | None, str]) -> None:
    """Raise FileError for a model, or files as (flag, path, what), that are not there: at once, and
    not when torch is loaded, seconds later."""
    if model:
        model_folder(model)
    for flag, path, what in files:
        if path is not None:
            require_file(path, what, flag)


def plot_file(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """The path of a plot, if its suffix is one that can be drawn. Raises UsageError."""
    if value is not None:
        require_plot_format(value, param.opts[0])
    return value


def require_plot_format(path: Path, flag: str) -> None:
    """Raise UsageError for a suffix that cannot be drawn."""
    if path.suffix.lower() not in PLOT_SUFFIXES:
        found = path.suffix or "no suffix"
        raise UsageError(f"{flag} {path}: {found} is not a plot format", "Use .png, .svg or .pdf.")


Model = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="PATH|NAME",
        show_default="the shipped decoder",
        help="A checkpoint folder, kvtool's or of Hugging Face (gpt2, llama, mistral, qwen2, "
        "qwen3, gemma2, gemma3, phi3, olmo2, granite, smollm3, deepseek_v2, deepseek_v3), a GGUF "
        "file (llama, qwen2, qwen3, gpt2), or the name of a shipped model or of a repository in "
        "Hugging Face's cache.",
        autocompletion=_complete(shipped_models),
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="|".join(DEVICES),
        help="Where to run.",
        autocompletion=_complete(lambda: list(DEVICES)),
        rich_help_panel=MACHINE,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help=f"Number format: {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.",
        autocompletion=_complete(lambda: list(DTYPES)),
        rich_help_panel=MODEL,
    ),
]
Threads = Annotated[
    int,
    typer.Option(
        "--threads",
        metavar="N",
        help="CPU threads (0: torch's choice).",
        rich_help_panel=MACHINE,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", metavar="N", help="Seed of every random choice.", rich_help_panel=MACHINE
    ),
]

Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document instead.", rich_help_panel=REPORT),
]
GitHub = Annotated[
    bool,
    typer.Option(
        "--github",
        help="In GitHub Actions: annotate what is wrong, and add the report to the step's summary.",
        rich_help_panel=REPORT,
    ),
]
OutputFile = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="FILE",
        help="Also write the result here: .json, .csv or .md.",
        rich_help_panel=REPORT,
    ),
]
OutputOfChecks = Annotated[
    list[Path],
    typer.Option(
        "--output",
        metavar="FILE",
        help="Also write the result here: .json, .csv, .md, .html, or .xml for JUnit. May be given "
        "several times.",
        rich_help_panel=REPORT,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No progress and no notes.", rich_help_panel=REPORT),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Say more on stderr.", rich_help_panel=REPORT),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=REPORT),
]


def kinds_with_settings(kinds: list[str], **given: int | None) -> list[str]:
    """Kinds of caches with what --window and its like say of them. Raises UsageError for an option
    that none of the kinds has, or that all of them say themselves."""
    for name, value in given.items():
        if value is None:
            continue
        check_setting(f"--{name}", name, value)
        having = [k for k in kinds if name in CACHE_SETTINGS.get(split_kind(k)[0], ())]
        if not having:
            names = dict.fromkeys(split_kind(kind)[0] for kind in kinds)
            owners = [kind for kind, settings in CACHE_SETTINGS.items() if name in settings]
            raise UsageError(
                f"--{name}: no setting of {', '.join(names)}",
                f"It belongs to {' and '.join(owners)}.",
            )
        if all(name in split_kind(kind)[1] for kind in having):
            raise UsageError(f"--{name}: contradicts {having[0]}", "Give one of them.")
    return [with_settings(kind, given) for kind in kinds]


SETTINGS = {
    "window": "sliding: how many tokens are seen, the newest included.",
    "sinks": "sliding: how many first tokens are kept.",
    "group": "int8, int4: tokens, or channels, that share a scale.",
    "residual": "int8, int4: at least the N newest tokens stay exact.",
    "page": "paged: tokens of a page.",
}


def setting(name: str, default: str) -> Any:
    """Declare the option of a kind's setting, and what it is unless given."""
    return typer.Option(
        f"--{name}",
        metavar="N",
        help=SETTINGS[name],
        show_default=default,
        rich_help_panel=KIND,
    )


Window = Annotated[int | None, setting("window", "the model's own window, or 256")]
Sinks = Annotated[int | None, setting("sinks", "4")]
Group = Annotated[int | None, setting("group", "32")]
Residual = Annotated[int | None, setting("residual", "32")]
Page = Annotated[int | None, setting("page", "16")]
Cache = Annotated[
    str,
    typer.Option(
        "--cache",
        metavar="KIND",
        help=f"The cache kind: {', '.join(CACHES)}; {WITH_SETTINGS}.",
        callback=_cache,
        autocompletion=_complete(lambda: list(CACHES)),
    ),
]
Kernels = Annotated[
    str,
    typer.Option(
        "--kernels",
        metavar="|".join(KERNELS),
        help="exact: cached and uncached logits are equal bit for bit; passes without a cache take "
        "longer.",
        callback=_kernels,
        autocompletion=_complete(lambda: list(KERNELS)),
    ),
]
Caches = Annotated[list[str], caches_option(cache_kinds)]
KernelsList = Annotated[
    list[str],
    list_option(
        "--kernels",
        element=kernels_kind,
        example="default exact",
        help=f"Kernels: {', '.join(KERNELS)}.",
        metavar="KIND...",
        unique=True,
        complete=lambda: list(KERNELS),
    ),
]


def length_penalty(panel: str) -> Any:
    """Declare --length-penalty of beam search, in a panel of the help."""
    return typer.Option(
        "--length-penalty",
        metavar="X",
        show_default=f"{LENGTH_PENALTY:g}",
        help="0 favours short results, 1 does not (Wu 2016).",
        rich_help_panel=panel,
    )


Lengths = Annotated[
    list[int],
    list_option(
        "--lengths",
        element=lengths,
        example="10 50 100",
        help="Sequence lengths, in tokens; 16-1024*2 and 10-50+10 are ranges.",
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option("--prompt", metavar="TEXT", help="The text to start from.", callback=utf8_text),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompt-file",
        metavar="FILE",
        help="Read the prompt from a UTF-8 file, all of it: a line break at its end too.",
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot", metavar="FILE", help="Draw the result: .png, .svg or .pdf.", callback=plot_file
    ),
]
