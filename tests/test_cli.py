"""The command line as a user meets it, through a small command that exists only here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

import kvtool
from kvtool import app, registry
from kvtool.config import RunConfig
from kvtool.errors import CheckFailed, FileError
from kvtool.ui import documents, lists, options, output, problems, progress, tables
from kvtool.ui.options import Caches, Debug, Json, Lengths, OutputFile, Quiet, Verbose

LENGTHS = [10, 50]
MISSING = FileError("weights/none: not found", "Did you mean weights/one?")
WORK: dict[str, Callable[[], None]] = {
    "fine": lambda: None,
    "missing": lambda: fail(MISSING),
    "nan": lambda: fail(CheckFailed("logits: NaN at step 3")),
    "lines": lambda: fail(FileError("a\nb\x1b[31m: is\n  odd")),
    "memory": lambda: fail(MemoryError()),
    "torch memory": lambda: fail(RuntimeError("CUDA out of memory. Tried 8 GiB\nmore")),
    "defect": lambda: fail(ZeroDivisionError("a defect")),
    "runtime": lambda: fail(RuntimeError("shapes differ")),
    "ctrl-c": lambda: fail(KeyboardInterrupt()),
    "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "disk full": lambda: fail(OSError(28, "No space left on device", "best.safetensors")),
    "exit 1": lambda: fail(typer.Exit(1)),
}


def fail(error: BaseException) -> None:
    raise error


@dataclass
class Report:
    lengths: list[int]
    caches: list[str]
    gap: float = float("nan")
    exit_code: int = 0

    def rows(self) -> list[dict[str, Any]]:
        return [{"length": n, "gap": self.gap, "even": n % 2 == 0} for n in self.lengths]


def probe(
    lengths: Lengths = LENGTHS,
    caches: Caches = options.ALL_CACHES,
    cache: options.Cache = "static",
    plot: options.Plot = None,
    prompt: options.Prompt = None,
    work: Annotated[str, typer.Option("--work", metavar="NAME", help="What to do.")] = "fine",
    rate: Annotated[float, typer.Option("--rate", metavar="X", help="A number.")] = 0.5,
    wrong: Annotated[bool, typer.Option("--wrong", help="Answer no.")] = False,
    model: options.Model = "",
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    threads: options.Threads = 0,
    seed: options.Seed = 0,
    as_json: Json = False,
    output_file: OutputFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Probe the command line.

    More words about it.

      kvtool probe --lengths 10 50
    """
    out = output.Output(as_json, output_file, quiet, verbose)
    settings = RunConfig(model, device, dtype, threads, seed)

    def work_through(_: RunConfig, out: output.Output) -> Report:
        out.note("working")
        out.detail("in detail")
        WORK[work]()
        return Report(lengths, caches, exit_code=1 if wrong else 0)

    output.present("probe", settings, work_through, show, out)


def show(report: Report, out: output.Output) -> None:
    out.table("lengths", [tables.Column("length")], [[str(n)] for n in report.lengths])
    out.text(f"caches: {' '.join(report.caches)}")
    out.verdict(report.exit_code == 0, "all of them [really]")
    out.hint("try more")


@pytest.fixture(autouse=True)
def probe_command(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Offer `kvtool probe`, and undo what `run` does to signals."""
    module = types.ModuleType("kvtool_probe")
    module.command = probe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvtool_probe", module)
    monkeypatch.setitem(registry.COMMANDS, "probe", "kvtool_probe:command")
    monkeypatch.setenv("COLUMNS", "80")
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@dataclass
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def kv(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `kvtool probe` with some arguments, given as one text or several."""

    def call(*args: str, command: str = "probe") -> Ran:
        code = app.run(([command] if command else []) + list(args))
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call


def refused(ran: Ran) -> str:
    """The message of a run that was refused as it should be: exit 2 and one line on stderr."""
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("kvtool: error: ")
    assert ran.err.count("\n") == 1
    return ran.err.removeprefix("kvtool: error: ").rstrip("\n")


def lengths_of(ran: Ran) -> list[int]:
    assert ran.code == 0, ran.err
    return json.loads(ran.out)["lengths"]


# Lists


@pytest.mark.parametrize(
    "words",
    [
        "--lengths 10 50 100",
        "--lengths 10,50,100",
        "--lengths 10 --lengths 50 --lengths 100",
        "--lengths=10 50,100",
        "--lengths 10, 50, 100",
        "--lengths 10 50 --rate 2 --lengths 100",
        "--seed 3 --lengths 10 50 100 -q",
    ],
)
def test_every_habit_of_writing_a_list_means_the_same(kv: Callable[..., Ran], words: str) -> None:
    assert lengths_of(kv("--json", *words.split())) == [10, 50, 100]
    assert lengths_of(kv(*words.split(), "--json")) == [10, 50, 100]


def test_a_list_that_is_not_given_keeps_its_default(kv: Callable[..., Ran]) -> None:
    assert lengths_of(kv("--json")) == LENGTHS


def test_names_in_a_list_are_taken_once_and_lengths_as_they_come(kv: Callable[..., Ran]) -> None:
    ran = kv("--json", "--caches", "static", "none", "static", "--lengths", "5", "3", "5")
    assert json.loads(ran.out)["caches"] == ["static", "none"]
    assert lengths_of(ran) == [5, 3, 5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lengths 10 ten", "--lengths: 'ten' is not a whole number"),
        ("--lengths 10,ten,50", "--lengths: 'ten' is not a whole number"),
        ("--lengths 1.5", "--lengths: '1.5' is not a whole number"),
        ("--lengths -5", "--lengths: -5 is not a length: must be 1 or more"),
        ("--lengths 10 -5 50", "--lengths: -5 is not a length: must be 1 or more"),
        ("--lengths=-5", "--lengths: -5 is not a length: must be 1 or more"),
        ("--lengths 0", "--lengths: 0 is not a length: must be 1 or more"),
        ("--lengths", "--lengths: needs at least one value, e.g. --lengths 10 50 100"),
        ("--lengths --json", "--lengths: needs at least one value, e.g. --lengths 10 50 100"),
        ("--lengths=", "--lengths: needs at least one value, e.g. --lengths 10 50 100"),
        ("--lengths 10 --lengths", "--lengths: needs at least one value, e.g. --lengths 10 50 100"),
        ("--lengths ,", "--lengths: needs at least one value, e.g. --lengths 10 50 100"),
        (
            "--caches none statc",
            "--caches: 'statc' is not known (expected one of none, dynamic, static). "
            "Did you mean static?",
        ),
    ],
)
def test_a_bad_element_is_named(
    kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    three = dict.fromkeys(("none", "dynamic", "static"), "")
    monkeypatch.setattr(options, "CACHES", three)
    assert refused(kv(*words.split())) == message


def test_a_number_of_ten_thousand_digits_is_refused_in_a_short_line(kv: Callable[..., Ran]) -> None:
    assert len(refused(kv("--lengths", "9" * 10_000))) < 100


def test_the_value_of_another_option_is_never_taken_for_a_list(kv: Callable[..., Ran]) -> None:
    ran = kv("--model", "--lengths", "--lengths", "7", "--json")
    assert lengths_of(ran) == [7]
    assert json.loads(ran.out)["settings"]["model"] == "--lengths"


@pytest.mark.parametrize(
    ("args", "rewritten", "open_flag"),
    [
        (["--n", "1", "2"], ["--n", "1", "--n", "2"], "--n"),
        (["--n", "1", "-q"], ["--n", "1", "-q"], None),
        (["--n", "-.5", "-"], ["--n", "-.5", "--n", "-"], "--n"),
        (["--one", "--n", "--n", "3"], ["--one", "--n", "--n", "3"], "--n"),
        (["--n"], ["--n", ""], "--n"),
        (["--n", "1", "--", "--n", "2"], ["--n", "1", "--", "--n", "2"], None),
    ],
)
def test_flags_are_repeated_for_every_value(
    args: list[str], rewritten: list[str], open_flag: str | None
) -> None:
    assert lists.repeat_flags(args, {"--n"}, {"--one": 1, "-q": 0}) == (rewritten, open_flag)


def test_lists_also_work_under_typers_own_test_runner() -> None:
    result = CliRunner().invoke(app.app, ["probe", "--lengths", "1", "2", "3", "--json", "-q"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["lengths"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("kvtool probe --caches none st", "static"),
        ("kvtool probe --caches none --caches dyn", "dynamic"),
        ("kvtool probe --cache dyn", "dynamic"),
        ("kvtool probe --caches none --leng", "--lengths"),
        ("kvtool prob", "probe"),
    ],
)
def test_completion_knows_where_a_list_goes_on(
    monkeypatch: pytest.MonkeyPatch, words: str, offered: str
) -> None:
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    environment = {app.COMPLETION: "complete_bash"}
    result = CliRunner().invoke(app.app, [], env=environment, prog_name="kvtool")
    assert result.stdout.split() == [offered]


# Errors and exit codes


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
    ],
)
def test_an_error_is_one_line_with_its_exit_code(
    kv: Callable[..., Ran], work: str, code: int, line: str
) -> None:
    signal.signal(signal.SIGTERM, app._terminate)
    ran = kv("-q", "--work", work)
    assert (ran.code, ran.out, ran.err) == (code, "", f"{line}\n")


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ("memory", "memory: there is not enough for this. Use"),
        ("torch memory", "memory: there is not enough for this (CUDA out of memory. Tried 8 GiB)"),
        ("disk full", "best.safetensors: no space left on the device."),
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


# Help


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
def test_help_lists_every_command_and_exits_0(kv: Callable[..., Ran], args: list[str]) -> None:
    ran = kv(*args, command="")
    assert ran.code == 0
    assert all(f"  {name} " in ran.out for name in registry.COMMANDS)
    assert "Probe the command line." in ran.out


def test_help_survives_a_command_that_cannot_be_imported(
    kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.COMMANDS, "broken", "kvtool.commands.no_such_module:command")
    ran = kv("--help", command="")
    assert ran.code == 0
    assert "Probe the command line." in ran.out
    assert "cannot be loaded" in ran.out
    ran = kv(command="broken")
    assert ran.code == 2
    assert "No module named" in ran.err


@pytest.mark.parametrize("width", [60, 80])
def test_a_help_page_fits_the_terminal(
    kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    ran = kv("-h")
    assert ran.code == 0
    assert max(map(len, ran.out.splitlines())) <= width
    assert "--lengths N..." in ran.out
    assert "[default: 10 50]" in " ".join(ran.out.split())
    assert "\nModel and machine:\n" in ran.out
    assert "  kvtool probe --lengths 10 50\n" in ran.out


def test_version_is_one_line_everywhere(kv: Callable[..., Ran]) -> None:
    assert kv("--version", command="").out == f"kvtool {kvtool.__version__}\n"
    assert kv("--version").out == f"kvtool {kvtool.__version__}\n"


# Output


def test_json_is_one_document_with_settings_and_without_nan(kv: Callable[..., Ran]) -> None:
    ran = kv("--json", "--seed", "7", "--wrong")
    found = json.loads(ran.out, parse_constant=lambda name: pytest.fail(name))
    assert ran.code == found["exit_code"] == 1
    assert found["schema"] == "kvtool.probe/1"
    assert found["settings"]["seed"] == 7
    assert found["settings"]["dtype"] == "float32"
    assert found["gap"] is None
    assert {"torch", "commit", "cores", "threads", "cpu", "python"} <= set(found["environment"])


def test_results_go_to_stdout_and_talk_to_stderr(kv: Callable[..., Ran]) -> None:
    ran = kv()
    assert ran.out.splitlines()[-1] == "✓ all of them [really]"
    assert ran.err == "working\nhint: try more\n"
    assert kv("-q").err == ""
    assert kv("-v").err == "working\nin detail\nhint: try more\n"
    assert kv("-q").out == ran.out


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [
        (".csv", "length,gap,even\n10,,true\n51,,false\n"),
        (
            ".md",
            "# kvtool probe\n\n| length | gap | even |\n| --- | --- | --- |\n"
            "| 10 |  | true |\n| 51 |  | false |\n",
        ),
    ],
)
def test_output_writes_the_rows(
    kv: Callable[..., Ran], tmp_path: Path, suffix: str, expected: str
) -> None:
    target = tmp_path / f"result{suffix}"
    assert kv("--lengths", "10", "51", "--output", str(target)).code == 0
    assert target.read_text(encoding="utf-8") == expected


def test_output_writes_the_same_json_as_stdout(kv: Callable[..., Ran], tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    ran = kv("--json", "--output", str(target))
    assert target.read_text(encoding="utf-8") == ran.out


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("result.xml", "unknown format (found .xml"),
        ("result", "unknown format (found no suffix"),
        ("absent/result.json", "does not exist"),
        ("folder.json", "is a folder"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    kv: Callable[..., Ran], tmp_path: Path, name: str, reason: str
) -> None:
    (tmp_path / "folder.json").mkdir()
    ran = kv("--work", "missing", "--output", str(tmp_path / name))
    assert reason in refused(ran)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.json"]


def test_values_of_arrays_and_tensors_become_plain_json() -> None:
    np = pytest.importorskip("numpy")
    given = {
        "scalar": np.float32(0.5),
        "count": np.int64(3),
        "array": np.array([1.0, np.inf]),
        "path": Path("a") / "b",
        "set": {1},
        2: (None, True, -0.0),
        "huge": float("-inf"),
    }
    assert documents.jsonable(given) == {
        "scalar": 0.5,
        "count": 3,
        "array": [1.0, None],
        "path": "a/b",
        "set": [1],
        "2": [None, True, 0.0],
        "huge": None,
    }


NUMBERS = [tables.Column(name) for name in ("median ms", "speed-up over none", "cache bytes")]


@pytest.mark.parametrize("width", [40, 60, 200])
def test_a_table_never_cuts_a_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    columns = ["cache", *NUMBERS, *NUMBERS]
    cells = ["static", "12345.678", "123.45x", "8,388,608", "87654.321", "543.21x", "9,388,608"]
    output.Output().table("title", columns, [cells, cells])
    printed = capsys.readouterr().out
    assert all(printed.count(cell) >= 2 for cell in cells)
    assert max(map(len, printed.splitlines())) <= width


def test_a_table_too_wide_for_the_screen_goes_on_below_with_its_keys() -> None:
    assert tables.split([6, 8, 8, 8], keys=[0], width=26) == [[0, 1, 2], [0, 3]]
    assert tables.split([6, 8, 8, 8], keys=[0, 1], width=5) == [[0, 1, 2], [0, 1, 3]]


def test_json_mode_keeps_stdout_free_of_words(capsys: pytest.CaptureFixture[str]) -> None:
    out = output.Output(json=True)
    out.table("t", ["a"], [["1"]])
    out.text("text")
    out.verdict(True, "good")
    out.stream("token")
    assert capsys.readouterr().out == ""


def test_there_is_no_progress_bar_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with output.Output().progress("training", total=3) as bar:
        bar.advance()
        bar.update(loss=1.25)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_progress_bar_on_a_narrow_terminal_shows_count_and_loss() -> None:
    from io import StringIO

    from rich.console import Console

    file = StringIO()
    console = Console(file=file, force_terminal=True, width=60, color_system=None)
    with progress.open_progress(console, "training", total=3) as bar:
        bar.advance(2)
        bar.update(loss=1.25)
    assert "training" in file.getvalue()
    assert "2/3" in file.getvalue()
    assert "loss 1.25" in file.getvalue()


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
    assert process.wait(timeout=30) == app.CLOSED_PIPE
    process.stderr.close()


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_ends_the_process_with_one_line(number: int, code: int, word: str) -> None:
    process = start_probe()
    assert process.stdout is not None
    assert process.stdout.readline() == "line\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (code, f"kvtool: {word}\n")


def test_python_dash_m_kvtool_is_the_same_program() -> None:
    command = [sys.executable, "-m", "kvtool", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, f"kvtool {kvtool.__version__}\n")
