"""The training loop: one for every task, resumable at any step to the same bytes.

What a step does depends on (seed, step) alone: the order of the data, the dropout, the schedule. So
a state needs no random generator in it, and a run that was killed continues as if it had not been.
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
FLOOR = 0.05  # of the peak learning rate, reached at the end


def learning_rate(
    peak: float, warmup: int, step: int, done: float, schedule: str = "cosine"
) -> float:
    """Linear from 0 over `warmup` steps, then a schedule: a cosine to FLOOR * peak at the end
    (Loshchilov 2017), the inverse square root of the step (Vaswani 2017, 5.3), or constant."""
    warmup = max(warmup, 1)
    rise = min(1.0, (step + 1) / warmup)
    if schedule == "cosine":
        fall = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done))
        return peak * min(rise, fall)
    if schedule == "inverse-sqrt":
        return peak * min(rise, math.sqrt(warmup / (step + 1)))
    return peak * rise


class Task(Protocol):
    """What is learned: data in batches, a loss, and a score on held-out data."""

    @property
    def score_name(self) -> str:
        """Of the figure in `evaluate` that decides."""

    @property
    def loss_name(self) -> str:
        """Of the figure in `evaluate` that is what `loss` is, of held-out data."""

    @property
    def loss_floor(self) -> float:
        """What no `loss` can be below, in nats."""

    @property
    def higher_is_better(self) -> bool:
        """Whether it is a score to raise, as BLEU is, or one to lower, as an error rate."""

    @property
    def in_percent(self) -> Collection[str]:
        """Those of the figures in `evaluate` that are rates, from 0 to 100."""

    def batches(self, epoch: int) -> Sequence[Any]:
        """All batches of an epoch, in order; the same at every call."""

    def loss(self, model: Model, batch: Any, share: Share = ...) -> tuple[Tensor, int]:
        """What the rows of `share` add to the batch's mean loss per token, in nats, and how many
        tokens they have."""

    def evaluate(self, model: Model) -> dict[str, float]:
        """Figures on held-out data, `score_name` among them; the model is in eval mode."""

    def files(self, model: Model) -> dict[str, bytes]:
        """Of a checkpoint, by name, as checkpoint.files has them."""

    def facts(self) -> dict[str, Any]:
        """What a resumed run must share: the model, the data, the tokenizer."""


class Watcher(Protocol):
    """Is told about progress; a progress bar is one."""

    def advance(self, n: int = 1) -> None:
        """So many more steps are done."""

    def update(self, text: str = "", **fields: Any) -> None:
        """What to show: a text, and figures by name."""


@dataclass
class Position:
    """Where a run stands; all of it is saved."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # of the epoch
    tokens: int = 0
    seconds: float = 0.0
    best_score: float | None = None  # None before the first evaluation
    best_step: int = 0
    best_sha256: str = ""
    stale: int = 0  # evaluations since the best


class Loss(nn.Module):
    """The loss of a team's share as a module: gradients are averaged where a module's forward is
    wrapped, and an encoder-decoder's work is not all in its own."""

    def __init__(self, model: Model, task: Task, share: Share) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.share = share

    def forward(self, batch: Any) -> tuple[Tensor, int]:
        """As Task.loss, of the team's share."""
        return self.task.loss(self.model, batch, self.share)


class Trainer:
    """Trains `model` on `task` within a run folder, which the team's leader alone has."""

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
        """Train to the end. Raises CheckFailed on a loss, gradient or score that is not finite."""
        self.team.lead(lambda: self.folder.agree(self._facts()))
        self._restore()
        # torchrun passes on a Ctrl-C that its processes have had already.
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
        # The groups are the configuration, which has been compared.
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
        """A state that this run can have written at `step`. Raises Strange."""
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
        """Train to the end of the epoch or of all; the signal that stops the team before, or 0."""
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
        (loss * self.team.share.world_size).backward()  # the team takes the mean of the gradients
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
        """Return `value`, or raise CheckFailed before it gets into the weights or a state."""
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
        """Score the weights, and their average with those of the evaluations before; save."""
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
        """The model with the mean of its weights at the last evaluations, this one included; it
        ends less far to one side than any of them (Vaswani 2017, 6.1). None if it is only one."""
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
        """Write it; the SHA-256 of its weights."""
        files = self.task.files(model)
        self.folder.save_checkpoint(name, files)
        return hashlib.sha256(files[WEIGHTS]).hexdigest()
