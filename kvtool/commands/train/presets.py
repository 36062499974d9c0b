"""Recipes of train-seq2seq: `--preset NAME` sets all that its command line leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from kvtool.registry import choose


@dataclass(frozen=True)
class Preset:
    """A recipe; docs/training.md says what is known of its scores."""

    about: str
    steps: int  # unless another length is asked for
    options: Mapping[str, Any]  # by parameter of the command


PRESETS = {
    "deep": Preset(
        "4 + 2 layers for English pronunciation, hours on one core",
        20_000,
        {
            "encoder_layers": 4,
            "decoder_layers": 2,
            "dropout": 0.2,
            "batch_tokens": 4096,
            "lr": 1.5e-3,
            "warmup": 400,
            "eval_every": 500,
            "average": 5,
        },
    ),
}


def use_preset(context: typer.Context, name: str | None) -> str | None:
    """Make the options of a preset the defaults of those that are not given. Raises UsageError for
    a name that there is not."""
    if name is not None:
        choose(name, tuple(PRESETS), "--preset")
        context.default_map = {**(context.default_map or {}), **PRESETS[name].options}
    return name


def steps_of(name: str | None) -> int | None:
    """How long a preset trains; None without one."""
    return None if name is None else PRESETS[name].steps


PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="A recipe for the options that are not given. "
        f"{'; '.join(f'{name}: {p.about}' for name, p in PRESETS.items())}.",
        is_eager=True,  # before the options whose defaults it changes
        callback=use_preset,
    ),
]
