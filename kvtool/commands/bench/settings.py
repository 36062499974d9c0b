"""The settings of bench, and whether they can be measured together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from kvtool.commands.bench.compare import Limit, place
from kvtool.config import RunConfig, check_float, check_int
from kvtool.config.setups import Setup
from kvtool.errors import FileError, UsageError
from kvtool.registry import IMPLEMENTATIONS
from kvtool.ui.option_rules import needs, require

KVTOOL, TRANSFORMERS = IMPLEMENTATIONS
KINDS = ("none", "dynamic", "static")  # of transformers
RULES = (
    needs("--compare", "--fail-if --force", "Give --compare NAME.", "needs a run to compare with"),
)


def check(impls: Sequence[str], caches: Sequence[str], kernels: str) -> None:
    """Raise UsageError for kinds and kernels that none of the implementations has."""
    if TRANSFORMERS not in impls:
        return
    others = [kind for kind in caches if kind not in KINDS]
    if others and (KVTOOL not in impls or len(others) == len(caches)):
        raise UsageError(
            f"--caches: {others[0]} is no kind of transformers (expected {', '.join(KINDS)})",
            "Its generate is measured with those.",
        )
    if kernels != "default" and KVTOOL not in impls:
        raise UsageError(
            f"--kernels: {kernels} kernels are kvtool's", "Add kvtool to --impl, or leave it out."
        )


@dataclass(frozen=True)
class Settings:
    """All settings of bench."""

    run: RunConfig
    lengths: list[int]
    caches: list[str]
    prompt_length: int
    batch_size: int
    repeats: int
    budget: float
    plot: Path | None
    kernels: str = "default"
    depth: int | None = None
    n_kv_heads: int = 0
    text: Path | None = None
    save: str | None = None
    compare: str | None = None
    fail_if: tuple[Limit, ...] = ()
    force: bool = False
    impl: tuple[str, ...] = (KVTOOL,)
    # What is measured side by side; the settings above and in `run` are the first of each.
    dtypes: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    thread_counts: tuple[int, ...] = ()  # 0 is PyTorch's choice, until it is known

    def __post_init__(self) -> None:
        for name, first in (
            ("dtypes", self.run.dtype),
            ("batch_sizes", self.batch_size),
            ("thread_counts", self.run.threads),
        ):
            object.__setattr__(self, name, getattr(self, name) or (first,))
        check_int("--prompt-length", self.prompt_length, 1)
        check_int("--batch-size", self.batch_size, 1)
        check_int("--repeats", self.repeats, 1)
        check_int("--n-kv-heads", self.n_kv_heads, 0)
        check_float("--budget", self.budget, 0.0, open_low=True)
        if self.depth is not None:
            check_int("--depth", self.depth, 1)
        if self.plot is not None and self.plot.is_dir():
            raise FileError(f"--plot {self.plot}: is a folder (expected a file)")
        if self.plot is not None and not self.plot.parent.is_dir():
            raise FileError(f"--plot {self.plot}: the folder {self.plot.parent} does not exist")
        given = {
            "--compare": self.compare is not None,
            "--fail-if": self.fail_if,
            "--force": self.force,
        }
        require(RULES, given)
        check(self.impl, self.caches, self.kernels)
        if self.save is not None:
            place(self.save)

    @property
    def setups(self) -> list[Setup]:
        """What contenders differ in beside kind and implementation, in the order of the lists."""
        return [Setup(*each) for each in product(self.dtypes, self.batch_sizes, self.thread_counts)]

    def resolved(self, usual: int) -> Settings:
        """The same with PyTorch's `usual` number of threads for 0, each number once."""
        counts = tuple(dict.fromkeys(n or usual for n in self.thread_counts))
        return replace(self, thread_counts=counts)

    @property
    def start(self) -> tuple[str, int]:
        """The number of tokens before the timed ones, and the option that sets it."""
        return (
            ("--prompt-length", self.prompt_length)
            if self.depth is None
            else ("--depth", self.depth)
        )
