"""pytest's plugin: the fixture `kvtool_verify`, and a summary that begins with the verdict.

pytest loads it in every run of an environment that has kvtool: it imports nothing until it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from kvtool.results import Verification

RIGHT, WRONG = "kvtool_right", "kvtool_wrong"  # properties of a test; reports of JUnit have them

UNJUDGED = "ERROR: "  # begins what is told of a decoder without a verdict


class Verify(Protocol):
    """Judges a decoder, as kvtool.verify does."""

    def __call__(self, model: Any, **options: Any) -> Verification:
        """The verification; nothing is asserted."""


@pytest.fixture
def kvtool_verify(request: pytest.FixtureRequest) -> Verify:
    """Judge a decoder with its cache as kvtool.verify does, and keep the verdict for the summary.

    Nothing is asserted: write `assert kvtool_verify(model)`, or show the evidence too with
    kvtool.testing.assert_right.
    """

    def verify(model: Any, **options: Any) -> Verification:
        import kvtool
        from kvtool.errors import KvtoolError

        told = request.node.user_properties  # which come here from other processes too
        try:
            found = kvtool.verify(model, **options)
        except Exception as error:  # a decoder without a verdict is not one among right ones
            kind = "" if isinstance(error, KvtoolError) else f"{type(error).__name__}: "
            told.append((WRONG, f"{UNJUDGED}{kind}{error}"))
            raise
        told.append((RIGHT if found.ok else WRONG, "\n".join([found.verdict, *found.explained])))
        return found

    return verify


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what came of all decoders, the verdict first."""
    from kvtool.ui.inert import in_a_line

    told = list(_told(terminalreporter.stats))
    if not told:
        return
    wrong = [(test, said) for test, name, said in told if name == WRONG]
    terminalreporter.write_sep("=", "kvtool")
    line = in_a_line(f"kvtool: {_total([said for _, _, said in told], wrong)}")
    terminalreporter.write_line(line, bold=True, **{"red" if wrong else "green": True})
    for test, said in wrong:
        first, *more = said.splitlines()
        terminalreporter.write_line(in_a_line(f"{test}: {first}"))
        for line in more:
            terminalreporter.write_line(f"  {in_a_line(line)}")


def _told(stats: dict[str, list[Any]]) -> Iterator[tuple[str, str, str]]:
    """(test, RIGHT or WRONG, verdict) of each decoder; a test has a report for each of its phases,
    and the longest has all."""
    tests: dict[str, list[Any]] = {}
    for report in (report for reports in stats.values() for report in reports):
        found = [tuple(each) for each in getattr(report, "user_properties", ()) if _is_ours(each)]
        if len(found) > len(tests.get(report.nodeid, ())):
            tests[report.nodeid] = found
    for test, found in tests.items():
        yield from ((test, name, said) for name, said in found)


def _is_ours(found: Any) -> bool:
    """Whether a property of a test is a verdict; other plugins and tests add what they like."""
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        return False
    name, said = found
    return name in (RIGHT, WRONG) and isinstance(said, str) and bool(said.strip())


def _total(told: list[str], wrong: list[tuple[str, str]]) -> str:
    """The verdict on all decoders in a line."""
    if wrong:
        judged = [said for _, said in wrong if not said.startswith(UNJUDGED)]
        first = (judged or [wrong[0][1]])[0].splitlines()[0]
        return first + (f" ({len(wrong)} of {len(told)} not right)" if len(told) > 1 else "")
    counts = {said: told.count(said) for said in told}
    return ", ".join(
        f"{said} in {n} decoder{'s' * (n > 1)}" if len(told) > 1 else said
        for said, n in counts.items()
    )
