"""What verdicts come to, the same from the command line and from Python."""

from __future__ import annotations

import pytest

from kvtool.commands.verify.report import Report, Row
from kvtool.core.verify import api
from kvtool.core.verify.check import Checked
from kvtool.core.verify.compare import Gap
from kvtool.core.verify.judge import Finding
from kvtool.core.verify.outcome import Outcome

DIFFERS = Gap(8, 1, 1, 0.1, 9e5)


def checked(
    verdict: str,
    cache: str = "static",
    stores: bool = True,
    played: bool = True,
    lossy: bool = False,
    exact: bool = False,
) -> Checked:
    finding = Finding("decode", verdict, working=DIFFERS if played else None, lossy=lossy)
    return Checked(cache, "default", stores, finding, exact)


RIGHT, FOUND = checked("rounding"), checked("bug", "planted bug")
BEYOND = checked("unsupported", played=False)
UNDECIDED = checked("undecided")
VACUOUS = checked("vacuous")
BASELINE = checked("no cache", "none", stores=False)


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        (RIGHT, Outcome.RIGHT),
        (checked("identical", exact=True), Outcome.RIGHT),
        (checked("rounding", exact=True), Outcome.WRONG),
        (checked("precision"), Outcome.RIGHT),
        (checked("precision", lossy=True), Outcome.WRONG),
        (checked("not-causal"), Outcome.WRONG),
        (checked("error", played=False), Outcome.WRONG),
        (VACUOUS, Outcome.NOTHING),
        (BEYOND, Outcome.SKIPPED),
        (UNDECIDED, Outcome.UNDECIDED),
        (BASELINE, Outcome.SKIPPED),
        (checked("precision", "none", stores=False), Outcome.SKIPPED),
        (checked("bug", "none", stores=False), Outcome.WRONG),
    ],
)
def test_a_finding_has_one_outcome_in_a_table_and_in_python(
    check: Checked, expected: Outcome
) -> None:
    assert check.outcome == Row.of(check).outcome == expected


@pytest.mark.parametrize(
    ("checks", "control", "ok", "words"),
    [
        ([RIGHT], FOUND, True, "the planted bug was found"),
        ([RIGHT, BEYOND, BASELINE], FOUND, True, "the planted bug was found"),
        ([RIGHT, VACUOUS], FOUND, True, "proved nothing"),
        ([RIGHT, UNDECIDED], FOUND, False, "static: undecided"),
        ([RIGHT, checked("bug", "none", stores=False)], FOUND, False, "none: bug"),
        ([RIGHT, checked("vacuous", "sliding")], FOUND, False, "nothing was checked of sliding"),
        ([RIGHT, checked("unsupported", "paged", played=False)], FOUND, False, "of paged"),
        ([BASELINE], FOUND, False, "nothing was checked"),
        ([VACUOUS], FOUND, False, "nothing was checked"),
        ([], FOUND, False, "nothing was checked"),
        ([RIGHT], RIGHT, False, "did not report the bug"),
        ([RIGHT], VACUOUS, False, "did not report the bug"),
        ([RIGHT], UNDECIDED, False, "did not report the bug"),
        ([RIGHT], BEYOND, False, "did not report the bug"),
    ],
)
def test_the_command_and_the_function_agree_on_what_is_a_pass(
    checks: list[Checked], control: Checked, ok: bool, words: str
) -> None:
    called = api.Verification("it", "float32", tuple(checks), control.finding)
    shown = Report([Row.of(check) for check in checks], Row.of(control), 3, "float32")
    assert (called.ok, called.exit_code) == (ok, shown.exit_code) == (ok, 0 if ok else 1)
    assert words in shown.conclusion
    assert called.conclusion.startswith("right: ") == ok


def test_what_proved_nothing_is_counted_apart() -> None:
    report = api.Verification("it", "float32", (RIGHT, RIGHT, VACUOUS, BEYOND), FOUND.finding)
    assert len(report.judged) == 3 and not report.wrong
    said = "right: 2 of 3 scenarios, 1 proved nothing; the planted bug was found"
    assert report.conclusion == said


def test_an_undecided_scenario_is_no_pass_of_either() -> None:
    report = api.Verification("it", "float32", (RIGHT, UNDECIDED), FOUND.finding)
    assert report.wrong == (UNDECIDED,)
    assert Row.of(UNDECIDED).verdict == "undecided"


@pytest.mark.parametrize("check", [RIGHT, BEYOND, UNDECIDED, VACUOUS, BASELINE])
def test_a_table_has_the_word_of_the_document(check: Checked) -> None:
    row = Row.of(check)
    assert row.words() == row.words(short=True) == row.verdict == check.finding.verdict
