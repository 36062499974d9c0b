"""Errors, exit codes and signals, as a user meets them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable

import pytest

import kvtool
from cli_probe import HANGS, Ran, refused
from kvtool import app, ending
from kvtool.errors import UsageError
from kvtool.registry import choose
from kvtool.ui import problems


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lenghts 3", "--lenghts: no such option of kvtool probe. Did you mean --lengths?"),
        ("-x", "-x: no such option of kvtool probe. See kvtool probe --help."),
        ("--seed ten", "--seed: 'ten' is not a whole number. See kvtool probe --help."),
        ("--rate fast", "--rate: 'fast' is not a number. See kvtool probe --help."),
        ("--seed", "--seed: needs a value. See kvtool probe --help."),
        ("--json=1", "--json: takes no value. See kvtool probe --help."),
        ("stray", "stray: unexpected. kvtool probe takes options only. See kvtool probe --help."),
        ("--seed -1", "--seed: -1 is too small (expected 0 or more)"),
        (
            "--device gpu",
            "--device: 'gpu' is not known (expected one of auto, cpu, cuda). Did you mean cpu?",
        ),
        ("--plot a.jpg", "--plot a.jpg: .jpg is not a plot format. Use .png, .svg or .pdf."),
        ("-q -v", "--quiet: contradicts --verbose. Give one of them."),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    kv: Callable[..., Ran], words: str, message: str
) -> None:
    assert refused(kv(*words.split())) == message


@pytest.mark.parametrize(
    ("flag", "expected"),
    [("--model", "PATH|NAME"), ("--output", "FILE"), ("--prompt", "TEXT")],
)
def test_an_option_that_is_given_but_empty_is_refused(
    kv: Callable[..., Ran], flag: str, expected: str
) -> None:
    assert refused(kv(flag, "")) == f"{flag}: is empty (expected {expected})"


def test_an_unknown_name_is_answered_with_all_names_once_or_of_many_the_nearest() -> None:
    def said(n: int) -> str:
        with pytest.raises(UsageError) as caught:
            choose("nil", [f"name{i}" for i in range(n)], "--kind")
        return str(caught.value)

    assert said(2) == "--kind: 'nil' is not known (expected one of name0, name1)"
    found = re.search(r"\(expected one of (.*) and 95 more\)$", said(100))
    assert found and len(found[1].split(", ")) == 5


def test_an_unknown_command_gets_the_nearest_name(kv: Callable[..., Ran]) -> None:
    assert refused(kv(command="prob")).endswith("Did you mean probe?")


def test_a_prompt_that_is_not_utf8_is_refused_with_the_place_of_the_byte(
    kv: Callable[..., Ran],
) -> None:
    argument = os.fsdecode(b"ab\xff")
    assert "byte 0xff at offset 2" in refused(kv("--prompt", argument))


@pytest.mark.parametrize(
    ("work", "code", "line"),
    [
        ("missing", 2, "kvtool: error: weights/none: not found. Did you mean weights/one?"),
        ("nan", 1, "kvtool: error: logits: NaN at step 3"),
        ("lines", 2, "kvtool: error: a b\\x1b[31m: is odd"),
        ("ctrl-c", 130, "kvtool: interrupted"),
        ("sigterm", 143, "kvtool: terminated"),
        ("sigterm lost, then a defect", 143, "kvtool: terminated"),
        ("sigterm lost, then an error", 143, "kvtool: terminated"),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(
    kv: Callable[..., Ran], work: str, code: int, line: str
) -> None:
    ending.listen()
    ran = kv("-q", "--work", work)
    assert (ran.code, ran.out, ran.err) == (code, "", f"{line}\n")


def test_a_signal_that_got_lost_is_told_at_the_end_at_the_latest(kv: Callable[..., Ran]) -> None:
    ending.listen()
    ran = kv("--work", "sigterm lost")
    assert ran.code == 143 and ran.err.endswith("\nkvtool: terminated\n")


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ("memory", "memory: there is not enough for this. Use"),
        ("torch memory", "memory: there is not enough for this (8.00 GiB more were asked for)"),
        ("cpu memory", "memory: there is not enough for this (32.0 GiB more were asked for)"),
        ("disk full", "best.safetensors: no space left on the device."),
        ("quota", "output: no space left in the quota."),
    ],
)
def test_a_machine_that_is_too_small_is_one_line_not_a_traceback(
    kv: Callable[..., Ran], work: str, message: str
) -> None:
    assert refused(kv("-q", "--work", work)).startswith(message)


@pytest.mark.parametrize(
    ("work", "name"), [("defect", "ZeroDivisionError"), ("runtime", "Runtime")]
)
def test_a_defect_keeps_its_traceback_and_is_not_exit_1(
    kv: Callable[..., Ran], work: str, name: str
) -> None:
    ran = kv("--work", work)
    assert ran.code == 2
    assert "Traceback" in ran.err and name in ran.err


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ("panic", "a library failed on this input: index \\x1b[31m out of range"),
        ("recursion", "the input is nested more deeply than Python's stack"),
    ],
)
def test_what_a_library_makes_of_an_input_is_one_line_and_never_exit_1(
    kv: Callable[..., Ran], work: str, message: str
) -> None:
    assert refused(kv("-q", "--work", work)) == f"{message}. --debug shows where."
    ran = kv("-q", "--work", work, "--debug")
    assert ran.code == 2 and "Traceback" in ran.err


def test_debug_shows_where_an_error_comes_from(kv: Callable[..., Ran]) -> None:
    ran = kv("--work", "missing", "--debug")
    assert ran.code == 2
    assert "Traceback" in ran.err
    assert ran.err.splitlines()[-1].startswith("kvtool: error: weights/none")


def test_the_exit_code_of_a_report_is_the_exit_code(kv: Callable[..., Ran]) -> None:
    assert kv("--wrong").code == 1
    assert kv("--work", "exit 1").code == 1
    assert kv().code == 0


def test_an_error_is_coloured_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems.error_line("a", "B.", colour=True) == (
        "\x1b[31mkvtool: error: a\x1b[0m. \x1b[2mB.\x1b[0m"
    )
    terminal = types.SimpleNamespace(isatty=lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert problems.wants_colour(terminal)  # type: ignore[arg-type]
    assert not problems.wants_colour(types.SimpleNamespace(isatty=lambda: False))  # type: ignore[arg-type]
    monkeypatch.setenv("NO_COLOR", "1")
    assert not problems.wants_colour(terminal)  # type: ignore[arg-type]


# The process itself


PROBE_PROCESS = """
import sys, time
from kvtool import registry
sys.modules["kvtool_probe"] = module = type(sys)("kvtool_probe")
def command() -> None:
    "Print without end."
    while True:
        print("line", flush=True)
        time.sleep(0.001)
module.command = command
registry.COMMANDS["probe"] = "kvtool_probe:command"
from kvtool.app import main
main(["probe"])
"""


def start_probe() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROBE_PROCESS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_closed_pipe_ends_the_process_quietly() -> None:
    process = start_probe()
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=HANGS) == app.CLOSED_PIPE
    process.stderr.close()


def test_a_stdout_that_was_closed_before_is_an_error_and_no_silence(
    kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python leaves it for `kvtool --version >&-`
    app._prepare_streams()
    assert app.run(["--version"]) == 2 and app.run(["verify-cache", "--scenarios", "help"]) == 2


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_ends_the_process_with_one_line(number: int, code: int, word: str) -> None:
    process = start_probe()
    assert process.stdout is not None
    assert process.stdout.readline() == "line\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=HANGS)
    assert (process.returncode, errors) == (code, f"kvtool: {word}\n")


def test_python_dash_m_kvtool_is_the_same_program() -> None:
    command = [sys.executable, "-m", "kvtool", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert (done.returncode, done.stdout) == (0, f"kvtool {kvtool.__version__}\n")
