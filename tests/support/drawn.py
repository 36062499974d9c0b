"""`python drawn.py FILE` draws a picture; a test draws the same in its own process."""

from __future__ import annotations

import sys
from pathlib import Path

from kvtool.ui.plots import loss_plot


def draw(path: Path) -> bytes:
    loss_plot(path, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}], "per", title="a_b $c$")
    return path.read_bytes()


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
