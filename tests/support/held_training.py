"""`python held_training.py STEP FILE train-seq2seq ...` is `kvtool train-seq2seq ...`, and waits
after a step until a signal has come; that it waits is told by FILE, which it makes.

So a signal from outside comes in that step, on a machine of any speed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvtool.app import main
from kvtool.core.training.train import Trainer

at, told, *words = sys.argv[1:]
EPOCH, REPORT = Trainer._epoch, Trainer._report


def epoch(self: Any, wanted: Callable[[], int]) -> int:
    self.wanted = wanted
    return EPOCH(self, wanted)


def report(self: Any, *args: Any) -> None:
    REPORT(self, *args)
    if self.at.step == int(at) and self.team.leads:  # the others wait for it
        Path(told).touch()
        while not self.wanted():
            time.sleep(0.01)


Trainer._epoch, Trainer._report = epoch, report  # type: ignore[method-assign]
main(words)
