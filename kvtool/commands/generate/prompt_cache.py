"""generate with a prompt's cache in a file: checks before the work, and notes after it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtool.errors import CheckFailed, FileError, UsageError
from kvtool.ui.output import Output

if TYPE_CHECKING:
    from kvtool.commands.generate.settings import Settings
    from kvtool.core.cache import Cache
    from kvtool.core.checkpoint.checkpoint import Checkpoint
    from kvtool.core.decoding.generation import Generator
    from kvtool.core.decoding.prompt_cache import SavedCache

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
        help="Reuse the beginning that the prompt shares with such a file. Take it only from "
        "people you trust: its contents steer the answer, and cannot be checked.",
        rich_help_panel=CACHE_FILES,
    ),
]


class CacheFiles:
    """What --load-cache brings to a generator, and what --save-cache takes from it.

    Use as a context manager around the decoding. Raises UsageError, FileError and
    CacheOpUnsupported before any work for what cannot be saved or loaded.
    """

    def __init__(
        self, settings: Settings, loaded: Checkpoint, generator: Generator, out: Output
    ) -> None:
        self.saving, self.loading = settings.save_cache, settings.load_cache
        self.generator, self.out = generator, out
        self.saved = False
        if self.saving is None and self.loading is None:
            return
        if loaded.source_tokenizer is not None:
            flag = "--save-cache" if self.loading is None else "--load-cache"
            raise UsageError(
                f"{flag}: {loaded.path} is an encoder-decoder, whose cache holds no prompt",
                "Give --model a decoder-only model.",
            )
        from kvtool.core.cache import make_cache
        from kvtool.core.decoding.prompt_cache import Origin, require_whole

        self.origin = Origin.of(loaded)
        empty = make_cache(generator.how.cache, generator.spec(1))
        if self.saving is not None:
            require_whole(empty, "be saved")
            generator.on_prefill = self._save
        if self.loading is not None:
            require_whole(empty, "be filled from a file")
            generator.saved = self._load(self.loading)

    def _load(self, path: Path) -> SavedCache:
        from kvtool.core.checkpoint.safetensors_file import DamagedFile
        from kvtool.core.decoding.prompt_cache import load_cache

        try:
            return load_cache(path, self.generator.spec(1), self.origin)
        except FileError as error:
            hint = "" if isinstance(error, DamagedFile) else error.hint
            raise FileError(
                f"--load-cache {error.message}", hint or "Give a file that --save-cache wrote."
            ) from error

    def _save(self, cache: Cache, ids: list[int]) -> None:
        from kvtool.core.decoding.prompt_cache import save_cache

        assert self.saving is not None
        self.saved = self.out.attempt(partial(save_cache, self.saving, cache, ids, self.origin))

    def __enter__(self) -> CacheFiles:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raise FileError where logits are not finite: perhaps because of what was loaded."""
        if isinstance(error, CheckFailed) and self.generator.n_reused:
            raise FileError(
                f"--load-cache {self.loading}: {error.message}",
                "Leave it out to see whether its values are the reason.",
            ) from error

    def note(self, n_prompt: int) -> None:
        """Note what was loaded from a file and what was saved to one."""
        if self.loading is not None:
            reused = self.generator.n_reused
            self.out.note(f"{reused} of {n_prompt} prompt tokens from {self.loading}")
            if not reused:
                self.out.warn(f"--load-cache {self.loading}: the prompt does not start as that one")
        if self.saved:
            self.out.note(f"the prompt's cache: {self.saving}")
