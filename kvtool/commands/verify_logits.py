"""kvtool verify-logits: does the model compute what its weights and the formulas say?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kvtool.config import RunConfig
from kvtool.errors import UsageError
from kvtool.registry import choose
from kvtool.ui import options as o
from kvtool.ui.output import Output, present
from kvtool.ui.tables import Column

REFERENCE_NAME = "reference.safetensors"
PROMPTS = (
    "ROMEO:\nBut, soft! what light through yonder window breaks?",
    "KING RICHARD III:\nNow is the winter of our discontent",
    "Once upon a midnight dreary, while I pondered, weak and weary",
)


@dataclass(frozen=True)
class Settings:
    """Everything that verify-logits was asked for."""

    run: RunConfig
    reference: Path | None
    against: str | None
    prompt: str | None
    save_reference: Path | None

    def __post_init__(self) -> None:
        if self.against is not None:
            choose(self.against, ("numpy",), "--against")
            if self.reference is not None:
                raise UsageError("--reference: contradicts --against", "Give one of them.")
        elif self.prompt is not None or self.save_reference is not None:
            flag = "--prompt" if self.prompt is not None else "--save-reference"
            raise UsageError(f"{flag}: needs --against numpy", "A file has its own prompts.")


@dataclass
class Report:
    """Every position, and what they say together."""

    positions: list[dict[str, Any]]
    tokens_agree: bool
    tolerance_float64: float
    against: str
    dtype: str

    @property
    def worst_float64(self) -> float:
        return max(row["gap_float64"] for row in self.positions)

    @property
    def right(self) -> bool:
        return self.worst_float64 <= self.tolerance_float64 and self.tokens_agree

    @property
    def exit_code(self) -> int:
        return 0 if self.right else 1

    @property
    def conclusion(self) -> str:
        """The last line, in words."""
        n = len(self.positions)
        if not self.tokens_agree:
            return "mismatch: the tokenizer makes other tokens of the reference's text"
        if not self.right:
            wrong = [r for r in self.positions if not r["gap_float64"] <= self.tolerance_float64]
            first = wrong[0]
            return (
                f"mismatch: {len(wrong)} of {n} positions are wrong, also in float64 (gap "
                f"{self.worst_float64:.1e}), first at prompt {first['prompt']}, position "
                f"{first['position']}"
            )
        top1 = sum(row["same_top1"] for row in self.positions)
        return (
            f"rounding only: {n} positions agree with {self.against} to {self.worst_float64:.1e} "
            f"in float64; top token the same at {top1} of {n} in {self.dtype}"
        )

    def rows(self) -> list[dict[str, Any]]:
        return self.positions

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "worst_float64": self.worst_float64, "conclusion": self.conclusion}


def run(settings: Settings, out: Output) -> Report:
    """Compare the model, in the working dtype and in float64, with the reference."""
    import copy

    from kvtool.core import checkpoint, reference
    from kvtool.core.machine import prepare

    device, dtype = prepare(settings.run)
    loaded = checkpoint.load(settings.run.model, device, dtype, check=True)
    tokenizer = loaded.tokenizer
    if settings.against is None:
        path = settings.reference or loaded.path / REFERENCE_NAME
        references, name = reference.load(path), path.name
    else:
        weights = checkpoint.load_weights(loaded.path, loaded.config)
        texts = PROMPTS if settings.prompt is None else (settings.prompt,)
        prompts = [(text, tokenizer.encode(text)) for text in texts]
        references = reference.make_reference(weights, loaded.config, prompts)
        name = "the NumPy oracle"
    if settings.save_reference is not None:
        reference.save(settings.save_reference, references)
        out.note(f"written to {settings.save_reference}")
    reference.check_fits(references, loaded.config)
    agree = all(r.text is None or tokenizer.encode(r.text) == r.ids for r in references)
    precise = copy.deepcopy(loaded.model).double()
    positions = [
        {**vars(row), "piece": tokenizer.decode([row.token])}
        for row in reference.compare(loaded.model, precise, references)
    ]
    tolerance = max(reference.PRECISION[r.logits.dtype.name] for r in references)
    return Report(positions, agree, tolerance, name, settings.run.dtype)


def show(report: Report, out: Output) -> None:
    """A row per position and the conclusion."""
    columns = [
        Column("prompt", key=True),
        Column("position", key=True),
        Column("token", "left"),
        Column("max difference"),
        Column("max ULP"),
        Column("gap float64"),
        Column("top-1", "left"),
        Column("KL, nats"),
    ]
    rows = [
        [
            str(row["prompt"]),
            str(row["position"]),
            repr(row["piece"])[1:-1],
            f"{row['max_difference']:.1e}",
            f"{row['ulps']:.3g}",
            f"{row['gap_float64']:.1e}",
            "same" if row["same_top1"] else "differs",
            f"{row['kl']:.1e}",
        ]
        for row in report.positions
    ]
    out.table(f"Logits against {report.against}", columns, rows)
    out.verdict(report.right, report.conclusion)


def command(
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            metavar="FILE",
            show_default="the model's own reference.safetensors",
            help="Reference logits: .safetensors or .npz with ids.0, logits.0, ids.1 ...",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="numpy",
            help="Compute the reference now, with the NumPy oracle in float64.",
        ),
    ] = None,
    prompt: o.Prompt = None,
    save_reference: Annotated[
        Path | None,
        typer.Option(
            "--save-reference", metavar="FILE", help="Keep what --against computed (.safetensors)."
        ),
    ] = None,
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
    """Compare the logits of a decoder with a reference, position by position.

    The reference is a file, or what an independent NumPy implementation computes from the same
    weights. The float64 run decides: right weights and right code leave about 1e-15.

    Exit code 0: the same up to rounding; 1: not; 2: a reference that does not fit the model.

      kvtool verify-logits --against numpy --prompt "Hear me speak."
    """
    out = Output(as_json, output_file, quiet, verbose)
    run_config = RunConfig(model, device, dtype, threads, seed)
    settings = Settings(run_config, reference, against, prompt, save_reference)
    present("verify-logits", settings, run, show, out)
