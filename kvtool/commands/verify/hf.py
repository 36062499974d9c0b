"""kvtool verify-cache --impl transformers: its own models and caches."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvtool.commands.verify.check import cut_layers, require_float64, tell_fewer, tell_float64
from kvtool.commands.verify.report import CacheReport, Row
from kvtool.commands.verify.resume import Rows, facts, resume_file
from kvtool.config import RunConfig, check_int, process_rank
from kvtool.ending import signals_at_default, until_ended
from kvtool.errors import FileError, UsageError
from kvtool.registry import TRANSFORMERS_CACHES, choose
from kvtool.ui import options as o
from kvtool.ui.documents import check_writable
from kvtool.ui.output import Output

if TYPE_CHECKING:
    from kvtool.core.training.team import Team
    from kvtool.core.verify.hf.check import Loaded
    from kvtool.core.verify.resume_log import ResumeLog


@dataclass(frozen=True)
class Settings:
    """The settings. No caches: all that the model takes."""

    run: RunConfig
    caches: list[str]
    scenarios: list[str]  # none: all
    tokens: int
    resume: Path | None = None
    prompt_length: int = 0  # tokens; 0: as many as a scenario has
    thorough: bool = False
    layers: int = 0  # the first ones alone; 0: all
    device_map: str = ""  # as transformers has it; "": one device
    impl: str = "transformers"

    def __post_init__(self) -> None:
        check_int("--tokens", self.tokens, 2)
        check_int("--prompt-length", self.prompt_length, 0)
        check_int("--layers", self.layers, 0)
        for kind in self.caches:
            choose(kind, tuple(TRANSFORMERS_CACHES), "--caches")
        if not self.run.model:
            hint = "Give a folder or a type: --model qwen3; --sweep takes all types."
            raise UsageError("--impl transformers: needs --model", hint)
        if self.device_map and not Path(self.run.model).is_dir():
            raise UsageError(f"--device-map: {self.run.model} is a type (expected a folder)")
        if self.resume is not None:
            check_writable(self.resume, "--resume")


def run(settings: Settings, out: Output) -> CacheReport:
    """Judge the model with each kind of cache in every scenario, then a planted bug.

    Of the processes that torchrun started, only the leader returns.
    """
    from kvtool.core.machine import prepare
    from kvtool.core.training.team import device_of_rank, joined

    chosen_scenarios(settings.scenarios)
    device, dtype = prepare(settings.run)
    device = device_of_rank(device)
    # Who follows has nothing to keep, and may be waiting for a process that has ended.
    with joined(device) as team, nullcontext() if team.leads else signals_at_default():
        report, code = judge(settings, device, dtype, team, out)
    if report is None:
        raise typer.Exit(code)
    return report


def judge(
    settings: Settings, device: Any, dtype: Any, team: Team, out: Output
) -> tuple[CacheReport | None, int]:
    """What the leader of a team found, None in another process, and its exit code in every one."""
    from kvtool.core.verify.hf.check import check_transformers
    from kvtool.core.verify.hf.shared import shared_out

    started, name = time.perf_counter(), settings.run.model
    settings = replace(settings, layers=cut_layers(name, settings.layers, out))
    loaded = team.each(lambda: load(settings, device, dtype, team, out))
    model = loaded.model if team.alone else shared_out(loaded.model, device, dtype, team)
    resolved = resolved_of(settings, loaded, device, team)
    opened: list[Rows] = []

    def open_rows() -> set[tuple[str, str, str]]:
        log = resume_file(settings.resume, conditions(settings, loaded.model, resolved))
        note_model(loaded, resolved, out)
        opened.append(rows_of(resolved, log, out))
        return opened[0].known

    known = team.lead(open_rows)
    rows = opened[0] if opened else rows_of(resolved, None, out)
    with rows, out.progress("verify-cache", len(rows.plan) + 1) as bar, until_ended() as outcome:
        bar.advance(len(rows.found))
        asked = (model, resolved["caches"], resolved["scenarios"], settings.tokens)
        check = partial(check_transformers, progress=bar.update, remark=out.note, skip=known)
        more = partial(check, prompt_length=settings.prompt_length, thorough=settings.thorough)
        shared = {"diagnose": team.alone, "whole": loaded.model, "team": team}
        for found in more(*asked, bool(settings.caches), **shared):
            if found.planted:
                rows.add_control(Row.of(found))
            else:
                rows.add(Row.of(found))
            bar.advance()
            if not found.usable and (settings.caches or out.verbose):
                out.note(f"{found.cache}: {found.finding.evidence}")
    reports: list[CacheReport] = []

    def finish() -> int:
        n_prompt = settings.prompt_length or scenario_prompt()
        scenarios = resolved["scenarios"]
        if outcome.how is None and not any(row.scenario in scenarios for row in rows.rows):
            raise UsageError(f"--model {settings.run.model}: {rows.rows[0].evidence}")
        reports.append(rows.report(n_prompt, settings.run.dtype, resolved, outcome.how, out))
        reports[0].seconds = time.perf_counter() - started
        return reports[0].exit_code

    # Of a team that a signal ended nobody else is there to hear it.
    code = team.lead(finish) if outcome.how is None else finish()
    return (reports[0] if reports else None), code


def load(settings: Settings, device: Any, dtype: Any, team: Team, out: Output) -> Loaded:
    """The model, on its device unless a team is to share it. Raises what load_model raises, and
    CapacityError for one that is too large in float64."""
    from kvtool.core import footprint
    from kvtool.core.checkpoint.checkpoint import tell_format
    from kvtool.core.verify.hf.check import load_model
    from kvtool.core.verify.hf.folder import Placed
    from kvtool.core.verify.hf.shared import parts_on
    from kvtool.core.verify.hf.subject import context
    from kvtool.core.verify.widened import copy_crowds

    name = settings.run.model
    placed = Placed(settings.device_map, dtype) if settings.device_map else None
    loaded = load_model(name, settings.run.seed, settings.layers, placed)
    model = loaded.model
    if loaded.sha256 is not None:
        tell_format(name, stored_format(loaded), dtype)
    model = model.to(device, dtype) if team.alone and placed is None else model
    n_vocab = model.config.get_text_config(decoder=True).vocab_size
    n_prompt, holds = settings.prompt_length or scenario_prompt(), context(model.config)
    if n_prompt < holds < n_prompt + settings.tokens:
        tell_fewer(settings.tokens, holds - n_prompt, holds, out)
    parts = parts_on(device, team)
    logits = footprint.arms(n_vocab, n_prompt, settings.tokens, dtype.itemsize)
    require_float64(model, logits * team.share.world_size // parts, device, parts)
    tell_float64(model, copy_crowds(model, device, parts), out)
    return loaded._replace(model=model)


def stored_format(loaded: Loaded) -> Any:
    """The format that a model's configuration names, or else its own."""
    return getattr(loaded.model.config, "dtype", None) or loaded.model.dtype


def scenario_prompt() -> int:
    """How many tokens the prompt of a scenario has."""
    from kvtool.core.verify.scenarios import PREFILL

    return PREFILL


def resolved_of(settings: Settings, loaded: Loaded, device: Any, team: Team) -> dict[str, Any]:
    """The settings that were left open, and what the model turned out to be."""
    from kvtool.core.machine import dtype_name
    from kvtool.core.verify.hf.library import need_transformers

    return {
        "model": settings.run.model,
        "sha256": loaded.sha256,
        "stored_dtype": dtype_name(stored_format(loaded)),
        "transformers": need_transformers(),
        "architecture": type(loaded.model).__name__,
        "built": loaded.note,
        "parameters": sum(weight.numel() for weight in loaded.model.parameters()),
        "device": str(device),
        "scenarios": chosen_scenarios(settings.scenarios),
        "caches": settings.caches or list(TRANSFORMERS_CACHES),
        **({"layers": settings.layers} if settings.layers else {}),
        **({"device_map": settings.device_map} if settings.device_map else {}),
        **({} if team.alone else {"processes": team.share.world_size}),
    }


def rows_of(resolved: dict[str, Any], log: ResumeLog[Row] | None, out: Output) -> Rows:
    """Room for a row of every kind and scenario."""
    from kvtool.core.verify.hf.check import ALL
    from kvtool.core.verify.target.check import OWN

    return Rows(product(resolved["caches"], [OWN], resolved["scenarios"]), log, out, ALL)


def note_model(loaded: Loaded, resolved: dict[str, Any], out: Output) -> None:
    """Say what is special about the model, and about its caches."""
    from kvtool.core.verify.hf.caches import quantized_backend
    from kvtool.core.verify.hf.subject import QUANTIZED

    if loaded.note:
        out.note(loaded.note)
    if QUANTIZED in resolved["caches"] and not loaded.model.config.is_encoder_decoder:
        backend = quantized_backend()
        out.note(f"quantized: judged with exact values in place of its codes, backend {backend}")
    if n := resolved.get("processes"):
        out.note(f"{n} processes share the weights: a bug would be found, but not located")


def conditions(settings: Settings, model: Any, resolved: dict[str, Any]) -> dict[str, Any]:
    """The conditions that the results depend on."""
    from kvtool.core.verify.fingerprint import fingerprint

    asked = {"model": Path(settings.run.model).name, "tokens": settings.tokens}
    if settings.resume is not None:
        config = json.loads(model.config.to_json_string())
        asked |= {"weights": fingerprint({"": model}, {}), "config": config}
    asked |= {"prompt_length": settings.prompt_length, "thorough": settings.thorough}
    return facts("transformers", settings.run, **{**resolved, **asked})


def check_team(shares: bool, model: str, device_map: str = "") -> None:
    """Raise UsageError for processes of torchrun that would each judge the same, FileError for a
    folder that is not there.

    shares: whether the weights of a model are shared, if it is a folder.
    """
    if process_rank()[1] > 1 and device_map:
        text = "--device-map: contradicts torchrun, each of whose processes has one device"
        raise UsageError(text, "Leave it out.")
    if process_rank()[1] > 1 and not Path(model).exists() and not begins_as_a_type(model):
        o.require_inputs(model)
    if process_rank()[1] > 1 and not (shares and Path(model).is_dir()):
        raise UsageError(
            "torchrun: its processes share the weights of a folder of transformers alone",
            "Add --impl transformers --model FOLDER, or leave torchrun out.",
        )


def require_model(name: str) -> None:
    """Raise FileError for a model that is not there; it says so if transformers has such a type."""
    try:
        o.require_inputs(name)
    except FileError as error:
        if Path(name).exists() or not begins_as_a_type(name):
            raise
        from kvtool.core.verify.hf.library import is_type  # which loads torch and transformers

        if not is_type(name):
            raise
        hint = f"{name} is a model type of transformers: add --impl transformers."
        raise FileError(error.message, hint) from error


def begins_as_a_type(name: str) -> bool:
    """Whether transformers, if it is installed, has a folder of models that begins the name."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not re.fullmatch(r"[\w.-]+", name):
        return False
    folders = [Path(place) / "models" for place in spec.submodule_search_locations or ()]
    parts = re.split("[-_]", name)
    begins = ["_".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any((folder / begin).is_dir() for folder in folders for begin in begins)


def chosen_scenarios(names: list[str]) -> list[str]:
    """Those given, or all. Raises UsageError for one that there is not."""
    from kvtool.core.verify.scenarios import SCENARIOS

    for name in names:
        choose(name, list(SCENARIOS), "--scenarios")
    return names or list(SCENARIOS)
