"""kvtool verify-cache --impl transformers: its own models and caches."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from kvtool.commands.verify.check import require_float64, tell_float64, tell_layers
from kvtool.commands.verify.report import CacheReport, Row
from kvtool.commands.verify.resume import Rows, facts, resume_file
from kvtool.config import RunConfig, check_int
from kvtool.ending import until_ended
from kvtool.errors import FileError, UsageError
from kvtool.registry import TRANSFORMERS_CACHES, choose
from kvtool.ui import options as o
from kvtool.ui.documents import check_writable
from kvtool.ui.output import Output


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
        if self.resume is not None:
            check_writable(self.resume, "--resume")


def run(settings: Settings, out: Output) -> CacheReport:
    """Judge the model with each kind of cache in every scenario, then a planted bug."""
    from kvtool.core import footprint
    from kvtool.core.checkpoint.checkpoint import tell_format
    from kvtool.core.machine import dtype_name, prepare
    from kvtool.core.verify.hf.check import ALL, check_transformers, load_model
    from kvtool.core.verify.hf.library import need_transformers
    from kvtool.core.verify.scenarios import PREFILL
    from kvtool.core.verify.target.check import OWN
    from kvtool.core.verify.widened import copy_crowds

    names = chosen_scenarios(settings.scenarios)
    started = time.perf_counter()
    device, dtype = prepare(settings.run)
    tell_layers(settings.run.model, settings.layers, out)
    model, note, sha256 = load_model(settings.run.model, settings.run.seed, settings.layers)
    stored = getattr(model.config, "dtype", None) or dtype
    if sha256 is not None:
        tell_format(settings.run.model, stored, dtype)
    model = model.to(device, dtype)
    n_vocab = model.config.get_text_config(decoder=True).vocab_size
    n_prompt = settings.prompt_length or PREFILL
    require_float64(model, footprint.arms(n_vocab, n_prompt, settings.tokens, dtype.itemsize))
    tell_float64(model, copy_crowds(model), out)
    kinds = settings.caches or list(TRANSFORMERS_CACHES)
    resolved = {
        "model": settings.run.model,
        "sha256": sha256,
        "stored_dtype": dtype_name(stored),
        "transformers": need_transformers(),
        "architecture": type(model).__name__,
        "built": note,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "device": str(device),
        "scenarios": names,
        "caches": kinds,
        **({"layers": settings.layers} if settings.layers else {}),
    }
    log = resume_file(settings.resume, conditions(settings, model, resolved))
    note_model(model, note, kinds, out)
    rows = Rows(product(kinds, [OWN], names), log, out, ALL)
    total = len(rows.plan) + 1
    with rows, out.progress("verify-cache", total) as bar, until_ended() as outcome:
        bar.advance(len(rows.found))
        asked = (model, kinds, names, settings.tokens, bool(settings.caches))
        check = partial(check_transformers, progress=bar.update, remark=out.note, skip=rows.known)
        more = partial(check, prompt_length=settings.prompt_length, thorough=settings.thorough)
        for found in more(*asked):
            if found.planted:
                rows.add_control(Row.of(found))
            else:
                rows.add(Row.of(found))
            bar.advance()
            if not found.usable and (settings.caches or out.verbose):
                out.note(f"{found.cache}: {found.finding.evidence}")
    if outcome.how is None and not any(row.scenario in names for row in rows.rows):
        raise UsageError(f"--model {settings.run.model}: {rows.rows[0].evidence}")
    report = rows.report(n_prompt, settings.run.dtype, resolved, outcome.how, out)
    report.seconds = time.perf_counter() - started
    return report


def note_model(model: Any, note: str, kinds: list[str], out: Output) -> None:
    """Say what is special about the model, and about its caches."""
    from kvtool.core.verify.hf.caches import quantized_backend
    from kvtool.core.verify.hf.subject import QUANTIZED

    if note:
        out.note(note)
    if QUANTIZED in kinds and not model.config.is_encoder_decoder:
        backend = quantized_backend()
        out.note(f"quantized: judged with exact values in place of its codes, backend {backend}")


def conditions(settings: Settings, model: Any, resolved: dict[str, Any]) -> dict[str, Any]:
    """The conditions that the results depend on."""
    from kvtool.core.verify.fingerprint import fingerprint

    asked = {"model": Path(settings.run.model).name, "tokens": settings.tokens}
    if settings.resume is not None:
        config = json.loads(model.config.to_json_string())
        asked |= {"weights": fingerprint({"": model}, {}), "config": config}
    asked |= {"prompt_length": settings.prompt_length, "thorough": settings.thorough}
    return facts("transformers", settings.run, **{**resolved, **asked})


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
