"""kvtool verify-logits: does the model compute what its weights and the formulas say?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtool.commands.verify import served
from kvtool.commands.verify.options import (
    MAX_REQUESTS,
    REQUEST_TIMEOUT,
    DryRun,
    EngineName,
    Prompts,
    RecordedSeed,
    Requests,
    Timeout,
)
from kvtool.config import RunConfig
from kvtool.errors import FileError, UsageError
from kvtool.registry import choose
from kvtool.ui import options as o
from kvtool.ui.cases import Case, status_of
from kvtool.ui.documents import OF_CHECKS, check_writable
from kvtool.ui.option_rules import contradicts, needs, require
from kvtool.ui.output import Output, present
from kvtool.ui.tables import Column

if TYPE_CHECKING:
    from kvtool.core.checkpoint.checkpoint import Checkpoint

AGAINST = {"numpy": "the NumPy oracle", "transformers": "transformers' model"}
REFERENCE_NAME = "reference.safetensors"
PROMPTS = (
    "ROMEO:\nBut, soft! what light through yonder window breaks?",
    "KING RICHARD III:\nNow is the winter of our discontent",
    "Once upon a midnight dreary, while I pondered, weak and weary",
)
SMALLER = "Free memory, or check a smaller model."
RULES = (
    contradicts("--against", "--reference", "Give one of them."),
    contradicts("--prompt", "--prompts", "Give one of them."),
    contradicts(
        "--server",
        "--against --reference --save-reference --dtype",
        "The reference is the model itself, in float64.",
    ),
    contradicts("--dry-run", "--plot", "A dry run finds nothing to draw."),
    needs("--against or --server", "--prompt", "A file has its own prompts."),
    needs("--against", "--save-reference", "A file has its own prompts."),
    needs(
        "--server",
        "--engine --prompts --tokens --requests --timeout --dry-run --plot",
        "Add --server URL.",
    ),
)


@dataclass(frozen=True)
class Settings:
    """All settings of verify-logits."""

    run: RunConfig
    reference: Path | None
    against: str | None
    prompt: str | None
    save_reference: Path | None

    def __post_init__(self) -> None:
        if self.against is not None:
            choose(self.against, tuple(AGAINST), "--against")
        if self.save_reference is not None:
            check_destination(self.save_reference)


def check_destination(path: Path) -> None:
    """Refuse a --save-reference that could not be written, before the work that it is meant for."""
    if path.suffix != ".safetensors":
        found = path.suffix or "no suffix"
        raise UsageError(f"--save-reference {path}: {found} (expected .safetensors)")
    check_writable(path, "--save-reference")


@dataclass
class LogitsReport:
    """All positions, and the conclusion from them."""

    positions: list[dict[str, Any]]
    tokens_agree: bool
    tolerance_float64: float
    against: str
    dtype: str
    resolved: dict[str, Any] = field(default_factory=dict)  # the settings that were left open

    @property
    def worst_float64(self) -> float:
        """The largest gap in float64, over the largest logit."""
        return max(row["gap_float64"] for row in self.positions)

    @property
    def not_finite(self) -> list[dict[str, Any]]:
        """Positions with NaN or infinite logits in the working format."""
        return [row for row in self.positions if not math.isfinite(row["max_difference"])]

    @property
    def right(self) -> bool:
        """Whether the float64 run agrees with the reference, and all logits are finite."""
        exact = self.worst_float64 <= self.tolerance_float64
        return exact and self.tokens_agree and not self.not_finite

    @property
    def exit_code(self) -> int:
        """0 if it is right, else 1."""
        return 0 if self.right else 1

    @property
    def conclusion(self) -> str:
        """The last line, in words."""
        n = len(self.positions)
        if not self.tokens_agree:
            return "mismatch: the tokenizer makes other tokens of the reference's text"
        wrong = [r for r in self.positions if not r["gap_float64"] <= self.tolerance_float64]
        if wrong:
            return (
                f"mismatch: {len(wrong)} of {n} positions are wrong, also in float64 (gap "
                f"{self.worst_float64:.1e}), first at {place(wrong[0])}"
            )
        if bad := self.not_finite:
            return (
                f"mismatch: {len(bad)} of {n} positions are not finite in {self.dtype}, first at "
                f"{place(bad[0])}"
            )
        top1 = sum(row["same_top1"] for row in self.positions)
        return (
            f"rounding only: {n} positions agree with {self.against} to {self.worst_float64:.1e} "
            f"in float64; top token the same at {top1} of {n} in {self.dtype}"
        )

    def rows(self) -> list[dict[str, Any]]:
        """The positions."""
        return self.positions

    def cases(self) -> list[Case]:
        """A case for each position, and one for the tokens of the reference's text."""
        agree = self.tokens_agree
        said = "" if agree else self.conclusion
        found = [Case("the tokens of the reference's text", status_of(agree, not agree), "", said)]
        for row in self.positions:
            gap, finite = row["gap_float64"], math.isfinite(row["max_difference"])
            exact = gap <= self.tolerance_float64
            said = f"the gap in float64 is {gap:.1e}, and {self.tolerance_float64:.1e} is allowed"
            said = said if finite or not exact else f"the logits are not finite in {self.dtype}"
            right = exact and finite
            verdict = "rounding" if right else "mismatch"
            found.append(Case(place(row), status_of(right, not right), verdict, said))
        return found

    def to_dict(self) -> dict[str, Any]:
        """The fields of the JSON document."""
        return {**vars(self), "worst_float64": self.worst_float64, "conclusion": self.conclusion}


def place(row: dict[str, Any]) -> str:
    """The place of a row: its prompt and position."""
    return f"prompt {row['prompt']}, position {row['position']}"


def run(settings: Settings, out: Output) -> LogitsReport:
    """Compare the model, in the working dtype and in float64, with the reference."""
    from kvtool.core import footprint
    from kvtool.core.checkpoint import checkpoint
    from kvtool.core.machine import prepare, require_memory
    from kvtool.core.reference import reference
    from kvtool.core.verify.widened import is_large

    device, dtype = prepare(settings.run)
    loaded = checkpoint.load(settings.run.model, device, dtype, check=True)
    reference.check_decoder(loaded.config)
    tokenizer = loaded.tokenizer
    weights_take = footprint.witness(loaded.model, settings.against, is_large(loaded.model))
    what = "verify-logits in float64"
    if settings.against is None:
        path = settings.reference or own_reference(loaded.path)
        references, name = reference.load(path, loaded.config), path.name
        require_memory(what, weights_take, device, SMALLER)
    else:
        texts: tuple[str | None, ...] = (settings.prompt,)
        if settings.prompt is None and loaded.reads_text:
            texts = PROMPTS
        prompts = [(text, checkpoint.prompt_ids(loaded, text)) for text in texts]
        if settings.prompt is None:
            prompts = those_that_fit(prompts, loaded.config.context, out)
            prompts = prompts or [(None, checkpoint.prompt_ids(loaded, None))]
        lengths, against = [len(ids) for _, ids in prompts], settings.against
        sizes = sum(lengths), max(lengths), dtype.itemsize
        logits_take = footprint.reference(loaded.config, *sizes)
        needed = weights_take + logits_take
        require_memory(f"{what}, --against {against}", needed, device, SMALLER)
        weights = checkpoint.StoredWeights(loaded.path, loaded.config)
        references = reference.make_reference(weights, loaded.config, prompts, against, loaded.path)
        del weights
        name = AGAINST[against]
    if (save_to := settings.save_reference) is not None and out.attempt(
        lambda: reference.save(save_to, references)
    ):
        out.note(f"written to {save_to}")
    reference.check_fits(references, loaded.config)
    agree = all(r.text is None or tokenizer.encode(r.text) == r.ids for r in references)
    stored, precise = in_float64(loaded, device, dtype)
    positions = [
        {**vars(row), "piece": tokenizer.decode([row.token])}
        for row in reference.compare(loaded.model, precise, references)
    ]
    tolerance = reference.allowance(precise, references, stored)
    resolved = {**loaded.facts, "device": str(device)}
    return LogitsReport(positions, agree, tolerance, name, settings.run.dtype, resolved)


def those_that_fit(
    prompts: list[tuple[str | None, list[int]]], context: int, out: Output
) -> list[tuple[str | None, list[int]]]:
    """The prompts that nobody asked for, but for those that a model does not hold."""
    found = [(text, ids) for text, ids in prompts if len(ids) <= context]
    if left := len(prompts) - len(found):
        out.note(f"{left} of {len(prompts)} texts left out: the model holds {context} tokens")
    return found


def in_float64(loaded: Checkpoint, device: Any, dtype: Any) -> tuple[Any, Any]:
    """A model with the stored numbers, and the same in float64. It is loaded again, since weights
    that were rounded to bfloat16 are others. Weights of a large model are widened as they are read,
    those of `loaded` itself if none was rounded."""
    import torch

    from kvtool.core.checkpoint import checkpoint
    from kvtool.core.verify.widened import Room, is_large, twin

    name, path, model = str(loaded.path), loaded.path, loaded.model
    if is_large(model) and checkpoint.fits(path, torch.float32):
        if not checkpoint.fits(path, dtype):
            model = checkpoint.load(name, device, torch.float32, check=True).model
        return model, twin(model, Room())
    precise = checkpoint.load(name, device, torch.float64, check=True).model
    return precise, precise


def own_reference(folder: Path) -> Path:
    """The reference that a checkpoint brings along. Raises FileError if there is none."""
    path = folder / REFERENCE_NAME
    if not path.exists():
        found = f"{folder}: is GGUF" if folder.is_file() else f"{path}: not found"
        raise FileError(
            f"{found}, so the model has no reference of its own",
            "Give --reference FILE, or --against numpy to compute one now.",
        )
    return path


def show(report: LogitsReport, out: Output) -> None:
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
            repr(row["piece"]),  # with its quotes, or a blank would not be seen
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
            metavar="|".join(AGAINST),
            help="Compute the reference now in float64, by the NumPy oracle or a model of "
            "transformers with the same weights.",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            show_default="three texts",
            help="Compare at every token of this text, with --against.",
            callback=o.utf8_text,
        ),
    ] = None,
    save_reference: Annotated[
        Path | None,
        typer.Option(
            "--save-reference", metavar="FILE", help="Keep what --against computed (.safetensors)."
        ),
    ] = None,
    server: served.Server = None,
    engine: EngineName = "",
    prompts: Prompts = None,
    tokens: served.Tokens = served.TAIL,
    requests: Requests = MAX_REQUESTS,
    timeout: Timeout = REQUEST_TIMEOUT,
    dry_run: DryRun = False,
    plot: o.Plot = None,
    model: o.Model = "",
    device: o.Device = "auto",
    dtype: o.Dtype = "float32",
    threads: o.Threads = 0,
    seed: RecordedSeed = 0,
    as_json: o.Json = False,
    output_files: o.OutputOfChecks = [],  # noqa: B006
    github: o.GitHub = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Compare the logits of a decoder with a reference, position by position.

    The reference is a file, or what independent code computes from the same weights: a NumPy
    implementation, or transformers. The float64 run decides: right weights and
    right code leave about 1e-15. With --server it is the reference, and a running engine is judged:
    its format's rounding, and its own noise, are measured beside.

    Exit code 0: the same up to rounding; 1: not; 2: a reference that does not fit the model.

      kvtool verify-logits --against numpy --prompt "Hear me."
      kvtool verify-logits --server localhost:80 --model m.gguf
    """
    out = Output(as_json, output_files, quiet, verbose, OF_CHECKS, github)
    run_config = RunConfig(model, device, dtype, threads, seed)
    given = {
        "--against": against is not None,
        "--reference": reference,
        "--prompt": prompt is not None,
        "--save-reference": save_reference,
        "--server": server is not None,
        "--engine": engine,
        "--prompts": prompts,
        "--tokens": tokens != served.TAIL,
        "--requests": requests != MAX_REQUESTS,
        "--timeout": timeout != REQUEST_TIMEOUT,
        "--dry-run": dry_run,
        "--plot": plot,
        "--dtype": dtype != "float32",
    }
    given["--against or --server"] = given["--against"] or given["--server"]
    require(RULES, given)
    if server is not None:
        o.require_inputs(model)
        exact = RunConfig(model, device, "float64", threads, seed)
        asked = served.Settings(
            exact, server, engine, prompt, prompts, tokens, requests, timeout, dry_run, plot
        )
        served.present_served(asked, out)
    settings = Settings(run_config, reference, against, prompt, save_reference)
    o.require_inputs(model, ("--reference", reference, "reference logits"))
    present("verify-logits", settings, run, show, out)
