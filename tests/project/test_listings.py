"""Listings in README and docs are what is printed now.

After a change to what commands print,

    python -m pytest tests/project/test_listings.py --update-listings self-test

runs each command whose text has that word, and writes what it prints into the page; "all" runs
every one. Commands that measure time want a quiet machine, and minutes. listings.py says how a page
marks a listing, and what of it is compared.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

import listings
from bench_cases import small_array  # noqa: F401
from kvtool import app
from kvtool.core.bench import timing, traffic
from kvtool.core.bench.peers import TransformersGenerate
from kvtool.core.checkpoint import checkpoint
from kvtool.core.verify.mutants import selftest
from kvtool.core.verify.scenarios import SCENARIOS
from kvtool.registry import CACHES, KERNELS
from kvtool.ui import environment
from listings import Listing, difference, same
from self_tested import caught, passed
from small_models import random_model

ALL = listings.listings()
PROCESSOR = re.compile(r"^.*\b\d+ threads?, ([^;\n]+)", re.MULTILINE)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def updated(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Print listings anew, where that is asked for."""
    wanted = request.config.option.update_listings
    if wanted and "listing" in request.fixturenames:
        listing = request.node.callspec.params["listing"]
        if wanted == "all" or wanted in listing.command:
            listings.update(listing, listings.printed_by(listing, tmp_path))


def as_listed(listing: Listing) -> Listing:
    """The listing as it stands now."""
    return next(each for each in listings.listings() if str(each) == str(listing))


@pytest.fixture
def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[[Listing, list[str]], str]:
    """What a command prints within this process, at the listing's width and of its processor."""

    def call(listing: Listing, more: list[str]) -> str:
        monkeypatch.setenv("COLUMNS", str(listing.columns))
        if name := PROCESSOR.search(listing.text):
            monkeypatch.setattr(environment, "cpu_name", lambda: name[1])
        (tmp_path / "here" / "docs").parent.mkdir()
        (tmp_path / "here" / "docs").symlink_to(listings.ROOT / "docs")
        monkeypatch.chdir(tmp_path / "here")
        assert app.run([*shlex.split(listing.command), *more]) in (0, 1)
        return capsys.readouterr().out

    return call


# Times are those listed: what is said of them must follow from them


ROW = re.compile(
    r"^ *([\d,]+)  (\w+) +(?:(kvtool|transformers) +)?([\d,.]+) +([\d,.]+) +\d+ .*x +([\d,]+)\b",
    re.MULTILINE,
)


def listed_runs(text: str) -> dict[tuple[str, str, int], Iterator[timing.TimedRun]]:
    """Runs by implementation, kind and length: about the median listed, as far from it as the IQR
    says, and with a cache of as many KiB."""
    found: dict[tuple[str, str, int], Iterator[timing.TimedRun]] = {}
    for row in ROW.findall(text):
        tokens, _, _, median, iqr, kib = (cell.replace(",", "") for cell in row)
        middle, far, nbytes = float(median) / 1000, float(iqr) / 1000, 1024 * int(kib)
        runs = [
            timing.TimedRun(seconds, 0.0, seconds, token, nbytes, nbytes, (token,) * (n - 1))
            for seconds in (middle, middle - far, middle + far)
            for n in (int(tokens),)
            for token in (seconds / n,)
        ]
        found[row[2] or "kvtool", row[1], int(tokens)] = cycle(runs)
    return found


@pytest.fixture
def at_listed_speed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def use(text: str) -> None:
        runs = listed_runs(text)
        assert runs
        for impl, work in (("kvtool", timing.Workload), ("transformers", TransformersGenerate)):

            def run(self: Any, kind: str, length: int, impl: str = impl) -> timing.TimedRun:
                return next(runs[impl, kind, max(length, 10)])  # fewer, to warm up

            monkeypatch.setattr(work, "run", run)
        if speed := re.search(r"read at ([\d.]+) GB/s", text):
            found = traffic.Bandwidth((float(speed[1]) * 1e9,), traffic.own_caches(CPU))
            monkeypatch.setattr(traffic, "read_bandwidth", lambda _: found)

    return use


# The listings


def test_every_command_that_is_shown_with_its_output_says_how_it_was_printed() -> None:
    assert listings.unlisted() == []
    assert len(ALL) >= 5
    for listing in ALL:
        assert listing.first in ("", f"$ kvtool {listing.command}\n")
        rows = (line for line in listing.text.splitlines() if re.search(r"\S  +\S", line))
        assert all(len(line) <= listing.columns for line in rows)


def of(command: str) -> Any:
    chosen = [listing for listing in ALL if listing.command.split()[0] == command]
    return pytest.mark.parametrize("listing", chosen, ids=str)


def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge a small model in place of the one that is loaded."""
    load = checkpoint.load

    def loaded(*args: Any) -> Any:
        found = load(*args)
        sizes = {"vocab_size": found.config.vocab_size, "context": found.config.context}
        return dataclasses.replace(found, model=random_model(**sizes))

    monkeypatch.setattr(checkpoint, "load", loaded)


@of("verify-cache")
def test_a_listed_verdict_is_what_is_printed(
    listing: Listing,
    printed: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    listing, more = as_listed(listing), ["--tokens", "12"]  # fewer steps, as many rows
    document = tmp_path / "rows.json"
    if listing.command == "verify-cache":
        narrow(monkeypatch)  # every kind in every scenario; test_shipped_weights.py has real ones
        more = ["--tokens", "26", "--output", str(document)]  # less is too few for its row "none"
    if "--self-test" in listing.command:
        monkeypatch.setattr(selftest, "try_mutant", caught)  # as test_selftest.py finds them
        monkeypatch.setattr(selftest, "try_lookalike", passed)
        more = []
    found = printed(listing, more)
    assert same(listing, found), difference(listing, found)
    if listing.command == "verify-cache":  # of rows that came out alike one line is printed
        rows = json.loads(document.read_text(encoding="utf-8"))["checks"]
        every = itertools.product(CACHES, KERNELS, SCENARIOS)
        assert [(row["cache"], row["kernels"], row["scenario"]) for row in rows] == [*every]


@of("plan")
def test_a_listed_plan_is_what_is_printed(listing: Listing, printed: Callable[..., str]) -> None:
    listing = as_listed(listing)
    found = printed(listing, [])
    assert same(listing, found), difference(listing, found)


@of("bench")
def test_a_listed_measurement_is_laid_out_and_concluded_as_it_is_printed(
    listing: Listing, printed: Callable[..., str], at_listed_speed: Callable[[str], None]
) -> None:
    listing = as_listed(listing)
    at_listed_speed(listing.text)
    found = printed(listing, [])
    assert same(listing, found), difference(listing, found)


def test_all_listings_are_compared() -> None:
    assert {listing.command.split()[0] for listing in ALL} == {"verify-cache", "bench", "plan"}


def test_what_a_page_quotes_of_a_listing_of_another_stands_there() -> None:
    quoted = [found for page in listings.PAGES for found in listings.quoted(page)]
    assert quoted
    for source, lines in quoted:
        assert [line for line in lines if f"\n{line}\n" not in source.read_text("utf-8")] == []


def test_what_the_readme_says_of_the_self_test_is_its_conclusion() -> None:
    (listing,) = (listing for listing in ALL if "--self-test" in listing.command)
    caught, right = re.search(r"(\d+ of \d+) planted .+ 0 of (\d+) right", listing.text).groups()
    readme = " ".join((listings.ROOT / "README.md").read_text("utf-8").split())
    assert f"It finds {caught} planted ones, and reports none of {right} right caches" in readme
    page = listing.page.read_text("utf-8").partition("<!--")[0]
    assert page.strip().endswith(listings.SUMMARY.search(listing.text)[1] + ":")


# The comparison


VARIES = Listing(
    Path("a.md"),
    "bench",
    80,
    True,
    "A title\n            median\ntokens  cache   ms\n──────────────────\n    10  int8  28.0\n\n"
    "At 1,000 tokens int8 is fastest (5,309 tokens/s).\n",
    "",
)


def test_figures_may_differ_where_they_vary_and_nothing_else() -> None:
    text = VARIES.text
    faster = text.replace("28.0", "1,228.05").replace("5,309", "17").replace("──", "─", 3)
    one_line = text.replace("            median\n", "").replace("ms", "median ms")
    assert same(VARIES, text) and same(VARIES, faster) and same(VARIES, one_line)
    for old, new in (
        ("int8", "int4"),
        ("fastest", "slowest"),
        ("tokens ", "n "),
        ("cache", "kind"),
    ):
        assert not same(VARIES, text.replace(old, new, 1)), (old, new)
    assert not same(VARIES, text.replace("    10  int8  28.0\n", ""))
    assert not same(VARIES, text + "One more sentence.\n")
    assert not same(VARIES._replace(varies=False), faster)


def test_a_listing_that_is_not_what_is_printed_is_told_by_a_diff_and_the_remedy() -> None:
    said = difference(VARIES, VARIES.text.replace("int8  28.0", "int9  31.0")).splitlines()
    assert said[0] == "a.md: bench prints something else"
    assert {"-# int8 #", "+# int9 #"} == {line for line in said if re.match(r"[-+]#", line)}
    assert said[-1].endswith("tests/project/test_listings.py --update-listings bench")
    tested = difference(VARIES._replace(command="verify-cache --self-test"), "")
    assert tested.endswith("--update-listings self-test")


def test_lines_may_be_left_out_of_a_listing() -> None:
    head, _, last = VARIES.text.partition("\n\n")
    short = VARIES._replace(text=f"{head}\n...\n{last}")
    assert same(short, VARIES.text) and same(short, f"{head}\n\nmore\n\n{last}")
    assert not same(short, VARIES.text + "One more sentence.\n")


def test_seconds_may_differ_always_and_whether_a_right_cache_rounds() -> None:
    fixed = VARIES._replace(varies=False, text="int8  identical, rounding  yes\n3 of 3 (19 s)\n")
    assert same(fixed, "int8  rounding             yes\n3 of 3 (127 s)\n")
    assert not same(fixed, "int8  rounding             yes\n2 of 3 (19 s)\n")
    assert not same(fixed, "int8  bug                  yes\n3 of 3 (19 s)\n")


def test_an_update_writes_what_was_printed_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text(f"# Title\n\n```text\n$ kvtool bench\n{VARIES.text}```\n\nEnd.\n")
    listing = VARIES._replace(page=page, first="$ kvtool bench\n")
    listings.update(listing, "Something new\n\n✓ right (3 s)\n".replace("✓ right (3 s)\n", ""))
    assert page.read_text() == "# Title\n\n```text\n$ kvtool bench\nSomething new\n\n```\n\nEnd.\n"
