"""Many runs that die and are resumed, played by one process that imports torch once.

`python crash_lab.py PLAN` plays the trials of a JSON file, each forked from a process that has
computed nothing yet, and prints what came of each.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import deaths
from cli_probe import HANGS
from deaths import Aim
from kvtool.core.training import runs
from training_cases import STEPS, TRAINERS, model, train, unreadable


def child(work: Callable[[], object]) -> int:
    """Fork, work, and return the exit code."""
    pid = os.fork()
    if not pid:
        signal.alarm(HANGS)  # which no trial expects
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def newest_state(out: Path) -> int:
    """The step of the newest state in the folder of a run; 0 before the first."""
    found = (runs.STATE.fullmatch(path.name) for path in out.iterdir()) if out.exists() else ()
    return max((int(match[1]) for match in found if match), default=0)


def resumed(said: str) -> list[int]:
    """The steps at which runs were resumed, by what they said."""
    return [int(step.replace(",", "")) for step in re.findall(r"resumed at step ([\d,]+)", said)]


def play(aim: Aim, again: bool, out: Path, trainer: str) -> dict[str, Any]:
    """Train until death, with `again` as often as it comes; look at what is left; train on."""
    marks, said = Path(f"{out}.died"), Path(f"{out}.said")
    said.touch()

    def say(line: str) -> None:
        with open(said, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def train_on() -> None:
        is_there = (out / runs.RUN).exists()
        train(out, kind=TRAINERS[trainer], say=say, resume=is_there)

    def work() -> None:
        deaths.arm(aim, marks)
        train_on()

    broken: list[str] = []
    codes: list[int] = []
    states: list[int] = []
    while not codes or (again and codes[-1] and len(codes) < STEPS):
        codes.append(child(work))
        broken += unreadable(out)
        states.append(newest_state(out))
    ended = child(train_on)
    return {
        "codes": codes,
        "died": deaths.marked(marks),
        "states": states,
        "resumed": resumed(said.read_text(encoding="utf-8")),
        "unreadable": broken,
        "ended": ended,
    }


def count_calls(folder: Path) -> dict[int, int]:
    """How many calls a run makes from its beginning, and how many once its first state is saved."""
    path = folder / "calls"
    counts = {0: 0, 1: 0}

    def work() -> None:
        def count(_: object) -> None:
            counts[0] += 1

        def first_is_saved() -> None:
            counts[1] = -counts[0]

        deaths.when_saved(1, first_is_saved)
        deaths.each_call(count)
        train(folder / "counted")
        sys.setprofile(None)
        path.write_text(f"{counts[0]} {counts[0] + counts[1]}")

    assert child(work) == 0
    return dict(enumerate(map(int, path.read_text().split())))


def main(plan: str) -> None:
    """Play all trials. The `n` of a death by "call" is a part of the calls that could be meant."""
    torch.set_num_threads(1)
    torch.optim.AdamW(model().parameters())  # imports much, and computes nothing yet
    calls = count_calls(Path(plan).parent)
    results = []
    for trial in json.loads(Path(plan).read_text()):
        death, n, after = trial["death"], trial["n"], trial["after"]
        aim = Aim(death, int(n * calls[after]) if death == "call" else n, after)
        results.append(play(aim, trial["again"], Path(trial["out"]), trial["trainer"]))
        results[-1]["aim"] = str(aim)
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
