"""How many processes share a run of the tests."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

PLAIN = {
    "numprocesses": "auto",
    "capture": "fd",
    "update_listings": "",
    **dict.fromkeys(f"benchmark_{name}" for name in ("only", "enable", "compare", "save", "json")),
}


def processes(config: pytest.Config, *args: str, **options: Any) -> int:
    """Those that tests are handed to; with none, one process does all."""
    option = Namespace(**{**vars(config.option), **PLAIN, **options})
    asked = SimpleNamespace(option=option, args=args)
    return config.hook.pytest_xdist_auto_num_workers(config=asked)


def test_all_tests_are_shared_by_as_many_processes_as_there_are_cores(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "7")
    assert processes(pytestconfig, "tests") == processes(pytestconfig, "tests/cache") == 7


@pytest.mark.parametrize(
    "options",
    [
        {"benchmark_only": True},
        {"benchmark_compare": True},
        {"benchmark_save": "baseline"},
        {"update_listings": "all"},
        {"capture": "no"},
    ],
    ids=str,
)
def test_what_another_process_would_disturb_is_done_by_one(
    pytestconfig: pytest.Config, options: dict[str, Any]
) -> None:
    assert processes(pytestconfig, "tests", **options) == 0


def test_files_that_are_named_are_run_by_one_process(pytestconfig: pytest.Config) -> None:
    assert processes(pytestconfig, "tests/a/test_b.py", "tests/a/test_c.py::test_d") == 0
    assert processes(pytestconfig, "tests/a/test_b.py", "tests/c") != 0
