"""--github: what a workflow's log, its annotations and its summary say of a report."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from cli_probe import Ran, refused
from kvtool.commands.verify.report import CacheReport
from kvtool.commands.verify.show import show
from kvtool.errors import FileError
from kvtool.ui import github
from kvtool.ui.output import Output, present
from report_cases import BUG, HOSTILE, PLANTED, REPORTS, content_of, row

LINE = re.compile(r"::(error|notice) (?:file=([^:,\n]*),)?title=([^:,\n]*)::([^\n\r]*)")


def lines_of(name: str, **settings: Any) -> list[tuple[str, ...]]:
    command, report = REPORTS[name]
    found = github.annotated(content_of(command, report, **settings), report)
    return [matched.groups("") for line in found if (matched := LINE.fullmatch(line))]


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_has_errors_where_its_exit_code_is_not_0_and_always_its_verdict(name: str) -> None:
    *errors, notice = lines_of(name)
    report = REPORTS[name][1]
    assert notice[0] == "notice" and (notice[3] or not getattr(report, "conclusion", ""))
    assert {kind for kind, *_ in errors} == ({"error"} if report.exit_code else set())


def test_an_error_stands_at_the_file_of_the_decoder_with_its_evidence() -> None:
    error, _ = lines_of("bug", target="my/decoder.py:build")
    title = "kvtool verify-cache%3A static%2C default kernels%2C decode"
    assert error[1:3] == ("my/decoder.py", title)
    assert error[3].startswith("bug, step 3%0Ait differs%0Awhere: layer 1, head 0%0Awhat: keys")
    error, _ = lines_of("bug", target="/elsewhere/decoder.py:build")
    assert error[1] == ""


def test_more_errors_than_are_shown_are_named_in_the_last() -> None:
    many = [dataclasses.replace(BUG, scenario=f"s{i}") for i in range(github.SHOWN + 3)]
    report = CacheReport(many, PLANTED, 3, "float32")
    *errors, _ = github.annotated(content_of("verify-cache", report), report)
    assert len(errors) == github.SHOWN
    assert "4 more" in errors[-1] and errors[-1].endswith("kernels, s12")


def say(
    report: Any, *, command: str = "verify-cache", run: Callable[..., Any] | None = None
) -> None:
    """Present a report with --github."""
    with pytest.raises(typer.Exit):
        present("verify-cache", {}, run or (lambda *_: report), show, Output(github=True))


def test_a_strangers_words_are_no_command_and_escaped_where_they_are_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(github.SUMMARY, raising=False)
    wrong = dataclasses.replace(row(HOSTILE, "bug"), scenario=HOSTILE, evidence=HOSTILE)
    say(CacheReport([wrong], PLANTED, 3, "float32"))
    out = capsys.readouterr().out
    (token,) = re.findall(r"^::stop-commands::(\S{20,})$", out, re.MULTILINE)
    inside, outside = out.split(f"::{token}::\n")
    assert "script" in inside and not LINE.search(inside)
    assert all(LINE.fullmatch(line) for line in outside.splitlines())
    assert "%3A%3Aerror%3A%3Ax%250A" in outside and "\x1b" not in out and "\u202e" not in out


def test_the_report_is_added_to_the_summary_of_the_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("# before\n")
    monkeypatch.setenv(github.SUMMARY, str(summary))
    say(REPORTS["right"][1])
    text = summary.read_text()
    assert text.startswith("# before\n# kvtool verify-cache\n\n| cache |")
    assert "; the planted bug was found" in text
    monkeypatch.setattr(github, "MAX_SUMMARY", len(text) + 120)
    say(REPORTS["right"][1])
    cut = summary.read_text()
    assert len(cut) <= len(text) + 120 and cut.endswith("too long for a summary.\n\n")
    monkeypatch.setenv(github.SUMMARY, str(tmp_path))
    with pytest.raises(FileError, match=r"GITHUB_STEP_SUMMARY .*: cannot be written"):
        say(REPORTS["right"][1])
    assert "::notice" in capsys.readouterr().out.splitlines()[-1]


def test_work_that_cannot_be_done_is_an_error_too(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any) -> None:
        raise FileError("a.json: is no JSON", "Give another.")

    with pytest.raises(FileError):
        say(None, run=fail)
    expected = "::error title=kvtool verify-cache::a.json: is no JSON. Give another.\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("command", ["verify-cache", "verify-logits", "bench"])
def test_annotations_and_json_do_not_share_stdout(kv: Callable[..., Ran], command: str) -> None:
    message = refused(kv("--github", "--json", command=command))
    assert message == "--github: contradicts --json. Both are for stdout. Give one."
