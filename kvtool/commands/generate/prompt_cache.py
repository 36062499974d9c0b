"""generate with a prompt's cache in a file: what can be refused before, and what is told after."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtool.errors import UsageError
from kvtool.ui.output import Output

if TYPE_CHECKING:
    from kvtool.commands.generate.generator import Generator
    from kvtool.commands.generate.settings import Settings
    from kvtool.core.checkpoint.checkpoint import Checkpoint

CACHE_FILES = "A long prompt, computed once"

SaveCache = Annotated[
    Path | None,
    typer.Option(
        "--save-cache",
        metavar="FILE",
        help="Keep the prompt's keys and values, so that it need not be computed again.",
        rich_help_panel=CACHE_FILES,
    ),
]
LoadCache = Annotated[
    Path | None,
    typer.Option(
        "--load-cache",
        metavar="FILE",
        help="Take from such a file what the prompt has in common with that one. Only from people "
        "you trust: what it holds decides what the model says, and cannot be checked.",
        rich_help_panel=CACHE_FILES,
    ),
]


def prepare_cache_files(settings: Settings, loaded: Checkpoint, generator: Generator) -> None:
    """Read --load-cache, and refuse before any work what cannot be saved or loaded."""
    if settings.load_cache is None and settings.save_cache is None:
        return
    if loaded.source_tokenizer is not None:
        flag = "--save-cache" if settings.load_cache is None else "--load-cache"
        raise UsageError(
            f"{flag}: {loaded.path} is an encoder-decoder, whose cache holds no prompt",
            "Give --model a decoder-only model.",
        )
    if settings.save_cache is not None:
        generator.check_saving()
    if settings.load_cache is not None:
        generator.load_prompt(settings.load_cache)


def tell_cache_files(settings: Settings, generator: Generator, n_prompt: int, out: Output) -> None:
    """Say what came from a file and what went into one."""
    if settings.load_cache is not None:
        out.note(f"{generator.reused} of {n_prompt} prompt tokens from {settings.load_cache}")
        if not generator.reused:
            out.warn(f"--load-cache {settings.load_cache}: the prompt does not start as that one")
    if generator.kept:
        out.note(f"the prompt's cache: {settings.save_cache}")
