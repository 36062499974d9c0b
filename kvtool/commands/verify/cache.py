"""kvtool verify-cache: is the difference between cached and uncached logits a bug or rounding?"""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtool.commands.verify import hf as vt
from kvtool.commands.verify import self_test as st
from kvtool.commands.verify import sweep as sw
from kvtool.commands.verify.report import Report, Row
from kvtool.commands.verify.rows import Rows, facts, kept_rows
from kvtool.commands.verify.table import table
from kvtool.config import RunConfig, check_int
from kvtool.ending import until_ended
from kvtool.errors import FileError, UsageError, first_line
from kvtool.registry import IMPLEMENTATIONS, choose
from kvtool.ui import options as o
from kvtool.ui.documents import check_writable
from kvtool.ui.environment import caption, measured_on
from kvtool.ui.lists import list_option
from kvtool.ui.output import Output, present
from kvtool.ui.tables import Column

if TYPE_CHECKING:
    from kvtool.core.checkpoint.checkpoint import Checkpoint
    from kvtool.core.verify.target.subject import TargetSubject

DEFAULT_PROMPT = "To be, or not to be, that is the question:\n"
SOURCE_PROMPT = "workbench"
DEFAULT_TOKENS = 128
EVERY: list[str] = []  # scenarios


@dataclass(frozen=True)
class Settings:
    """Everything that verify-cache was asked for; no prompt: one that suits the model."""

    run: RunConfig
    caches: list[str]
    kernels: list[str]
    scenarios: list[str]  # none: all
    tokens: int
    prompt: str | None
    target: str | None = None
    plot: Path | None = None
    resume: Path | None = None

    def __post_init__(self) -> None:
        check_int("--tokens", self.tokens, 2)
        if self.target is not None:
            open_options = {
                "--model": self.run.model,
                "--caches": self.caches != o.ALL_CACHES,  # and their settings
                "--kernels": self.kernels != o.ALL_KERNELS,
                "--prompt": self.prompt is not None,
            }
            refuse(
                open_options,
                "contradicts --target",
                "Your decoder has its own, and is fed random ids.",
            )
        if self.plot is not None and not self.plot.parent.is_dir():
            raise FileError(f"--plot {self.plot}: the folder {self.plot.parent} does not exist")
        if self.resume is not None:
            check_writable(self.resume, "--resume")


def run(settings: Settings, out: Output) -> Report:
    """Judge every kind of cache in every scenario, then a planted bug."""
    import time

    from kvtool.core.machine import prepare
    from kvtool.core.verify.scenarios import SCENARIOS

    names = settings.scenarios or list(SCENARIOS)
    for name in names:
        choose(name, list(SCENARIOS), "--scenarios")
    started = time.perf_counter()
    device, dtype = prepare(settings.run)
    check = check_model if settings.target is None else check_target
    report = check(settings, names, device, dtype, out)
    report.seconds = time.perf_counter() - started
    return report


def load_model(
    settings: Settings, device: Any, dtype: Any
) -> tuple[Checkpoint, str | None, list[int]]:
    """The checkpoint, the prompt, and its ids. Raises FileError and UsageError."""
    import torch

    from kvtool.core import footprint
    from kvtool.core.checkpoint import checkpoint
    from kvtool.core.decoding.engine import check_context
    from kvtool.core.machine import require_memory
    from kvtool.core.training.translation import check_sources

    checkpoint.require_context(settings.run.model, "--tokens", settings.tokens)
    loaded = checkpoint.load(settings.run.model, device, dtype, check=True)
    default = SOURCE_PROMPT if loaded.source_tokenizer else DEFAULT_PROMPT
    prompt = default if settings.prompt is None and loaded.reads_text else settings.prompt
    ids = checkpoint.prompt_ids(loaded, prompt)
    if not ids:
        raise UsageError("--prompt: is empty (expected 1 token or more)")
    if loaded.source_tokenizer is not None:
        check_sources([ids], loaded.config.context)
    n_prompt = len(ids) if loaded.source_tokenizer is None else 1
    check_context(n_prompt, settings.tokens, loaded.config.context)
    needed = footprint.converted(loaded.model, torch.float64)
    needed += footprint.verdicts(loaded.config, len(ids), settings.tokens, dtype.itemsize)
    what = "the weights in float64, and the logits of all runs"
    require_memory(what, needed, device, footprint.FEWER)
    return loaded, prompt, ids


def check_model(
    settings: Settings, names: list[str], device: Any, dtype: Any, out: Output
) -> Report:
    """Check a checkpoint with kvtool's caches and kernels."""
    import torch

    from kvtool.core.cache import settings_of
    from kvtool.core.verify import check
    from kvtool.core.verify.subject import Formats

    loaded, prompt, ids = load_model(settings, device, dtype)
    resolved = {
        **loaded.facts,
        "device": str(device),
        "prompt": prompt,
        "scenarios": names,
        "cache_settings": {kind: settings_of(kind, small=True) for kind in settings.caches},
    }
    decides = {**resolved, "model": loaded.path.name, "config": vars(loaded.config), "ids": ids}
    kinds = {"caches": settings.caches, "kernels": settings.kernels, "tokens": settings.tokens}
    kept = kept_rows(settings.resume, facts("kvtool", settings.run, **decides, **kinds))
    rows = Rows(product(settings.caches, settings.kernels, names), kept, out)
    total = len(rows.plan) + 1
    with rows, out.progress("verify-cache", total) as bar, until_ended() as outcome:
        bar.advance(len(rows.found))
        main = check.main_case(loaded.model, torch.tensor([ids], device=device), settings.tokens)
        formats = Formats(loaded.model)
        asked = (settings.caches, settings.kernels, names)
        for found in check.check_model(formats, *asked, main, bar.update, rows.known):
            rows.add(Row.of(found))
            bar.advance()
        planted = check.control(formats, main)
        rows.add_control(Row.of(check.planted_bug(planted, "default")))
    computed = settings.run.dtype
    return rows.report(len(ids), computed, resolved, outcome.how, out)


def load_target(settings: Settings, dtype: Any) -> TargetSubject:
    """The user's own decoder in the format that was asked for. Raises UsageError and FileError."""
    from kvtool.core.verify.target.file import target_subject

    subject = target_subject(settings.target or "")
    if settings.run.dtype == "float32":  # the default leaves a decoder as it is
        return subject
    try:
        return subject.to(dtype)
    except Exception as error:  # the decoder's own code, or that it holds nothing to convert
        why = first_line(error) or type(error).__name__
        text = f"--dtype {settings.run.dtype}: the decoder cannot be converted ({why})"
        raise UsageError(text, "Leave it out.") from error


def check_target(
    settings: Settings, names: list[str], device: Any, dtype: Any, out: Output
) -> Report:
    """Check the user's own decoder, from a file of Python."""
    from kvtool.core import footprint
    from kvtool.core.machine import dtype_name, require_memory
    from kvtool.core.verify.check import planted_bug
    from kvtool.core.verify.target import check as target_check
    from kvtool.core.verify.target.file import identity

    subject = load_target(settings, dtype)
    if subject.guess:
        out.note(subject.guess)
    name = Path(subject.name).name
    sizes = (subject.vocab_size, subject.context)
    main = target_check.decode_case(*sizes, None, settings.tokens, subject.device)
    if main.given is not None and main.given.shape[1] < main.n_prompt + settings.tokens:
        n = main.given.shape[1] - main.n_prompt
        out.note(f"--tokens {settings.tokens}: {n}, since the decoder holds {subject.context}")
    fed = settings.tokens if main.given is None else main.given.shape[1] - main.n_prompt
    needed = footprint.arms(subject.vocab_size, main.n_prompt, fed, subject.dtype.itemsize)
    require_memory("the logits of all runs", needed, subject.device, footprint.FEWER)
    # What the decoder prints, hundreds of times, must not get between the results.
    said = sys.stderr if out.verbose else io.StringIO()
    computed = dtype_name(subject.dtype)
    resolved = {
        **identity(settings.target or ""),
        "dtype": computed,
        "called": subject.guess,
        "device": str(subject.device),
        "scenarios": names,
    }
    decides = {**resolved, "model": name, "tokens": settings.tokens}
    if settings.resume is not None:
        decides["weights"] = subject.fingerprint()
    kept = kept_rows(settings.resume, facts("target", settings.run, **decides))
    rows = Rows([(name, target_check.OWN, scenario) for scenario in names], kept, out)
    total = len(names) + 1
    bars = out.progress("verify-cache", total)
    with rows, redirect_stdout(said), bars as bar, until_ended() as outcome:
        bar.advance(len(rows.found))
        left = [check.scenario for check in rows.not_run]
        for found in target_check.check_target(subject, left, main, bar.update):
            rows.add(Row.of(replace(found, cache=name)))
            bar.advance()
        planted = target_check.target_control(subject, main)
        rows.add_control(Row.of(planted_bug(planted, target_check.OWN)))
    return rows.report(main.n_prompt, computed, resolved, outcome.how, out)


def show(report: Report, out: Output) -> None:
    """A row for each scenario, but one for all that came out alike; then every bug in words."""
    title, columns, cells = table(report)
    if cells:  # an unfinished check may have found only what its subject cannot do
        out.table(title, columns, cells)
    for first, *others in alike(report.bugs):
        out.text(f"{first.cache}, {first.kernels} kernels, {first.scenario}: {first.words()}")
        for label, text in (
            ("", first.evidence),
            ("where: ", first.place),
            ("what: ", first.hint),
            ("the same in: ", ", ".join(row.scenario for row in others)),
        ):
            if text:
                out.text(f"  {label}{text}")
    if report.exit_code and not report.bugs and report.ended is None:
        vain = [row for row in report.checks if row.evidence and row.stores and not row.right]
        for text in dict.fromkeys(f"{row.cache}: {row.evidence}" for row in vain):
            out.text(text)
    out.verdict(None if report.ended else report.exit_code == 0, report.conclusion)


def alike(rows: list[Row]) -> list[list[Row]]:
    """Bugs of one kind of cache and kernels with one explanation, or without one in one place."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row.bugs) or (row.verdict, row.place)
        groups.setdefault((row.cache, row.kernels, *key), []).append(row)
    return list(groups.values())


def draw(report: Report, settings: Settings, path: Path, out: Output) -> None:
    """The plot of the gap by step in three precisions."""
    from kvtool.ui.plots import gap_plot

    panels: dict[str, dict[str, list[float]]] = {}
    rows = [*report.checks, *([report.control] if report.control else [])]
    for row in rows:
        if row.scenario == "decode" and row.stores and row.gap_by_step:
            lines = panels.setdefault(row.cache, {})
            for name, gaps in row.gap_by_step.items():
                working = f"{report.dtype}, {row.kernels} kernels"
                lines[working if name == "working" else name] = gaps
    about = caption(measured_on(settings, report.resolved))
    gap_plot(path, panels, f"Cached against uncached logits, by step\n{about}")
    out.note(f"plot: {path}")


def refuse(given: dict[str, Any], why: str, hint: str) -> None:
    """Raise UsageError for the first option that was given, although it contradicts another or
    needs one."""
    for name, value in given.items():
        if value:
            raise UsageError(f"{name}: {why}", hint)


def show_scenarios(out: Output) -> None:
    """What --scenarios help prints."""
    from kvtool.core.verify.scenarios import SCENARIOS

    rows = [[s.name, s.about, ", ".join(s.needs) or "-"] for s in SCENARIOS.values()]
    columns = [
        Column("scenario", "left", key=True),
        Column("about", "left"),
        Column("needs", "left"),
    ]
    out.table("Scenarios", columns, rows)


def _text(text: str, flag: str) -> str:
    return text


def command(
    impl: vt.Impl = IMPLEMENTATIONS[0],
    caches: vt.Caches = o.ALL_CACHES,
    kernels: o.KernelsList = o.ALL_KERNELS,
    window: vt.Window = None,
    sinks: vt.Sinks = None,
    group: vt.Group = None,
    residual: vt.Residual = None,
    page: vt.Page = None,
    scenarios: Annotated[
        list[str],
        list_option(
            "--scenarios",
            element=_text,
            example="decode crop",
            help="What to do to a cache; 'help' lists them.",
            metavar="NAME...",
            unique=True,
        ),
    ] = EVERY,
    tokens: Annotated[
        int,
        typer.Option("--tokens", metavar="N", help="Tokens to compare behind the prompt (decode)."),
    ] = DEFAULT_TOKENS,
    prompt: o.Prompt = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="FILE.py:NAME",
            help="Check your own decoder: an object, or a function that builds it.",
        ),
    ] = None,
    self_test: Annotated[
        bool,
        typer.Option("--self-test", help="Plant every known bug, and see whether it is reported."),
    ] = False,
    plot: o.Plot = None,
    sweep: vt.Sweep = False,
    types: vt.Types = vt.EVERY,
    time_limit: vt.TimeLimit = sw.TIME_LIMIT,
    resume: vt.Resume = None,
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

    Both arms are fed the same tokens; the uncached one computes whole sequences and touches no
    cache. Rounding all but vanishes in float64 and a bug stays, so the float64 run decides. What
    vanishes only when every cast to a lower type is promoted is a matter of precision. A bug
    planted on purpose must be found too. Windows, groups and pages are small here, unless given, so
    that short texts fill them.

    ULP: units in the last place of a step's largest logit. gap: the largest difference over the
    largest logit. Exit code 0: no bug; 1: a bug, or nothing was checked.

      kvtool verify-cache --caches static --tokens 256

      kvtool verify-cache --target my_decoder.py:build

      kvtool verify-cache --impl transformers --model qwen3
    """
    out = Output(as_json, output_file, quiet, verbose)
    if scenarios == ["help"] and not self_test:
        show_scenarios(out)
        raise typer.Exit
    machine = RunConfig(model, device, dtype, threads, seed)
    kinds_own = {
        "window": window, "sinks": sinks, "group": group, "residual": residual, "page": page,
    }  # fmt: skip
    of_kinds = {f"--{name}": value is not None for name, value in kinds_own.items()}
    if self_test:
        given = {
            "--caches": caches != o.ALL_CACHES,
            "--kernels": kernels != o.ALL_KERNELS,
            "--scenarios": scenarios,
            "--tokens": tokens != DEFAULT_TOKENS,
            "--prompt": prompt is not None,
            "--target": target is not None,
            "--plot": plot,
            "--model": model,
            "--dtype": dtype != "float32",
            "--impl": impl != IMPLEMENTATIONS[0],
            "--sweep": sweep,
            **of_kinds,
        }
        refuse(given, "contradicts --self-test", "It has models, caches and tokens of its own.")
        present("verify-cache.self-test", st.Settings(machine, resume), st.run, st.show, out)
    choose(impl, IMPLEMENTATIONS, "--impl")
    for_sweep = {"--types": types, "--time-limit": time_limit != sw.TIME_LIMIT}
    if not sweep:
        refuse(for_sweep, "needs --sweep", "Add --impl transformers --sweep.")
    if impl == "transformers":
        which = "contradicts --impl transformers"
        own = {"--kernels": kernels != o.ALL_KERNELS, **of_kinds}
        refuse(own, which, "Models and caches of transformers have their own: leave it out.")
        fed = {"--target": target is not None, "--prompt": prompt is not None, "--plot": plot}
        refuse(fed, which, "Random ids are fed to models of transformers.")
        if sweep:
            ignored = {"--model": model, "--dtype": dtype != "float32"}
            refuse(ignored, f"{which} --sweep", "It judges every type in float32.")
        kinds = [] if caches == o.ALL_CACHES else caches
        n_tokens = sw.TOKENS if tokens == DEFAULT_TOKENS else tokens
        if sweep:
            asked = sw.Settings(machine, types, kinds, scenarios, n_tokens, time_limit, resume)
            present("verify-cache.sweep", asked, sw.run, sw.show, out)
        one = vt.Settings(machine, kinds, scenarios, tokens, resume)
        present("verify-cache", one, vt.run, show, out)
    refuse({"--sweep": sweep}, "needs --impl transformers", "Add --impl transformers.")
    if target is None:
        vt.require_model(model)
    else:
        from kvtool.core.verify.target.spec import parse_spec

        parse_spec(target)  # is read again, but refused before torch is loaded
    chosen = o.kinds_with_settings(caches, **kinds_own)
    settings = Settings(machine, chosen, kernels, scenarios, tokens, prompt, target, plot, resume)

    if plot is not None:
        out.later(lambda report, _: draw(report, settings, plot, out))
    present("verify-cache", settings, run, show, out)
