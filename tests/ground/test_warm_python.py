"""A process that is forked from one that has loaded torch is to a test what a new one is."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cli_probe import HANGS

TELL = "import os, sys; print(sys.argv[1:], sys.stdin.read(), os.getcwd(), os.environ['A'])"
WAIT = "import os, time; print(os.getpid(), flush=True); time.sleep(900)"


def test_it_has_its_own_words_streams_folder_and_environment(
    warm_python: Callable[..., str], tmp_path: Path
) -> None:
    given = {"input": "in", "cwd": tmp_path, "env": {**os.environ, "A": "set"}, "text": True}
    ran = subprocess.run([warm_python(), "-c", TELL, "b"], capture_output=True, **given)
    assert (ran.stdout, ran.stderr) == (f"['b'] in {tmp_path} set\n", "")
    (tmp_path / "fails.py").write_text("raise ValueError('here')")
    ran = subprocess.run([warm_python(), "fails.py"], capture_output=True, **given)
    assert ran.returncode == 1 and ran.stderr.endswith("ValueError: here\n")


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        ("import sys; sys.exit(7)", 7),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("raise KeyboardInterrupt", -2),
        ("raise SystemExit('no')", 1),
        ("import sys; sys.stdout = open('/dev/full', 'w'); print('lost')", 120),
        ("import torch", 0),
    ],
)
def test_it_ends_as_its_work_does(warm_python: Callable[..., str], code: str, ends: int) -> None:
    ran = subprocess.run([warm_python(), "-c", code], capture_output=True, timeout=HANGS)
    assert ran.returncode == ends


def test_a_signal_reaches_it_and_it_does_not_outlive_who_started_it(
    warm_python: Callable[..., str],
) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        given = {"stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([warm_python(), "-c", WAIT], **given) as process:
            assert process.stdout is not None
            child = int(process.stdout.readline())
            process.send_signal(number)
            assert process.wait(HANGS) == -number
        while Path(f"/proc/{child}").exists():
            time.sleep(0.01)
