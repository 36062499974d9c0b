"""kvtool verify-cache: is the difference between cached and uncached logits a bug or rounding?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from kvtool.config import RunConfig, check_int
from kvtool.ui import options as o
from kvtool.ui.output import Output, present
from kvtool.ui.tables import Column

DEFAULT_PROMPT = "To be, or not to be, that is the question:\n"
SOURCE_PROMPT = "workbench"


@dataclass(frozen=True)
class Settings:
    """Everything that verify-cache was asked for; no prompt: one that suits the model."""

    run: RunConfig
    caches: list[str]
    tokens: int
    prompt: str | None

    def __post_init__(self) -> None:
        check_int("--tokens", self.tokens, 2)


@dataclass
class Row:
    """One kind of cache against the uncached run. Steps count from 0, the prompt's own."""

    cache: str
    steps: int
    identical_steps: int
    first_difference: int | None
    max_ulp: float
    gap: float
    gap_float64: float
    verdict: str
    first_wrong_step: int | None

    @classmethod
    def of(cls, verdict: Any) -> Row:
        working, exact = verdict.working, verdict.float64
        return cls(
            cache=verdict.kind,
            steps=working.steps,
            identical_steps=working.identical,
            first_difference=working.first,
            max_ulp=working.ulps,
            gap=working.relative,
            gap_float64=exact.relative,
            verdict=verdict.verdict,
            first_wrong_step=verdict.first_wrong,
        )


@dataclass
class Report:
    """What was found, and whether the check found the bug that was planted to test it."""

    kinds: list[Row]
    control: Row
    prompt_tokens: int
    dtype: str

    @property
    def bugs(self) -> list[Row]:
        return [row for row in self.kinds if row.verdict == "bug"]

    @property
    def judged(self) -> list[Row]:
        return [row for row in self.kinds if row.verdict != "vacuous"]

    @property
    def trustworthy(self) -> bool:
        return self.control.verdict == "bug"

    @property
    def exit_code(self) -> int:
        return 0 if self.judged and not self.bugs and self.trustworthy else 1

    @property
    def conclusion(self) -> str:
        """The last line, in words."""
        if not self.trustworthy:
            return "the check failed: it did not report the bug that was planted to test it"
        if not self.judged:
            return "nothing was checked: no kind of cache was given that stores anything"
        if self.bugs:
            parts = [f"{row.cache} from step {row.first_wrong_step}" for row in self.bugs]
            return f"bug: the cached logits are wrong, {self.where_wrong} ({', '.join(parts)})"
        steps = self.judged[0].steps
        same = all(row.verdict == "identical" for row in self.judged)
        what = "identical, bit for bit" if same else "rounding only"
        kinds = len(self.judged)
        caches = "1 kind of cache" if kinds == 1 else f"{kinds} kinds of cache"
        return f"{what}: {caches} over {steps} steps, no bug; the planted bug was found"

    @property
    def where_wrong(self) -> str:
        from kvtool.core.verify import ROUNDING_64

        low_only = all(row.gap_float64 <= ROUNDING_64 for row in self.bugs)
        return f"in {self.dtype} alone" if low_only else "also in float64"

    def rows(self) -> list[dict[str, Any]]:
        return [vars(row) for row in [*self.kinds, self.control]]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "conclusion": self.conclusion}


def run(settings: Settings, out: Output) -> Report:
    """Judge every kind of cache against one pair of uncached runs."""
    import torch

    from kvtool.core import checkpoint
    from kvtool.core.machine import prepare
    from kvtool.core.translation import check_sources
    from kvtool.core.verify import Check

    device, dtype = prepare(settings.run)
    loaded = checkpoint.load(settings.run.model, device, dtype, check=True)
    reader = loaded.source_tokenizer or loaded.tokenizer
    default = SOURCE_PROMPT if loaded.source_tokenizer else DEFAULT_PROMPT
    ids = reader.encode(default if settings.prompt is None else settings.prompt)
    check_prompt(ids)
    if loaded.source_tokenizer is not None:
        check_sources([ids], loaded.config.context)
    with out.progress("uncached", total=len(settings.caches) + 2) as bar:
        check = Check(loaded.model, torch.tensor([ids], device=device), settings.tokens)
        bar.advance()
        found = []
        for kind in settings.caches:
            bar.update(kind)
            found.append(Row.of(check.judge(kind)))
            bar.advance()
        control = Row.of(check.control())
    return Report(found, control, len(ids), settings.run.dtype)


def check_prompt(ids: list[int]) -> None:
    """Raise UsageError for a prompt without a token."""
    from kvtool.errors import UsageError

    if not ids:
        raise UsageError("--prompt: is empty (expected 1 token or more)")


def show(report: Report, out: Output) -> None:
    """The table and the conclusion."""
    columns = [
        Column("cache", "left", key=True),
        Column("identical steps"),
        Column("first other"),
        Column("max ULP"),
        Column(f"gap {report.dtype}"),
        Column("gap float64"),
        Column("verdict", "left"),
    ]
    rows = [
        [
            row.cache,
            f"{row.identical_steps} of {row.steps}",
            "-" if row.first_difference is None else str(row.first_difference),
            f"{row.max_ulp:,.1f}" if row.max_ulp < 1e5 else f"{row.max_ulp:.0e}",
            f"{row.gap:.1e}",
            f"{row.gap_float64:.1e}",
            words(row),
        ]
        for row in [*report.kinds, report.control]
    ]
    out.table("Cached against uncached logits, the same tokens fed to both", columns, rows)
    out.verdict(report.exit_code == 0, report.conclusion)


def words(row: Row) -> str:
    """A verdict as the table says it."""
    if row.verdict == "bug":
        return f"bug, from step {row.first_wrong_step}"
    return "nothing cached" if row.verdict == "vacuous" else row.verdict


def command(
    caches: o.Caches = o.ALL_CACHES,
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", help="Tokens to generate and compare.")
    ] = 128,
    prompt: o.Prompt = None,
    model: o.Model = "",
    device: o.Device = "auto",
    dtype: o.Dtype = "float32",
    threads: o.Threads = 0,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    output_file: o.OutputFile = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Compare cached with uncached logits, and say whether a difference is a bug or rounding.

    Both arms are fed the same tokens; the uncached one computes the whole sequence again at every
    step. Rounding all but vanishes in float64 and a bug stays, so the float64 run decides. A bug
    planted on purpose must be found too.

    ULP: units in the last place of a step's largest logit. gap: the largest difference over the
    largest logit. Exit code 0: no bug; 1: a bug, or nothing was checked.

      kvtool verify-cache --caches static --tokens 256
    """
    out = Output(as_json, output_file, quiet, verbose)
    settings = Settings(RunConfig(model, device, dtype, threads, seed), caches, tokens, prompt)
    present("verify-cache", settings, run, show, out)
