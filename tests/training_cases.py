"""A training run that takes a tenth of a second, what it leaves behind, and how to kill one.

`python training_cases.py PLAN` plays the trials of a JSON file: torch is imported once, and each
trial is forked from a process that has computed nothing yet.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kvtool import files
from kvtool.config import ModelConfig, TrainConfig, TrainLength
from kvtool.core import checkpoint, runs, text
from kvtool.core.layers import Dropout, deal_rows
from kvtool.core.lm import LanguageModelling
from kvtool.core.models import Model, build_model
from kvtool.core.runs import RunFolder
from kvtool.core.team import Share
from kvtool.core.text import Tokenizer
from kvtool.core.train import Position, Trainer
from kvtool.errors import KvtoolError
from kvtool.ui.progress import Progress

TEXT = "ab ba abba " * 40
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
    for weights_then in state.pop("recent"):
        for _, tensor in sorted(weights_then.items()):
            digest.update(tensor.numpy().tobytes())
    del state["model"]  # the same as last/
    return {**weights, "log": log, "optimizer": digest.hexdigest(), **state}


# --- ways to die


def kill_now(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_halfway(handle: int) -> None:
    """A torn write: half of what was written reaches the disk."""
    os.ftruncate(handle, os.fstat(handle).st_size // 2)
    kill_now()


def find_disk_full(handle: int) -> None:
    os.ftruncate(handle, os.fstat(handle).st_size // 2)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def plain_write(path: Path, data: bytes) -> None:
    """The mistake that write_durable is there to prevent: a file is emptied, then written."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def nth(n: int, act: Callable[..., object], original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, but its n-th call (from 1) is `act`."""
    calls = itertools.count(1)

    def call(*args: Any) -> Any:
        return (act if next(calls) == n else original)(*args)

    return call


def arm(death: str, n: int) -> None:
    """Have this process die at its n-th write, torn, or at its n-th rename, or run out of disk."""
    nth_file = 2 * n - 1  # a file is synced, its folder, the next file, ...
    if death in ("torn write", "torn writes"):
        os.fsync = nth(nth_file, die_halfway, os.fsync)
    elif death == "full disk":
        os.fsync = nth(nth_file, find_disk_full, os.fsync)
    elif death == "rename":
        os.replace = nth(n, kill_now, os.replace)
    elif death == "plain write":
        os.fsync = nth(n, die_halfway, os.fsync)
        for module in (files, runs, checkpoint, text):
            module.write_durable = plain_write  # type: ignore[attr-defined]


def child(work: Callable[[], object], patience: float = 60.0) -> int:
    """Fork, work, and return the exit code; after `patience` seconds the child is killed."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    end = time.monotonic() + patience
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.0005)
    return os.waitstatus_to_exitcode(ended[1])


def unreadable(out: Path) -> list[str]:
    """Which of the checkpoints and states that a run has written so far cannot be loaded."""
    found = []
    for path in out.iterdir() if out.exists() else ():
        match = runs.STATE.fullmatch(path.name)
        if match and not files.sha256(path).startswith(match[2]):
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


def play(death: str, n: float, out: Path, trainer: str) -> dict[str, Any]:
    """Train until death, with "torn writes" again and again; look at what is left; train on."""

    def work() -> None:
        arm(death, int(n))
        watcher = Hook(int(n), kill_now) if death == "step" else None
        train_on(watcher)

    def train_on(watcher: Progress | None = None) -> None:
        train(out, kind=TRAINERS[trainer], watcher=watcher, resume=(out / runs.RUN).exists())

    broken: list[str] = []
    codes: list[int] = []
    while True:
        codes.append(child(work, n if death == "seconds" else 60.0))
        broken += unreadable(out)
        if death == "seconds" and codes == [0]:  # it was over before its time
            shutil.rmtree(out)
            codes, n = [], 0.8 * n
        elif death != "torn writes" or not codes[-1] or len(codes) == STEPS:
            break
    return {"codes": codes, "unreadable": broken, "ended": child(train_on)}


def main(plan: str) -> None:
    """Play all trials; the `n` of death by "seconds" is a part of what a whole run takes."""
    torch.set_num_threads(1)
    torch.optim.AdamW(model().parameters())  # imports much, and computes nothing yet
    started = time.monotonic()
    child(lambda: train(Path(plan).parent / "timed"))
    whole = time.monotonic() - started
    results = []
    for trial in json.loads(Path(plan).read_text()):
        n = trial["n"] * whole if trial["death"] == "seconds" else trial["n"]
        results.append(play(trial["death"], n, Path(trial["out"]), trial["trainer"]))
    print(json.dumps(results))


def check_that_shares_drop_as_the_whole(x: Tensor) -> None:
    """Of a batch x (B,T,d): each of three processes drops in its rows what one would."""
    drop = Dropout(0.4).train()
    torch.manual_seed(1)
    whole = drop(x)
    for share in (Share(0, 3), Share(1, 3), Share(2, 3)):
        rows = share.rows(len(x))
        deal_rows(drop, rows)
        torch.manual_seed(1)
        assert drop(x[rows]).equal(whole[rows])


if __name__ == "__main__":
    main(sys.argv[1])
