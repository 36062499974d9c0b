"""The plugin for pytest: what a run of somebody's own tests says of their decoders."""

from __future__ import annotations

import subprocess
import sys

import pytest

import kvtool
from cli_probe import HANGS

pytest_plugins = ["pytester"]

# Stands in for torch and for kvtool.verify, so that the runs below take no time.
CONFTEST = """
import kvtool
from kvtool.errors import CheckFailed, UsageError

class Found:
    def __init__(self, verdict, *explained):
        self.verdict, self.explained, self.ok = verdict, list(explained), verdict.islower()
        self.failure = "the evidence"
    def __bool__(self):
        return self.ok
    def __repr__(self):
        return f"<{self.verdict}>"

def verify(model, **options):
    if model == "nan":
        raise CheckFailed("logits: NaN at step 3")
    if model == "refused":
        raise UsageError("function: a function is no decoder")
    if model == "raises":
        raise ValueError("of its own")
    return Found(*model.split("/"))

kvtool.verify = verify
"""
TESTS = """
import pytest
from kvtool.testing import assert_right

BUG = "BUG in decode/where: layer 1/what: one too far"

@pytest.mark.parametrize("model", ["rounding only", BUG])
def test_mine(kvtool_verify, model):
    found = kvtool_verify(model)
    assert found.ok

def test_evidence(kvtool_verify):
    assert_right(kvtool_verify("BUG in crop"))

def test_both(kvtool_verify):
    assert kvtool_verify("rounding only") and kvtool_verify("rounding only")

def test_nan(kvtool_verify):
    kvtool_verify("nan")
"""


@pytest.fixture
def tested(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(kvtool, "verify", None, raising=False)  # and it is as before at the end
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    return pytester


def summary_of(run: pytest.RunResult) -> list[str]:
    heading = next(i for i, line in enumerate(run.outlines) if "= kvtool =" in line)
    return [line for line in run.outlines[heading + 1 :] if not line.startswith("=")]


def test_the_summary_begins_with_the_verdict_and_names_each_wrong_decoder(
    tested: pytest.Pytester,
) -> None:
    run = tested.runpytest_inprocess("-p", "kvtool.pytest_plugin", "-rN")
    assert run.parseoutcomes() == {"passed": 2, "failed": 3}
    first, *more = summary_of(run)
    assert first == "kvtool: BUG in decode (3 of 6 not right)"
    assert more[1:3] == ["  where: layer 1", "  what: one too far"]
    named = [line.partition("::")[2] for line in more if "::" in line]
    assert named[1:] == ["test_evidence: BUG in crop", "test_nan: ERROR: logits: NaN at step 3"]
    assert any(line.startswith("E ") and "BUG in crop" in line for line in run.outlines)
    assert any("where False = <BUG in decode>.ok" in line for line in run.outlines)


def test_right_decoders_are_one_line_and_other_runs_have_none(tested: pytest.Pytester) -> None:
    run = tested.runpytest_inprocess("-p", "kvtool.pytest_plugin", "-k", "rounding or both")
    assert summary_of(run) == ["kvtool: rounding only in 3 decoders"]
    tested.makepyfile(test_other="def test_other():\n    pass\n")
    run = tested.runpytest_inprocess("-p", "kvtool.pytest_plugin", "test_other.py")
    assert "kvtool" not in "".join(run.outlines[3:]) and run.ret == 0


def test_a_decoder_without_a_verdict_is_not_passed_over(tested: pytest.Pytester) -> None:
    tested.makepyfile(
        test_other="""
        import pytest
        @pytest.mark.parametrize("model", ["rounding only", "refused", "raises"])
        def test_other(kvtool_verify, model):
            kvtool_verify(model)
        """
    )
    run = tested.runpytest_inprocess("-p", "kvtool.pytest_plugin", "-rN", "test_other.py")
    first, *more = summary_of(run)
    assert first == "kvtool: ERROR: function: a function is no decoder (2 of 3 not right)"
    assert [line.partition("]: ")[2] for line in more if "::" in line] == [
        "ERROR: function: a function is no decoder", "ERROR: ValueError: of its own"
    ]  # fmt: skip


def test_a_bug_comes_before_what_could_not_be_judged(tested: pytest.Pytester) -> None:
    tested.makepyfile(
        test_other="""
        import pytest
        @pytest.mark.parametrize("model", ["refused", "BUG in crop"])
        def test_other(kvtool_verify, model):
            assert kvtool_verify(model)
        """
    )
    run = tested.runpytest_inprocess("-p", "kvtool.pytest_plugin", "-rN", "test_other.py")
    assert summary_of(run)[0] == "kvtool: BUG in crop (2 of 2 not right)"


def test_properties_of_others_do_no_harm(tested: pytest.Pytester) -> None:
    tested.makepyfile(
        test_other="""
        import pytest
        @pytest.mark.parametrize("said", [3, "", "\\n"])
        def test_other(record_property, request, said):
            record_property("kvtool_wrong", said)
            request.node.user_properties.append(("kvtool_right", said, said))
            request.node.user_properties.append(3)
        """
    )
    run = tested.runpytest_inprocess("-p", "kvtool.pytest_plugin", "test_other.py")
    assert run.ret == 0 and not any("= kvtool =" in line for line in run.outlines)


def test_what_other_processes_found_is_in_the_summary(tested: pytest.Pytester) -> None:
    run = tested.runpytest_inprocess("-p", "xdist", "-p", "kvtool.pytest_plugin", "-n1")
    assert summary_of(run)[0].endswith("(3 of 6 not right)")


def test_the_plugin_imports_nothing_that_takes_time() -> None:
    code = (
        "import sys, pytest; before = set(sys.modules); import kvtool.pytest_plugin\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS, check=True
    )
    assert done.stdout.split() == ["kvtool", "kvtool.pytest_plugin"]
