"""A training run that takes a tenth of a second, and what it leaves behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kvtool import reading
from kvtool.config import ModelConfig, TrainConfig, TrainLength
from kvtool.core.checkpoint import checkpoint
from kvtool.core.models import Model, build_model
from kvtool.core.models.layers import Dropout
from kvtool.core.native import context
from kvtool.core.text.tokenizer import Tokenizer
from kvtool.core.training import runs
from kvtool.core.training.lm import LanguageModelling
from kvtool.core.training.runs import RunFolder
from kvtool.core.training.team import Share
from kvtool.core.training.train import Position, Trainer
from kvtool.errors import KvtoolError
from kvtool.ui.progress import Progress

TEXT = "ab ba abba " * 40
COMPILER = ("torch._dynamo",)  # which PyTorch loads for any optimizer
STEPS, EVAL_EVERY = 12, 4
WEIGHTS = "model.safetensors"


class Hook(Progress):
    """Calls `act` once, when `step` steps of this process are done."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.left, self.act = step, act

    def update(self, text: str = "", **fields: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.act()


class Forgetful(Trainer):
    """A planted bug: the optimizer's moments do not survive a stop."""

    def _restore(self) -> None:
        super()._restore()
        self.optimizer.state.clear()


class Unseeded(Trainer):
    """A planted bug: random numbers go on from wherever the generator is."""

    def _step(self, batch: Any) -> None:
        with patch("torch.manual_seed"):
            super()._step(batch)


TRAINERS: dict[str, type[Trainer]] = {
    kind.__name__: kind for kind in (Trainer, Forgetful, Unseeded)
}


def task(data: str = TEXT, seed: int = 0) -> LanguageModelling:
    tokenizer = Tokenizer.train("char", [TEXT])
    return LanguageModelling(data, tokenizer, 16, 48, seed, torch.device("cpu"))


def model(seed: int = 0, **changes: Any) -> Model:
    """A model with dropout, so that random numbers matter."""
    sizes: dict[str, Any] = {"n_layers": 1, "d_model": 16, "n_heads": 2, "context": 16}
    torch.manual_seed(seed)
    return build_model(
        ModelConfig(task().tokenizer.vocab_size, **{**sizes, "dropout": 0.1, **changes})
    )


def config(out: Path, **changes: Any) -> TrainConfig:
    given = {name: changes.pop(name) for name in ("steps", "epochs", "minutes") if name in changes}
    length = TrainLength(**(given or {"steps": STEPS}))
    settings = {"lr": 0.01, "warmup": 4, "eval_every": EVAL_EVERY, **changes}
    return TrainConfig(out, length, **settings)


def trainer(
    folder: RunFolder,
    out: Path,
    kind: type[Trainer] = Trainer,
    watcher: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
    learn: Any = None,
    **changes: Any,
) -> Trainer:
    settings = config(out, **changes)
    learn = learn or task(seed=settings.seed)
    return kind(model(settings.seed), learn, settings, folder, watcher or Progress(), say)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Several would only get into each other's way."""
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(kept)


def train(out: Path, warn: Callable[[str], None] = lambda _: None, **changes: Any) -> Position:
    """Train in `out`; `changes` are for the trainer and its TrainConfig."""
    with one_thread(), RunFolder(out, changes.get("resume", False), warn) as folder:
        return trainer(folder, out, **changes).run()


def outcome(out: Path) -> dict[str, Any]:
    """What must not depend on whether a run was stopped: all but the seconds."""
    weights = {name: reading.sha256(out / name / WEIGHTS) for name in ("best", "last")}
    log = [json.loads(line) for line in (out / runs.LOG).read_text().splitlines()]
    for line in log:
        del line["seconds"]
    newest = max(path for path in out.iterdir() if runs.STATE.fullmatch(path.name))
    state = torch.load(newest, weights_only=True)
    del state["position"]["seconds"]
    digest = hashlib.sha256()
    for _, moments in sorted(state.pop("optimizer")["state"].items()):
        for tensor in moments.values():
            digest.update(tensor.numpy().tobytes())
    for weights_then in state.pop("recent"):
        for _, tensor in sorted(weights_then.items()):
            digest.update(tensor.numpy().tobytes())
    del state["model"]  # the same as last/
    return {**weights, "log": log, "optimizer": digest.hexdigest(), **state}


def unreadable(out: Path) -> list[str]:
    """Which of the checkpoints and states that a run has written so far cannot be loaded."""
    found = []
    for path in out.iterdir() if out.exists() else ():
        match = runs.STATE.fullmatch(path.name)
        if match and not reading.sha256(path).startswith(match[2]):
            found.append(f"{path.name}: is not what was written")
    for folder in (out / "best", out / "last"):
        if (folder / WEIGHTS).exists():
            try:
                checkpoint.load(str(folder), torch.device("cpu"), torch.float32)
            except KvtoolError as error:
                found.append(str(error))
    return found


class Scores:
    """A task whose held-out scores are given."""

    def __init__(self, *scores: float, higher: bool = False) -> None:
        self.inner, self.scores = task(), iter(scores)
        self.higher_is_better = higher

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def evaluate(self, model: Any) -> dict[str, float]:
        return {"bits_per_char": next(self.scores)}


def stop_and_resume(out: Path, step: int, number: int = signal.SIGINT, **changes: Any) -> None:
    """Train, send a signal to ourselves in a step, and train to the end."""
    try:
        train(out, watcher=Hook(step, lambda: os.kill(os.getpid(), number)), **changes)
    except KeyboardInterrupt:
        train(out, resume=True, **changes)
    else:
        raise AssertionError(f"the signal in step {step} did not stop it")


def check_that_shares_drop_as_the_whole(x: Tensor) -> None:
    """Of a batch x (B,T,d): each of three processes drops in its rows what one would."""
    drop = Dropout(0.4).train()
    torch.manual_seed(1)
    whole = drop(x)
    for share in (Share(0, 3), Share(1, 3), Share(2, 3)):
        rows = share.rows(len(x))
        torch.manual_seed(1)
        with context.within(first_row=rows.start):
            assert drop(x[rows]).equal(whole[rows])
