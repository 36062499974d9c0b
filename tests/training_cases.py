"""A training run that takes a tenth of a second, what it leaves behind, and how to kill one.

`python training_cases.py PLAN` plays the trials of a JSON file: torch is imported once, and each
trial is forked from a process that has computed nothing yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvtool import files
from kvtool.config import ModelConfig, TrainConfig, TrainLength
from kvtool.core import checkpoint, runs, text
from kvtool.core.lm import LanguageModelling
from kvtool.core.models import Model, build_model
from kvtool.core.runs import RunFolder
from kvtool.core.text import Tokenizer
from kvtool.core.train import Position, Trainer
from kvtool.ui.progress import Progress

TEXT = "ab ba abba " * 40
STEPS, EVAL_EVERY = 12, 4
WEIGHTS = "model.safetensors"
KILLED = 137  # as a shell reports SIGKILL


class Hook(Progress):
    """Calls `act` once, when `step` steps of this process are done."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.left, self.act = step, act

    def update(self, text: str = "", **fields: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.act()


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


def train(out: Path, warn: Callable[[str], None] = lambda _: None, **changes: Any) -> Position:
    """Train in `out`; `changes` are for the trainer and its TrainConfig."""
    with RunFolder(out, changes.get("resume", False), warn) as folder:
        return trainer(folder, out, **changes).run()


def outcome(out: Path) -> dict[str, Any]:
    """What must not depend on whether a run was stopped: all but the seconds."""
    weights = {name: files.sha256(out / name / WEIGHTS) for name in ("best", "last")}
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
    del state["model"]  # the same as last/
    return {**weights, "log": log, "optimizer": digest.hexdigest(), **state}


# --- ways to die


def kill_now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def nth(n: int, act: Callable[..., object], original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, but its n-th call (from 1) is `act`."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return (act if calls == n else original)(*args, **kwargs)

    return call


def die(*_: object, **__: object) -> None:
    kill_now()


def die_halfway(handle: int) -> None:
    """A torn write: half of what was written reaches the disk."""
    os.ftruncate(handle, os.fstat(handle).st_size // 2)
    kill_now()


def plain_write(path: Path, data: bytes) -> None:
    """The mistake that write_durable is there to prevent: a file is emptied, then written."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_in_place() -> None:
    """Have every module write its files that way."""
    for module in (files, runs, checkpoint, text):
        module.write_durable = plain_write  # type: ignore[attr-defined]


def arm(death: str, n: int) -> None:
    """Make this process die at its n-th step, torn write, rename; or have its n-th write fail."""
    if death == "torn write":
        os.fsync = nth(2 * n - 1, die_halfway, os.fsync)  # a file, its folder, a file, ...
    elif death == "rename":
        os.replace = nth(n, die, os.replace)
    elif death == "plain write":
        write_in_place()
        os.fsync = nth(n, die_halfway, os.fsync)


def child(work: Callable[[], object], patience: float = 60.0) -> int:
    """Fork, work, and return the exit code; after `patience` seconds the child is killed."""
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            code = 1
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
        os._exit(code)
    end = time.monotonic() + patience
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.0005)
    return os.waitstatus_to_exitcode(ended[1])


def unreadable(out: Path) -> list[str]:
    """Which of the checkpoints that a run has written so far cannot be loaded."""
    found = []
    for name in ("best", "last"):
        if (out / name / WEIGHTS).exists():
            try:
                checkpoint.load(str(out / name), torch.device("cpu"), torch.float32)
            except files.FileError as error:
                found.append(str(error))
    return found


def play(trial: dict[str, Any]) -> dict[str, Any]:
    """Train until death, look at what is left, and train to the end."""
    out = Path(trial["out"])
    death, n = trial["death"], trial["n"]

    def work() -> None:
        arm(death, n)
        train(out, watcher=Hook(n, kill_now) if death == "step" else None)

    first = child(work, n if death == "seconds" else 60.0)
    broken = unreadable(out)
    second = child(lambda: train(out, resume=(out / runs.RUN).exists()))
    return {"first": first, "unreadable": broken, "second": second}


def main(plan: str) -> None:
    torch.set_num_threads(1)
    print(json.dumps([play(trial) for trial in json.loads(Path(plan).read_text())]))


if __name__ == "__main__":
    main(sys.argv[1])
