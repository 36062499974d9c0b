"""Help, results, tables and progress, as a user meets them."""

from __future__ import annotations

import io
import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

import kvtool
from cli_probe import Ran, refused
from kvtool import registry
from kvtool.config import RunConfig
from kvtool.ui import documents, environment, output, progress, tables

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
    assert "[default: 10 50]" in ran.out  # the words of a bracket stay in one line
    assert "\nModel:\n" in ran.out and "\nMachine:\n" in ran.out
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


def test_a_document_tells_the_peak_of_memory(kv: Callable[..., Ran]) -> None:
    before = json.loads(kv("--json").out)["peak_bytes"]
    held = b"x" * (before + 2**24)  # more than there was: the peak must rise
    assert json.loads(kv("--json").out)["peak_bytes"] >= len(held)


def test_results_go_to_stdout_and_talk_to_stderr(kv: Callable[..., Ran]) -> None:
    ran = kv()
    assert ran.out.splitlines()[-1] == "✓ all of them [really]"
    assert ran.err == "working\nhint: try more\n"
    assert kv("-q").err == ""
    *talk, peak = kv("-v").err.splitlines()
    assert talk == ["working", "in detail", "hint: try more"]
    assert re.fullmatch(r"peak memory: [\d,]+ MiB", peak)
    assert kv("-q").out == ran.out


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads of some processor."""
    torch = types.SimpleNamespace(__version__="2", get_num_threads=lambda: 2)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(environment, "cpu_name", lambda: "a processor")


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [
        (
            ".csv",
            "length,gap,even,dtype,threads,processor\n"
            "10,,true,float32,2,a processor\n51,,false,float32,2,a processor\n",
        ),
        (
            ".md",
            "# kvtool probe\n\nfloat32, 2 threads, a processor\n\n"
            "| length | gap | even |\n| --- | --- | --- |\n"
            "| 10 |  | true |\n| 51 |  | false |\n\nIt is even.\n",
        ),
    ],
)
def test_output_writes_the_rows_what_they_are_of_and_what_follows(
    kv: Callable[..., Ran], machine: None, tmp_path: Path, suffix: str, expected: str
) -> None:
    target = tmp_path / f"result{suffix}"
    assert kv("--lengths", "10", "51", "--output", str(target)).code == 0
    assert target.read_text(encoding="utf-8") == expected


def test_the_first_table_says_what_it_is_of(kv: Callable[..., Ran], machine: None) -> None:
    lines = kv().out.splitlines()
    assert lines[:2] == ["lengths", "float32, 2 threads, a processor"]
    assert sum("a processor" in line for line in lines) == 1


def test_only_the_first_table_has_the_caption(capsys: pytest.CaptureFixture[str]) -> None:
    out = output.Output()
    out.caption = "a model"
    for title in ("first", "second"):
        out.table(title, ["name"], [["x"]])
    assert capsys.readouterr().out.count("a model") == 1


RUN = RunConfig(model="org/model")
FOUND = {"model": "/cache/snapshots/1f", "sha256": "0123456789"}


@pytest.mark.parametrize(
    ("run", "resolved", "said"),
    [
        (RUN, FOUND, "org/model (01234567), float32"),
        (RunConfig(), FOUND, "1f (01234567), float32"),
        (RunConfig("/a/b/best"), {"model": "/a/b/best"}, "b/best, float32"),
        (RunConfig("/a/b/model"), {"model": "/a/b/model"}, "model, float32"),
        (RunConfig("a" * 41), {"model": f"/c/{'a' * 41}"}, f"{'a' * 41}, float32"),
        (RUN, {**FOUND, "changed": "with 1 head"}, "org/model with 1 head (01234567), float32"),
        (RUN, {"dtype": "bfloat16"}, "bfloat16"),
        (RUN, {"stored_dtype": "bfloat16"}, "float32 (stored in bfloat16)"),
        (RUN, {"stored_dtype": "float32"}, "float32"),
    ],
)
def test_a_caption_names_the_model_and_its_formats(
    machine: None, run: RunConfig, resolved: dict[str, Any], said: str
) -> None:
    facts = environment.measured_on(run, resolved)
    assert environment.caption(facts) == f"{said}, 2 threads, a processor"


def test_a_caption_names_the_settings_of_caches(machine: None) -> None:
    kinds = {"static": {}, "sliding:window=9": {"window": 9, "sinks": 4}, "paged": {"page": 16}}
    facts = environment.measured_on(RUN, {"cache_settings": kinds})
    assert facts["cache_settings"] == "sliding: window 9, sinks 4; paged: page 16"
    assert environment.caption(facts).endswith("; sliding: window 9, sinks 4; paged: page 16")


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
        (".", "is a folder"),
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


def heading(column: Any) -> str:
    return str(column.header.renderable)


def test_a_name_of_two_lines_begins_in_its_row_and_headings_end_above_theirs() -> None:
    columns = [tables.Column("kind", "left", by_word=True), tables.Column("steps identical")]
    console = Console(width=18, file=io.StringIO())
    console.print(*tables.build_table("", columns, [["planted bug", "12"], ["b", "3"]], 18))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]
    assert [line.split() for line in lines[:2]] == [["steps"], ["kind", "identical"]]
    assert [line.split() for line in lines[3:]] == [["planted", "12"], ["bug"], ["b", "3"]]


def test_spare_columns_make_room_before_a_table_is_split() -> None:
    columns = [
        tables.Column("kind", "left", key=True, by_word=True),
        tables.Column("first", spare=1),
        tables.Column("second", spare=2),
        tables.Column("third"),
    ]
    rows = [["planted bug", "1", "2", "3"]]

    def shown(width: int) -> list[str]:
        parts = list(tables.build_table("", columns, rows, width))
        found = [heading(c) for p in parts if isinstance(p, Table) for c in p.columns]
        return [*found, *(str(p) for p in parts if isinstance(p, Text) and str(p))]

    assert shown(29) == ["kind", "first", "second", "third"]
    assert shown(28) == ["kind", "first", "third", "(no room for second)"]
    assert shown(20) == ["kind", "third", "(no room for first, second)"]


def test_json_mode_keeps_stdout_free_of_words(capsys: pytest.CaptureFixture[str]) -> None:
    out = output.Output(json=True)
    out.table("t", ["a"], [["1"]])
    out.text("text")
    out.verdict(True, "good")
    out.stream("token")
    assert capsys.readouterr().out == ""


def test_what_is_to_be_copied_is_not_broken_on_a_narrow_terminal() -> None:
    from io import StringIO

    from rich.console import Console

    file = StringIO()
    out = output.Output()
    out._out = out._err = Console(file=file, force_terminal=True, width=20, color_system=None)
    path = "/a/path/of-more/than-twenty/columns"
    out.text(f"checkpoint: {path}", wrap=False)
    out.hint(f"kvtool generate --model {path}")
    out.note(f"words in front of {path} and some behind")
    assert file.getvalue().splitlines() == [
        f"checkpoint: {path}",
        f"hint: kvtool generate --model {path}",
        "words in front of",
        path,
        "and some behind",
    ]


def test_there_is_no_progress_bar_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with output.Output().progress("training", total=3) as bar:
        bar.advance()
        bar.update(loss=1.25)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(("width", "words"), [(40, False), (60, True), (80, True)])
def test_a_progress_bar_keeps_its_numbers_whole_and_shortens_its_words(
    width: int, words: bool
) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None)
    with progress.open_progress(console, "verify-cache", total=120) as bar:
        bar.advance(34)
        bar.update("static, exact kernels, two-sources, and much more than there is room for")
    assert "verify-cache" in file.getvalue() and "34/120 0:00:00 --:--" in file.getvalue()
    assert ("static" in file.getvalue()) == words


def test_a_progress_bar_on_a_narrow_terminal_shows_count_and_loss() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=60, color_system=None)
    with progress.open_progress(console, "training", total=3) as bar:
        bar.advance(2)
        bar.update(loss=1.25)
    assert "training" in file.getvalue()
    assert "2/3" in file.getvalue()
    assert "loss 1.25" in file.getvalue()
