"""What the samples of a measurement say: medians, speed-ups, and from where a cache pays."""

from __future__ import annotations

import pytest

from kvtool.config.setups import Setup
from kvtool.core.bench.timing import Cell, crossover, speedups
from made_up_samples import cells, taking


def test_median_and_quartiles_are_those_of_the_samples() -> None:
    cell = Cell("none", 10, [taking(s) for s in (1.0, 9.0, 2.0, 3.0, 4.0)])
    assert (cell.median, cell.iqr) == (3.0, 2.0)
    assert Cell("none", 10, [taking(s) for s in (1.0, 2.0)]).iqr is None
    assert Cell("none", 10).median is None


def test_a_speed_up_is_the_time_without_a_cache_over_the_time_with_it() -> None:
    found = cells(none=[2.0, 8.0, None], static=[4.0, 2.0, 1.0])
    assert [speedup for _, speedup in speedups(found)] == [1.0, 0.5, 1.0, 4.0, None, None]
    assert [speedup for _, speedup in speedups(cells(static=[1.0, 2.0]))] == [None, None]


@pytest.mark.parametrize(
    ("none", "static", "length"),
    [
        ([1.0, 4.0], [2.0, 2.0], 10 * 2 ** (1 / 2)),  # 1 is midway between speed-ups 0.5 and 2
        ([1.0, 16.0], [2.0, 4.0], 10 * 2 ** (1 / 3)),  # and a third of the way from 0.5 to 4
        ([1.0, 4.0], [1.0, 2.0], 10.0),
        ([2.0, 2.0, 8.0], [1.0, 4.0, 4.0], 20 * 2 ** (1 / 2)),  # slower again in between
        ([2.0, 4.0], [1.0, 1.0], 10.0),
        ([1.0, 1.0], [2.0, 1.0], None),  # as fast is not faster
        ([4.0, 1.0], [2.0, 2.0], None),
        ([1.0, 4.0, None], [2.0, 2.0, 2.0], 10 * 2 ** (1 / 2)),
        ([None, None], [2.0, 2.0], None),
    ],
)
def test_a_cache_pays_from_where_it_is_faster_at_every_longer_length(
    none: list[float | None], static: list[float | None], length: float | None
) -> None:
    assert crossover(cells(none=none, static=static), "static") == pytest.approx(length)


def test_processors_that_were_busy_are_counted_by_their_time() -> None:
    cell = Cell("none", 3, took=[2.0, 1.0, 4.0], busy=[4.0, 1.0, 4.0])
    assert cell.cores_used == 1.0
    assert Cell("none", 3).cores_used is None


def test_an_uncached_run_counts_for_its_own_setup_alone() -> None:
    one, two = Setup(threads=1), Setup(threads=2)
    found = [
        Cell(kind, 10, [taking(seconds)], setup=setup)
        for setup, none, static in ((one, 8.0, 2.0), (two, 4.0, 8.0))
        for kind, seconds in (("none", none), ("static", static))
    ]
    assert [speedup for _, speedup in speedups(found)] == [1.0, 4.0, 1.0, 0.5]
    assert crossover(found, "static", setup=one) == 10.0
    assert crossover(found, "static", setup=two) is None
