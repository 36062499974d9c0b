"""kvtool verify-cache --impl transformers: its own models and caches."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from kvtool.commands.verify_report import Report, Row
from kvtool.config import RunConfig, check_int
from kvtool.errors import UsageError
from kvtool.registry import TRANSFORMERS_CACHES, choose
from kvtool.ui import options as o
from kvtool.ui.lists import list_option
from kvtool.ui.output import Output

EVERY: list[str] = []  # types
SWEEP = "Sweep (--impl transformers)"
IMPLEMENTATIONS = ("kvtool", "transformers")
PLANTED = "planted bug"


def _text(text: str, flag: str) -> str:
    return text


def _kind(text: str, flag: str) -> list[str]:
    """A kind of kvtool's caches, or of those of transformers."""
    return [text] if text in TRANSFORMERS_CACHES else o.cache_kinds(text, flag)


Impl = Annotated[
    str,
    typer.Option(
        "--impl",
        metavar="|".join(IMPLEMENTATIONS),
        help="Whose models and caches. Of transformers, --model is a saved folder or a type; of a "
        "type that has both, such as bart, it is the encoder-decoder, and --sweep judges both.",
    ),
]
Caches = Annotated[
    list[str],
    list_option(
        "--caches",
        element=_kind,
        example="none static",
        help=f"Cache kinds: {', '.join(o.ALL_CACHES)}; or all. "
        f"Of transformers: {', '.join(TRANSFORMERS_CACHES)}.",
        metavar="KIND...",
        unique=True,
        complete=lambda: o.ALL_CACHES,
    ),
]
# Small, so that a short check makes a kind do all that it does: see `small` of the kinds.
Window = Annotated[int | None, o.setting("window", "5")]
Sinks = Annotated[int | None, o.setting("sinks", "1")]
Group = Annotated[int | None, o.setting("group", "4")]
Residual = Annotated[int | None, o.setting("residual", "2")]
Page = Annotated[int | None, o.setting("page", "4")]
Sweep = Annotated[
    bool,
    typer.Option("--sweep", help="Judge every model type.", rich_help_panel=SWEEP),
]
Types = Annotated[
    list[str],
    list_option(
        "--types",
        element=_text,
        example="llama mamba",
        help="Only these types.",
        metavar="TYPE...",
        unique=True,
        panel=SWEEP,
    ),
]
TimeLimit = Annotated[
    float,
    typer.Option("--time-limit", metavar="SECONDS", help="For a type.", rich_help_panel=SWEEP),
]
Resume = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        metavar="FILE",
        help="Keep each result in FILE at once, and skip the types that it has.",
        rich_help_panel=SWEEP,
    ),
]


@dataclass(frozen=True)
class Settings:
    """What was asked for; no caches: all that the model takes."""

    run: RunConfig
    caches: list[str]
    scenarios: list[str]  # none: all
    tokens: int
    impl: str = "transformers"

    def __post_init__(self) -> None:
        check_int("--tokens", self.tokens, 2)
        for kind in self.caches:
            choose(kind, tuple(TRANSFORMERS_CACHES), "--caches")
        if not self.run.model:
            hint = "Give a folder or a type: --model qwen3; --sweep takes all types."
            raise UsageError("--impl transformers: needs --model", hint)


def run(settings: Settings, out: Output) -> Report:
    """Judge the model with each kind of cache in every scenario, then a planted bug."""
    import torch

    from kvtool.core import footprint
    from kvtool.core.machine import prepare, require_memory
    from kvtool.core.verify import transformers_subject as hub

    names = chosen_scenarios(settings.scenarios)
    started = time.perf_counter()
    device, dtype = prepare(settings.run)
    model, note = hub.load_model(settings.run.model, settings.run.seed)
    model = model.to(device, dtype)
    n_vocab = model.config.get_text_config(decoder=True).vocab_size
    needed = footprint.converted(model, torch.float64)
    needed += footprint.arms(n_vocab, hub.PREFILL, settings.tokens, dtype.itemsize)
    what = "the weights in float64, and the logits of all runs"
    require_memory(what, needed, device, footprint.FEWER)
    kinds = settings.caches or list(TRANSFORMERS_CACHES)
    if note:
        out.note(note)
    if "quantized" in kinds and not model.config.is_encoder_decoder:
        out.note(
            "quantized: judged with exact values in place of its codes, backend "
            f"{hub.quantized_backend()}"
        )
    rows: list[Row] = []
    with out.progress("verify-cache", len(kinds) * len(names) + 1) as bar:
        for found in hub.check_transformers(
            model,
            kinds,
            names,
            settings.tokens,
            bool(settings.caches),
            tell=bar.update,
            remark=out.note,
        ):
            rows.append(Row.of(found))
            bar.advance()
            if found.finding.scenario == hub.ALL and (settings.caches or out.verbose):
                out.note(f"{found.cache}: {found.finding.evidence}")
    if all(row.scenario == hub.ALL for row in rows):
        raise UsageError(f"--model {settings.run.model}: {rows[0].evidence}")
    control = rows.pop() if rows[-1].cache == PLANTED else None
    resolved = {
        "architecture": type(model).__name__,
        "built": note,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "device": str(device),
        "scenarios": names,
        "caches": kinds,
    }
    seconds = time.perf_counter() - started
    prompt = hub.PREFILL
    return Report(rows, control, prompt, settings.run.dtype, resolved, seconds, out.verbose)


def chosen_scenarios(names: list[str]) -> list[str]:
    """Those given, or all. Raises UsageError for one that there is not."""
    from kvtool.core.verify.scenarios import SCENARIOS

    for name in names:
        choose(name, list(SCENARIOS), "--scenarios")
    return names or list(SCENARIOS)
