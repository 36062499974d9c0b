"""The training loop of all tasks; a run resumed at any step gives the same bytes.

The order of the data, the dropout and the schedule of a step depend only on (seed, step). So a
state contains no random generator, and a killed run continues as if it had never stopped.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import signal
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from kvtool import ending
from kvtool.config import TrainConfig
from kvtool.core.checkpoint.weight_files import WEIGHTS
from kvtool.core.machine import derived_seed
from kvtool.core.models import Model
from kvtool.core.native import context
from kvtool.core.training.run_files import Strange, checked
from kvtool.core.training.runs import RunFolder
from kvtool.core.training.team import ALONE, Share, Team
from kvtool.errors import CheckFailed
from kvtool.files import BEST, LAST

LOG_EVERY = 10  # steps
FLOOR = 0.05  # share of the peak learning rate at the end


def learning_rate(
    peak: float, warmup: int, step: int, done: float, schedule: str = "cosine"
) -> float:
    """The learning rate of a step: a linear warmup, then a schedule.

    done: the finished share of the run, 0 to 1. schedule: "cosine" falls to FLOOR * peak
    (Loshchilov 2017); "inverse-sqrt" falls with the root of the step (Vaswani 2017, 5.3);
    "constant" does not fall.
    """
    warmup = max(warmup, 1)
    rise = min(1.0, (step + 1) / warmup)
    if schedule == "cosine":
        fall = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done))
        return peak * min(rise, fall)
    if schedule == "inverse-sqrt":
        return peak * min(rise, math.sqrt(warmup / (step + 1)))
    return peak * rise


class Task(Protocol):
    """A training task: data in batches, a loss, and scores on held-out data."""

    @property
    def score_name(self) -> str:
        """The figure of `evaluate` that decides which checkpoint is best."""

    @property
    def loss_name(self) -> str:
        """The figure of `evaluate` that is the loss on held-out data."""

    @property
    def loss_floor(self) -> float:
        """The lowest value that `loss` can reach, in nats."""

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher score is better, as for BLEU, or a lower one, as for an error rate."""

    @property
    def in_percent(self) -> Collection[str]:
        """The figures of `evaluate` that are in percent, 0 to 100."""

    def batches(self, epoch: int) -> Sequence[Any]:
        """All batches of an epoch, in order; the same at every call."""

    def loss(self, model: Model, batch: Any, share: Share = ...) -> tuple[Tensor, int]:
        """What the rows of `share` add to the batch's mean loss per token, in nats, and their
        number of tokens."""

    def evaluate(self, model: Model) -> dict[str, float]:
        """Figures on held-out data by name, with `score_name`; the model is in eval mode."""

    def files(self, model: Model) -> dict[str, bytes]:
        """The files of a checkpoint by name, as from checkpoint.files."""

    def facts(self) -> dict[str, Any]:
        """The facts that a resumed run must share: the data and the tokenizers."""


class Watcher(Protocol):
    """Receives the progress of a run, as a progress bar does."""

    def advance(self, n: int = 1) -> None:
        """Count `n` more steps as done."""

    def update(self, text: str = "", **fields: Any) -> None:
        """Show a text, and figures by name."""


@dataclass
class Position:
    """The position of a run; every state saves it."""

    step: int = 0  # steps done
    epoch: int = 0
    batch: int = 0  # index of the next batch in the epoch
    tokens: int = 0  # trained on so far
    seconds: float = 0.0
    best_score: float | None = None  # None before the first evaluation
    best_step: int = 0
    best_sha256: str = ""  # of the weights of the best checkpoint
    stale: int = 0  # evaluations since the best


class Loss(nn.Module):
    """The loss of a rank's share as a module.

    DistributedDataParallel averages gradients only around a module's forward, and a loss does more
    than the forward of an encoder-decoder.
    """

    def __init__(self, model: Model, task: Task, share: Share) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.share = share

    def forward(self, batch: Any) -> tuple[Tensor, int]:
        """As Task.loss, for this rank's share."""
        return self.task.loss(self.model, batch, self.share)


class Trainer:
    """Trains a model on a task, and writes to the run folder.

    folder: None except in the team's leader. watcher: receives the progress. say: called with
    sentences for the user.
    """

    def __init__(
        self,
        model: Model,
        task: Task,
        config: TrainConfig,
        folder: RunFolder | None,
        watcher: Watcher,
        say: Callable[[str], None],
        team: Team = ALONE,
    ) -> None:
        self.model = model
        self.task = task
        self.config = config
        self.team = team
        self.folder = cast(RunFolder, folder)
        self.watcher = watcher
        self.say = say
        self.at = Position()
        self.recent: list[dict[str, Tensor]] = []  # weights at the last evaluations, to average
        self.device = next(model.parameters()).device
        self.loss = team.wrap(Loss(model, task, team.share))
        matrices = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=(0.9, config.beta2), fused=True
        )

    def run(self) -> Position:
        """Train to the end -> the last position.

        Raises CheckFailed for a loss, gradient or score that is not finite, and FileError if the
        folder does not fit the run or cannot be written. On a signal it saves, then raises it
        again.
        """
        self.team.lead(lambda: self.folder.agree(self._facts()))
        self._restore()
        # Under torchrun each process gets a Ctrl-C twice: from the terminal and from torchrun.
        with ending.noted(insist=not self.team.alone) as wanted:
            number = 0
            while not number and not self._finished():
                number = self._epoch(wanted)
            if number:
                self.team.lead(self._save)
        if number:
            self.say(f"stopped at step {self.at.step:,}; go on with --resume")
            signal.raise_signal(number)
        return self.at

    def _facts(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self.config)
        del settings["out"], settings["resume"], settings["tensorboard"]
        return {**settings, "model": self.model.config.to_dict(), **self.task.facts()}

    def _restore(self) -> None:
        state = self.team.lead(self._read_state)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        # The groups hold the configuration, which is the same as in the state.
        groups = self.optimizer.state_dict()["param_groups"]
        moments = state["optimizer"]["state"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.at = Position(**state["position"])
        self.recent = state["recent"]
        self.watcher.advance(self.at.step)
        self.say(f"resumed at step {self.at.step:,}")

    def _read_state(self) -> dict[str, Any] | None:
        state = self.folder.load_state(self._checked) if self.config.resume else None
        step = -1 if state is None else state["position"]["step"]
        if state is not None and state["position"]["best_sha256"]:
            self.folder.require_best(state["position"]["best_step"])
        self.folder.rewind_log(step)
        if self.config.tensorboard:
            self.folder.open_events(step)
        return state

    def _checked(self, state: Any, step: int) -> dict[str, Any]:
        """The state, if this run could have written it at `step`. Raises Strange if not."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        found = checked(state, step, self.model.state_dict(), parameters, self.config.average)
        at, length = found["position"], self.config.length
        over = (at["epoch"], min(at["batch"], 1)) > (length.epochs or step, 0)
        if step > (length.steps or step) or over:
            raise Strange("stands behind the end of its run")
        if at["batch"] >= len(self.task.batches(at["epoch"])):
            raise Strange("stands behind the end of its epoch")
        return found

    def _done(self) -> float:
        at = self.at
        return self.config.length.done(at.step, at.epoch, at.seconds, self._steps_per_epoch)

    @cached_property
    def _steps_per_epoch(self) -> int:
        return len(self.task.batches(0))

    def _finished(self) -> bool:
        patience = self.config.patience
        return self._done() >= 1.0 or bool(patience and self.at.stale >= patience)

    def _epoch(self, wanted: Callable[[], int]) -> int:
        """Train to the end of the epoch or run -> the signal that stopped the team, or 0."""
        batches = self.task.batches(self.at.epoch)
        while self.at.batch < len(batches):
            self._step(batches[self.at.batch])
            if self.at.batch == len(batches):
                self.at.epoch, self.at.batch = self.at.epoch + 1, 0
            last = self._done() >= 1.0
            if last or self.at.step % self.config.eval_every == 0:
                self.at = self.team.lead(self._evaluate)
            number = int(max(row[0] for row in self.team.gather(wanted())))
            if number or self._finished() or self.at.batch == 0:
                return number
        return 0

    def _step(self, batch: Any) -> None:
        at, config = self.at, self.config
        started = time.perf_counter()
        torch.manual_seed(derived_seed(config.seed, at.step))
        rate = learning_rate(config.lr, config.warmup, at.step, self._done(), config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        amp = torch.autocast(self.device.type, torch.bfloat16, enabled=bool(config.amp))
        with context.within(training=True), amp:
            loss, n = self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        (loss * self.team.share.world_size).backward()  # the team averages gradients over ranks
        parts = self.team.gather(float(loss.detach()), n)
        value = self._finite("loss", sum(part[0] for part in parts), at.step + 1)
        length = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        norm = self._finite("gradient's norm", float(length), at.step + 1)
        self.optimizer.step()
        at.step, at.batch = at.step + 1, at.batch + 1
        at.tokens += sum(int(part[1]) for part in parts)
        at.seconds += self.team.gather(time.perf_counter() - started)[0][0]
        self._report(value, rate, norm)

    def _finite(self, what: str, value: float, step: int) -> float:
        """Return `value`. Raises CheckFailed if it is not finite, before it reaches the weights."""
        if not math.isfinite(value):
            kept = "the last good checkpoint is kept"
            if self.team.leads and not (self.folder.path / LAST).exists():
                kept = "no checkpoint was saved yet: remove the folder, or give another --out"
            raise CheckFailed(
                f"step {step}: the {what} is {value}",
                f"Lower --lr (now {self.config.lr:g}); {kept}.",
            )
        return value

    def _report(self, loss: float, rate: float, norm: float) -> None:
        at = self.at
        speed = at.tokens / at.seconds if at.seconds else 0.0
        self.watcher.update(loss=loss, tok_s=round(speed))
        self.watcher.advance()
        if self.team.leads and (at.step % LOG_EVERY == 0 or at.step == 1):
            self.folder.log(
                step=at.step,
                epoch=at.epoch,
                loss=loss,
                lr=rate,
                grad_norm=norm,
                tokens=at.tokens,
                seconds=round(at.seconds, 3),
            )

    @torch.inference_mode()
    def _evaluate(self) -> Position:
        """Score the weights, and their average over the last evaluations; then save."""
        at = self.at
        models = {"valid": self.model}
        if (averaged := self._averaged()) is not None:
            models["averaged"] = averaged
        better = False
        for name, model in models.items():
            model.eval()
            figures = self.task.evaluate(model)
            for figure, value in figures.items():
                self._finite(figure.replace("_", " "), value, at.step)
            self.folder.log(step=at.step, **{name: figures}, seconds=round(at.seconds, 3))
            score = figures[self.task.score_name]
            best = self._is_better(score)
            better = better or best
            if best:
                sha256 = self._save_checkpoint(BEST, model)
                at.best_score, at.best_step, at.best_sha256 = score, at.step, sha256
            rates = self.task.in_percent
            words = ", ".join(
                f"{k} {v:.4g}{' %' if k in rates else ''}" for k, v in figures.items()
            )
            of = "" if name == "valid" else f", average of {len(self.recent)}"
            self.say(f"step {at.step:,}{of}: {words}{' (best)' if best else ''}")
        at.stale = 0 if better else at.stale + 1
        self._save()
        return at

    def _is_better(self, score: float) -> bool:
        best = self.at.best_score
        if best is None:
            return True
        return score > best if self.task.higher_is_better else score < best

    def _averaged(self) -> Model | None:
        """The model with the mean of its weights over the last evaluations (Vaswani 2017, 6.1).

        None before the second evaluation, and without --average.
        """
        if self.config.average < 2:
            return None
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.recent = [*self.recent, weights][-self.config.average :]
        if len(self.recent) < 2:
            return None
        model = copy.deepcopy(self.model)
        model.load_state_dict(
            {name: torch.stack([w[name] for w in self.recent]).mean(0) for name in weights}
        )
        return model

    def _save(self) -> None:
        self._save_checkpoint(LAST, self.model)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": dataclasses.asdict(self.at),
            "recent": self.recent,
        }
        self.folder.save_state(self.at.step, state)

    def _save_checkpoint(self, name: str, model: Model) -> str:
        """Write a checkpoint -> the SHA-256 of its weights."""
        files = self.task.files(model)
        self.folder.save_checkpoint(name, files)
        return hashlib.sha256(files[WEIGHTS]).hexdigest()
