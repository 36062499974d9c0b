"""What train-lm and train-seq2seq share: options, the run itself, and its report."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtool import ending
from kvtool.config import (
    ACTIVATIONS,
    NORMS,
    ModelConfig,
    RunConfig,
    TrainConfig,
    TrainLength,
    is_main_rank,
)
from kvtool.files import BEST, PLOT
from kvtool.reading import sha256
from kvtool.ui.environment import caption, cpu_name
from kvtool.ui.inert import in_a_line
from kvtool.ui.output import Output

if TYPE_CHECKING:
    import torch

    from kvtool.core.checkpoint.checkpoint import Checkpoint
    from kvtool.core.models import Model
    from kvtool.core.training.runs import RunFolder
    from kvtool.core.training.train import Position, Task

LENGTH = "How long"
MODEL = "The model"
OPTIMIZER = "The optimizer"
DEFAULT_MINUTES = 5.0

OutFolder = Annotated[
    Path,
    typer.Option("--out", metavar="DIR", help="Where checkpoints, the log and the plot go."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in --out, with the same settings.")
]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Show the log in TensorBoard too: DIR/tensorboard.")
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", metavar="N", help="Stop after N steps.", rich_help_panel=LENGTH),
]
Epochs = Annotated[
    int | None,
    typer.Option("--epochs", metavar="N", help="Stop after N epochs.", rich_help_panel=LENGTH),
]
Minutes = Annotated[
    float | None,
    typer.Option(
        "--minutes",
        metavar="X",
        help="Stop after X minutes of training; the seed alone does not fix the result then.",
        rich_help_panel=LENGTH,
    ),
]
Patience = Annotated[
    int,
    typer.Option(
        "--patience",
        metavar="N",
        help="Stop after N evaluations without a better score (0: never).",
        rich_help_panel=LENGTH,
    ),
]
EvalEvery = Annotated[
    int,
    typer.Option(
        "--eval-every",
        metavar="N",
        help="Evaluate and save every N steps.",
        rich_help_panel=LENGTH,
    ),
]
DModel = Annotated[
    int, typer.Option("--d-model", metavar="N", help="Width.", rich_help_panel=MODEL)
]
Heads = Annotated[
    int, typer.Option("--heads", metavar="N", help="Attention heads.", rich_help_panel=MODEL)
]
KvHeads = Annotated[
    int,
    typer.Option(
        "--n-kv-heads",
        metavar="N",
        show_default="as many as heads",
        help="Key-value heads; fewer are shared by groups of heads, and make the cache smaller.",
        rich_help_panel=MODEL,
    ),
]
Norm = Annotated[
    str,
    typer.Option("--norm", metavar="KIND", help=f"{' or '.join(NORMS)}.", rich_help_panel=MODEL),
]
Activation = Annotated[
    str,
    typer.Option(
        "--activation",
        metavar="KIND",
        help=f"{', '.join(ACTIVATIONS[:-1])} or {ACTIVATIONS[-1]}.",
        rich_help_panel=MODEL,
    ),
]
TIED = "Let the logits head share the weights of the token embedding."
Tied = Annotated[
    bool, typer.Option("--tied/--untied", help=TIED, show_default="tied", rich_help_panel=MODEL)
]
Untied = Annotated[
    bool, typer.Option("--tied/--untied", help=TIED, show_default="untied", rich_help_panel=MODEL)
]
Context = Annotated[
    int,
    typer.Option(
        "--context",
        metavar="N",
        help="Longest sequence, in tokens.",
        rich_help_panel=MODEL,
    ),
]
Positions = Annotated[
    str,
    typer.Option(
        "--positions",
        metavar="KIND",
        help="sinusoidal, learned or rotary.",
        rich_help_panel=MODEL,
    ),
]
Dropout = Annotated[
    float, typer.Option("--dropout", metavar="X", help="Dropout.", rich_help_panel=MODEL)
]
VocabSize = Annotated[
    int,
    typer.Option(
        "--vocab-size", metavar="N", help="Pieces of a bpe tokenizer.", rich_help_panel=MODEL
    ),
]
BatchTokens = Annotated[
    int,
    typer.Option("--batch-tokens", metavar="N", help="Tokens per step.", rich_help_panel=OPTIMIZER),
]
LearningRate = Annotated[
    float, typer.Option("--lr", metavar="X", help="Peak learning rate.", rich_help_panel=OPTIMIZER)
]
Warmup = Annotated[
    int,
    typer.Option(
        "--warmup",
        metavar="N",
        help="Steps in which the learning rate rises to its peak.",
        rich_help_panel=OPTIMIZER,
    ),
]
Schedule = Annotated[
    str,
    typer.Option(
        "--schedule",
        metavar="KIND",
        help="How the rate falls after warm-up: cosine, inverse-sqrt or constant.",
        rich_help_panel=OPTIMIZER,
    ),
]
Clip = Annotated[
    float,
    typer.Option(
        "--clip", metavar="X", help="Longest gradient, as a norm.", rich_help_panel=OPTIMIZER
    ),
]
WeightDecay = Annotated[
    float,
    typer.Option(
        "--weight-decay", metavar="X", help="AdamW's weight decay.", rich_help_panel=OPTIMIZER
    ),
]
Average = Annotated[
    int,
    typer.Option(
        "--average",
        metavar="N",
        help="At each evaluation, also score the mean of the last N weights (0: no).",
        rich_help_panel=OPTIMIZER,
    ),
]
Amp = Annotated[
    bool | None,
    typer.Option(
        "--amp/--no-amp",
        show_default="where the hardware does",
        help="Multiply in bfloat16 (autocast).",
        rich_help_panel=OPTIMIZER,
    ),
]


@dataclass
class Trained:
    """How a run ended; figures of the best checkpoint are in `scores`, and `prompt` is a text that
    it can start from."""

    steps: int
    epochs: int
    tokens: int
    seconds: float
    parameters: int
    best_step: int
    best: Path
    sha256: str
    scores: list[dict[str, Any]]
    prompt: str
    exit_code: int = 0

    @classmethod
    def of(
        cls, at: Position, best: Checkpoint, scores: list[dict[str, Any]], prompt: str
    ) -> Trained:
        """The report of a run that ended at `at`."""
        parameters = sum(p.numel() for p in best.model.parameters())
        return cls(
            at.step, at.epoch, at.tokens, at.seconds, parameters, at.best_step, best.path,
            best.sha256, scores, prompt,
        )  # fmt: skip

    @property
    def resolved(self) -> dict[str, Any]:
        """What the scores are of."""
        return {"model": str(self.best), "sha256": self.sha256}

    @property
    def conclusion(self) -> str:
        """How much was trained, and what was best."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        return (
            f"{self.steps:,} steps, {self.tokens:,} tokens in {self.seconds:,.0f} s "
            f"({rate:,.0f} tokens/s), {self.parameters:,} parameters; "
            f"best at step {self.best_step:,}"
        )

    def rows(self) -> list[dict[str, Any]]:
        return self.scores

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "conclusion": self.conclusion}


def train_length(steps: int | None, epochs: int | None, minutes: float | None) -> TrainLength:
    """The length that was asked for, or five minutes. Raises UsageError for two of them."""
    if steps is None and epochs is None and minutes is None:
        minutes = DEFAULT_MINUTES
    return TrainLength(steps, epochs, minutes)


def with_vocab(config: ModelConfig, target: int, source: int = 0) -> ModelConfig:
    """`config` with the vocabularies that the tokenizers turned out to have."""
    return dataclasses.replace(config, vocab_size=target, source_vocab_size=source)


def output(as_json: bool, output_file: Path | None, quiet: bool, verbose: bool) -> Output:
    """Where words go; those of a process that follows another go nowhere."""
    if not is_main_rank():
        return Output(quiet=True)
    return Output(as_json, output_file, quiet, verbose)


def device_of(run: RunConfig, config: TrainConfig) -> torch.device:
    """Where to train. Raises before any work, or data is read, what would end the run later: for a
    number format that training does not use, for --out, and where TensorBoard is not installed."""
    import torch

    from kvtool.core.machine import prepare
    from kvtool.core.training.runs import RunFolder, event_writer
    from kvtool.errors import UsageError

    if run.dtype != "float32":
        raise UsageError(
            f"--dtype {run.dtype}: training keeps float32 weights", "Leave it out, or give --amp."
        )
    if config.tensorboard:
        event_writer()
    if is_main_rank():
        RunFolder.probe(config.out, config.resume)
    device = prepare(run)[0]
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each process
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def trained_in(device: torch.device, amp: bool | None) -> str:
    """The format, threads and processor of a run, for a title."""
    import torch

    return caption(
        {
            "dtype": "float32, products in bfloat16" if amp else "float32",
            "threads": torch.get_num_threads(),
            "processor": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        }
    )


def train(model: Model, task: Task, config: TrainConfig, description: str, out: Output) -> Position:
    """Train within config.out, show how it goes, and draw the loss.

    Of the processes of a team, only the leader returns.
    """
    from kvtool.core.machine import multiplies_bfloat16
    from kvtool.core.training.runs import RunFolder
    from kvtool.core.training.team import joined
    from kvtool.core.training.train import Trainer

    device = next(model.parameters()).device
    if config.amp is None:
        config = dataclasses.replace(config, amp=multiplies_bfloat16(device))
    with joined(device) as team, contextlib.ExitStack() as stack:
        folder: RunFolder | None = None

        def open_folder() -> None:
            nonlocal folder
            folder = stack.enter_context(RunFolder(config.out, config.resume, out.warn))

        team.lead(open_folder)
        length = config.length
        total = length.steps or (length.epochs or 0) * len(task.batches(0)) or None
        with out.progress(description, total) as bar:
            trainer = Trainer(model, task, config, folder, bar, out.note, team)
            ending.check()
            try:
                position = trainer.run()
            finally:
                if folder is not None and trainer.at.step:  # else there is none, or it was refused
                    title = f"kvtool {description}, {in_a_line(str(config.out))}"
                    about = trained_in(device, config.amp)
                    out.attempt(partial(draw, folder, task, f"{title}\n{about}"))
    if not team.leads:
        raise typer.Exit()
    return position


def best_of(at: Position, model: Model, task: Task, config: TrainConfig) -> Checkpoint:
    """The best checkpoint of a run that ended at `at`.

    Raises FileError for another one than the run saved: other weights, model or tokenizers.
    """
    import torch

    from kvtool.core.checkpoint import checkpoint
    from kvtool.core.checkpoint.weight_files import WEIGHTS
    from kvtool.errors import FileError

    def require(same: bool, what: str) -> None:
        # A run that goes on to its end at the same steps saves it anew; one by --minutes, or with
        # other threads, may not, and then no score of it is known.
        if not same:
            raise FileError(
                f"{folder}: is not the best checkpoint that the run saved, at step "
                f"{at.best_step:,} (another {what})",
                "It was changed, or is newer: saved as the run was killed, which went another way.",
            )

    def rest(files: dict[str, bytes]) -> dict[str, bytes]:
        return {name: data for name, data in files.items() if name != WEIGHTS}

    folder = config.out / BEST
    require(sha256(folder / WEIGHTS) == at.best_sha256, f"SHA-256 of {WEIGHTS}")
    device = next(model.parameters()).device
    best = checkpoint.load(str(folder), device, torch.float32)
    found = checkpoint.files(best.model, best.tokenizer, best.source_tokenizer)
    require(rest(found) == rest(task.files(model)), "configuration or tokenizer")
    return best


def draw(folder: RunFolder, task: Task, title: str) -> None:
    """The plot of the loss, from the log."""
    from kvtool.ui.plots import loss_plot

    names = task.score_name, task.loss_name, task.loss_floor
    loss_plot(folder.path / PLOT, folder.read_log(), *names, title, folder.write)


def show_trained(report: Trained, out: Output) -> None:
    """The final table and where to find the model."""
    names = dict.fromkeys(name for row in report.scores for name in row if name != "signatures")
    rows = [[_cell(row.get(name)) for name in names] for row in report.scores]
    out.table("best checkpoint", list(names), rows)
    for line in _signatures(report.scores):
        out.text(line)
    out.text(report.conclusion)
    out.text(f"checkpoint: {report.best}", wrap=False)
    out.text(f"loss curve: {report.best.parent / 'loss.png'}", wrap=False)
    command = ["kvtool", "generate", "--model", str(report.best), "--prompt", report.prompt]
    out.hint(shlex.join(command))


def _signatures(scores: list[dict[str, Any]]) -> list[str]:
    """How each figure was measured, in sacreBLEU's form, and of which parts."""
    parts: dict[str, dict[str, None]] = {}
    for row in scores:
        for name, signature in row.get("signatures", {}).items():
            parts.setdefault(f"{name}|{signature}", {})[row["part"]] = None
    return [f"{signature} ({', '.join(of)})" for signature, of in parts.items()]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str("" if value is None else value)
