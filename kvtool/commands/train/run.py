"""A training run: where it goes, how it is shown, and the best checkpoint that it left."""

from __future__ import annotations

import contextlib
import dataclasses
from functools import partial
from typing import TYPE_CHECKING

import typer

from kvtool import ending
from kvtool.config import ModelConfig, RunConfig, TrainConfig, is_main_rank
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


def with_vocab(config: ModelConfig, target: int, source: int = 0) -> ModelConfig:
    """`config` with the vocabulary sizes of the tokenizers."""
    return dataclasses.replace(config, vocab_size=target, source_vocab_size=source)


def device_of(run: RunConfig, config: TrainConfig) -> torch.device:
    """Where to train. Raises before any work, or data is read, what would end the run later: for a
    number format that training does not use, for --out, and where TensorBoard is not installed."""
    from kvtool.core.machine import prepare
    from kvtool.core.training.runs import RunFolder, event_writer
    from kvtool.core.training.team import device_of_rank
    from kvtool.errors import UsageError

    if run.dtype != "float32":
        raise UsageError(
            f"--dtype {run.dtype}: training keeps float32 weights", "Leave it out, or give --amp."
        )
    if config.tensorboard:
        event_writer()
    if is_main_rank():
        RunFolder.probe(config.out, config.resume)
    return device_of_rank(prepare(run)[0])


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
