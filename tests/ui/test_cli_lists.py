"""Options that take a list, and completion, as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from cli_probe import LENGTHS, Ran, lengths_of, refused
from kvtool import app, registry
from kvtool.registry import CACHES
from kvtool.ui import lists

pytestmark = pytest.mark.usefixtures("probe_command")


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


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("16-1024*2", [16, 32, 64, 128, 256, 512, 1024]),
        ("10-50+20", [10, 30, 50]),
        ("3-5", [3, 4, 5]),
        ("10-99*3 200", [10, 30, 90, 200]),
        ("7-7*9,8", [7, 8]),
    ],
)
def test_a_range_stands_for_its_lengths(
    kv: Callable[..., Ran], words: str, expected: list[int]
) -> None:
    assert lengths_of(kv("--json", "--lengths", *words.split())) == expected


def test_all_stands_for_every_kind_of_cache(kv: Callable[..., Ran]) -> None:
    assert json.loads(kv("--json", "--caches", "all").out)["caches"] == list(CACHES)


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
        ("--lengths 50-10", "--lengths: 50-10 is empty (expected the smaller length first)"),
        ("--lengths 1-9*1", "--lengths: 1-9*1 never ends (expected *2 or more, or +1 or more)"),
        ("--lengths 1-9+0", "--lengths: 1-9+0 never ends (expected *2 or more, or +1 or more)"),
        ("--lengths 0-9", "--lengths: 0 is not a length: must be 1 or more"),
        ("--lengths 1-9999", "--lengths: 1-9999 is more than 1,000 lengths. Try 1-9999*2."),
        ("--lengths 1-9/2", "--lengths: '1-9/2' is not a whole number"),
        ("--lengths 1.5", "--lengths: '1.5' is not a whole number"),
        ("--lengths -5", "--lengths: -5 is not a length: must be 1 or more"),
        ("--lengths 10 -5 50", "--lengths: -5 is not a length: must be 1 or more"),
        ("--lengths=-5", "--lengths: -5 is not a length: must be 1 or more"),
        ("--lengths 0", "--lengths: 0 is not a length: must be 1 or more"),
        ("--lengths", "--lengths: needs at least one value, e.g. --lengths 10 50 100"),
        ("--lengths --json", "--lengths: needs at least one value, e.g. --lengths 10 50 100"),
        ("--lengths=", "--lengths: needs at least one value, e.g. --lengths 10 50 100"),
        ("--lengths 10 --lengths", "--lengths: needs at least one value, e.g. --lengths 10 50 100"),
        ("--lengths 10,,50", "--lengths: '10,,50' has an empty element. Take out a comma."),
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
    monkeypatch.setattr(registry, "CACHES", three)
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
