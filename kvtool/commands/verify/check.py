"""verify-cache of kvtool's own models and caches, and of the user's own decoder."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.commands.verify.options import DEFAULT_TOKENS, OF_A_TARGET
from kvtool.commands.verify.report import CacheReport, Row
from kvtool.commands.verify.resume import Rows, facts, resume_file
from kvtool.config import RunConfig, check_int
from kvtool.ending import until_ended
from kvtool.errors import FileError, UsageError, first_line
from kvtool.registry import choose
from kvtool.ui.documents import check_writable
from kvtool.ui.option_rules import require
from kvtool.ui.options import ALL_CACHES, ALL_KERNELS
from kvtool.ui.output import Output
from kvtool.ui.progress import Progress

if TYPE_CHECKING:
    from kvtool.core.checkpoint.checkpoint import Checkpoint
    from kvtool.core.verify.arms import Case
    from kvtool.core.verify.model_subject import Formats
    from kvtool.core.verify.target.picture import Picture
    from kvtool.core.verify.target.subject import TargetSubject

DEFAULT_PROMPT = "To be, or not to be, that is the question:\n"
SOURCE_PROMPT = "workbench"
LONG_SECONDS = 60  # seconds of a check of which the time is told before


@dataclass(frozen=True)
class Settings:
    """All settings of verify-cache. No prompt: one that suits the model."""

    run: RunConfig
    caches: list[str]
    kernels: list[str]
    scenarios: list[str]  # none: all
    tokens: int
    prompt: str | None
    target: str | None = None
    plot: Path | None = None
    resume: Path | None = None
    lossy: bool = False  # the target's cache rounds on purpose
    prompt_length: int = 0  # tokens; 0: those of the prompt, or as many as a scenario has
    thorough: bool = False
    layers: int = 0  # the first ones alone; 0: all

    def __post_init__(self) -> None:
        check_int("--tokens", self.tokens, 2)
        check_int("--prompt-length", self.prompt_length, 0)
        check_int("--layers", self.layers, 0)
        given = {
            "--target": self.target,
            "--model": self.run.model,
            "--layers": self.layers,
            "--caches": self.caches != ALL_CACHES,  # and their settings
            "--kernels": self.kernels != ALL_KERNELS,
            "--prompt": self.prompt is not None,
        }
        require([OF_A_TARGET], given)
        if self.plot is not None and not self.plot.parent.is_dir():
            raise FileError(f"--plot {self.plot}: the folder {self.plot.parent} does not exist")
        if self.resume is not None:
            check_writable(self.resume, "--resume")


def run(settings: Settings, out: Output) -> CacheReport:
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
    settings: Settings, device: Any, dtype: Any, out: Output
) -> tuple[Checkpoint, str | None, list[int], int]:
    """The checkpoint, the prompt, its ids, and how many tokens follow: what nobody asked for is as
    long as the context allows. Raises FileError and UsageError."""
    from kvtool.core import footprint
    from kvtool.core.checkpoint import checkpoint
    from kvtool.core.decoding.engine import check_context
    from kvtool.core.decoding.sources import check_sources
    from kvtool.core.verify.scenario_run import PREFILL

    if settings.tokens != DEFAULT_TOKENS:
        checkpoint.require_context(settings.run.model, "--tokens", settings.tokens)
    loaded = checkpoint.load(settings.run.model, device, dtype, True, settings.layers)
    default = SOURCE_PROMPT if loaded.source_tokenizer else DEFAULT_PROMPT
    prompt = default if settings.prompt is None and loaded.reads_text else settings.prompt
    ids = checkpoint.prompt_ids(loaded, prompt)
    if not ids:
        raise UsageError("--prompt: is empty (expected 1 token or more)")
    if n := settings.prompt_length:
        ids = (ids * (n // len(ids) + 1))[:n]
    if loaded.source_tokenizer is not None:
        check_sources([ids], loaded.config.context)
    context, tokens = loaded.config.context, settings.tokens
    if context <= PREFILL:
        least = PREFILL + 1
        text = f"--model {loaded.path.name}: holds {context} tokens (expected {least} or more)"
        raise UsageError(text, "A check feeds about that many.")
    if settings.prompt is None and not n and loaded.source_tokenizer is None:
        ids = ids[: context // 2]
    n_prompt = len(ids) if loaded.source_tokenizer is None else 1
    if tokens == DEFAULT_TOKENS and n_prompt + 2 <= context < n_prompt + tokens:
        tokens = tell_fewer(tokens, context - n_prompt, context, out)
    check_context(n_prompt, tokens, context)
    needed = footprint.verdicts(loaded.config, len(ids), tokens, dtype.itemsize)
    require_float64(loaded.model, needed)
    return loaded, prompt, ids, tokens


def tell_fewer(asked: int, tokens: int, context: int, out: Output, what: str = "model") -> int:
    """Say that fewer tokens are fed than are by default -> how many."""
    out.note(f"--tokens {asked}: {tokens}, since the {what} holds {context}")
    return tokens


def require_float64(model: Any, logits: int, device: Any = None, parts: int = 1) -> None:
    """Raise CapacityError unless a model in float64, as a copy or as its weights are widened, and
    so many bytes of logits can be had.

    device, parts: see `copy_crowds`.
    """
    import torch

    from kvtool.core import footprint
    from kvtool.core.machine import require_memory
    from kvtool.core.verify.widened import copy_crowds

    what = "the weights in float64, and the logits of all runs"
    needed = footprint.converted(model, torch.float64)
    device = device or next(model.parameters()).device
    if copy_crowds(model, device, parts):
        what = "a weight in float64, and the logits of all runs"
        needed = footprint.widened(model)
    require_memory(what, needed // parts + logits, device, footprint.FEWER)


def tell_float64(model: Any, widens: bool, out: Output) -> None:
    """Say with -v whether float64 is a copy of a large model."""
    import torch

    from kvtool.core import footprint
    from kvtool.core.verify.widened import is_large

    if not out.verbose or not is_large(model):
        return
    size = f"{footprint.converted(model, torch.float64) / 2**30:.3g} GiB"
    widened = f"each weight is widened as it is read (a copy would take {size})"
    out.note(f"float64: {widened if widens else f'a copy of the weights, of {size}'}")


def cut_layers(name: str, layers: int, out: Output) -> int:
    """How many layers alone are judged, 0 where all are; says, before it is read, how much of a
    folder they are. Raises FileError, and UsageError for more than there are."""
    from kvtool.core.checkpoint.first_layers import FirstLayers
    from kvtool.core.checkpoint.safetensors_file import STORED_DTYPES
    from kvtool.core.checkpoint.weight_files import CONFIG, open_weights
    from kvtool.reading import MAX_CONFIG_BYTES, read_json_object

    folder = Path(name)
    if not layers or not folder.is_dir():
        return layers
    first = FirstLayers(layers)
    described = read_json_object(folder / CONFIG, "a configuration", MAX_CONFIG_BYTES, finite=False)
    if not first.cuts(described):
        return 0
    tensors = open_weights(folder, STORED_DTYPES, first).tensors.values()
    size = sum(info.end - info.begin for info in tensors) / 2**30
    out.note(f"--layers {layers}: {size:.3g} GiB of weights; later layers are not read or judged")
    return layers


def tell_time(
    formats: Formats,
    settings: Settings,
    names: list[str],
    main: Case,
    rows: Rows,
    out: Output,
    bar: Progress,
) -> None:
    """Say how much a large model is fed, and the expected time if it is long."""
    from kvtool.core.verify import check, expected

    if out.quiet or not check.goes_by_layer(formats):
        return
    bar.update("how long it takes")
    cases = expected.cases_of(names, main, settings.thorough)
    asked = (settings.caches, settings.kernels, cases, rows.known, settings.thorough)
    work, seconds = expected.planned(formats, *asked)
    if seconds >= LONG_SECONDS:
        out.note(expected.in_words(work, seconds))


def check_model(
    settings: Settings, names: list[str], device: Any, dtype: Any, out: Output
) -> CacheReport:
    """Check a checkpoint with kvtool's caches and kernels."""
    import torch

    from kvtool.core.cache import settings_of
    from kvtool.core.verify import check
    from kvtool.core.verify.model_subject import Formats

    settings = replace(settings, layers=cut_layers(settings.run.model, settings.layers, out))
    loaded, prompt, ids, tokens = load_model(settings, device, dtype, out)
    resolved = {
        **loaded.facts,
        "device": str(device),
        "prompt": prompt,
        "scenarios": names,
        "cache_settings": {kind: settings_of(kind, small=True) for kind in settings.caches},
    }
    conditions = {**resolved, "model": loaded.path.name, "config": vars(loaded.config), "ids": ids}
    kinds = {"caches": settings.caches, "kernels": settings.kernels, "tokens": tokens}
    kinds["thorough"] = settings.thorough
    formats = Formats(loaded.model)
    tell_float64(loaded.model, formats.widens, out)
    if settings.layers:
        resolved["layers"] = settings.layers
    log = resume_file(settings.resume, facts("kvtool", settings.run, **conditions, **kinds))
    rows = Rows(product(settings.caches, settings.kernels, names), log, out)
    total = len(rows.plan) + 1
    with rows, out.progress("verify-cache", total) as bar, until_ended() as outcome:
        bar.advance(len(rows.found))
        main = check.main_case(loaded.model, torch.tensor([ids], device=device), tokens)
        asked = (settings.caches, settings.kernels, names)
        tell_time(formats, settings, names, main, rows, out, bar)
        for found in check.check_model(
            formats, *asked, main, bar.update, rows.known, settings.thorough
        ):
            rows.add(Row.of(found))
            bar.advance()
        planted = check.control(formats, main)
        rows.add_control(Row.of(check.planted_bug(planted, "default")))
    loaded.digest()  # raises if the weights changed meanwhile, and with them what was judged
    computed = settings.run.dtype
    return rows.report(len(ids), computed, resolved, outcome.how, out)


def load_target(settings: Settings, dtype: Any, out: Output) -> TargetSubject:
    """The user's own decoder in the format that was asked for. Raises UsageError and FileError,
    and shows code that would help with one that cannot be called."""
    from kvtool.core.verify.target.example import CannotCall
    from kvtool.core.verify.target.file import target_subject

    try:
        subject = target_subject(settings.target or "")
    except CannotCall as error:
        for line in ("A class like this would help:", *error.example.splitlines()):
            out.note(line)
        raise
    subject.lossy |= settings.lossy
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
) -> CacheReport:
    """Check the user's own decoder, from a file of Python."""
    from kvtool.core import footprint
    from kvtool.core.machine import dtype_name, require_memory
    from kvtool.core.verify.check import planted_bug
    from kvtool.core.verify.target import check as target_check
    from kvtool.core.verify.target.file import identity

    subject = load_target(settings, dtype, out)
    if subject.guess:
        out.note(subject.guess)
    name = Path(subject.name).name
    sizes = (subject.vocab_size, subject.context)
    n, n_prompt = settings.tokens, settings.prompt_length
    main = target_check.decode_case(*sizes, None, n, subject.device, n_prompt)
    if main.given is not None and main.given.shape[1] < main.n_prompt + settings.tokens:
        n = main.given.shape[1] - main.n_prompt
        tell_fewer(settings.tokens, n, subject.context, out, "decoder")
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
        "lossy": subject.lossy,
        "device": str(subject.device),
        "scenarios": names,
    }
    conditions = {**resolved, "model": name, "tokens": settings.tokens}
    conditions |= {"prompt_length": settings.prompt_length, "thorough": settings.thorough}
    if settings.resume is not None:
        conditions["weights"] = subject.fingerprint()
    log = resume_file(settings.resume, facts("target", settings.run, **conditions))
    rows = Rows([(name, target_check.OWN, scenario) for scenario in names], log, out)
    total = len(names) + 1
    bars = out.progress("verify-cache", total)
    with rows, redirect_stdout(said), bars as bar, until_ended() as outcome:
        bar.advance(len(rows.found))
        left = [check.scenario for check in rows.not_run]
        given = (subject, left, main, bar.update, settings.thorough)
        for found in target_check.check_target(*given):
            rows.add(Row.of(replace(found, cache=name)))
            bar.advance()
        planted = target_check.target_control(subject, main)
        rows.add_control(Row.of(planted_bug(planted, target_check.OWN)))
        seen = what_is_seen(subject, main, rows.rows) if settings.plot is not None else None
    report = rows.report(main.n_prompt, computed, resolved, outcome.how, out)
    report.seen = seen if outcome.how is None else None
    return report


def what_is_seen(subject: TargetSubject, main: Case, rows: Sequence[Row]) -> Picture | None:
    """The map of what tokens see at the first bug, or in a right scenario."""
    from kvtool.core.verify.arms import Case
    from kvtool.core.verify.outcome import BUG
    from kvtool.core.verify.scenarios import SCENARIOS
    from kvtool.core.verify.target.check import MAIN
    from kvtool.core.verify.target.picture import picture

    wrong = next((row for row in rows if row.verdict == BUG), None)
    if wrong is None:
        return picture(subject, None, None)
    case = main if wrong.scenario == MAIN else Case(SCENARIOS[wrong.scenario])
    return picture(subject, case, wrong.first_wrong_step)
