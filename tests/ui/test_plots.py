"""Pictures: real files of each format, with what was measured in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kvtool.errors import FileError
from kvtool.ui import axes as axes_of
from kvtool.ui import heat_maps, plots

STARTS = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF-"}
SERIES = {
    "none": [(10, [0.01, 0.011]), (100, [0.2, 0.21]), (1000, [9.0])],
    "static": [(10, [0.02, 0.021]), (100, [0.1, 0.14, 0.12])],
}
MEMORY = {"static": [(10, 2048), (100, 20480)]}
LOG: list[dict[str, Any]] = [
    {"step": 1, "loss": 5.0},
    {"step": 2, "loss": 4.0, "valid": {"bits_per_byte": 3.0}},
    {"step": 3, "loss": 3.5},
]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, for looking at."""
    seen: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *_: seen.append(figure))
    return seen


@pytest.mark.parametrize("suffix", [*STARTS, ".PNG"])
def test_a_plot_is_a_real_file_of_its_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    plots.bench_plot(path, SERIES, MEMORY, {"static": 30.0}, "It pays.")
    assert path.read_bytes().startswith(STARTS[suffix.lower()])
    plots.loss_plot(path, LOG, "bits_per_byte")
    assert path.read_bytes().startswith(STARTS[suffix.lower()])
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_plot_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none/a\.png: cannot be written"):
        plots.bench_plot(tmp_path / "none" / "a.png", SERIES, MEMORY, {})


def test_latency_is_drawn_as_medians_in_a_band_of_all_samples(figures: list[Any]) -> None:
    plots.bench_plot(Path("a.png"), SERIES, MEMORY, {"static": 31.6})
    axes = figures[0].axes[0]
    drawn = {line.get_label(): line for line in axes.lines}
    assert list(drawn["static cache"].get_xdata()) == [10, 100]
    assert list(drawn["static cache"].get_ydata()) == pytest.approx([0.0205, 0.12])
    assert list(drawn["no cache"].get_ydata()) == pytest.approx([0.0105, 0.205, 9.0])
    band = axes.collections[1].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0.02, 0.14)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {
        "no cache",
        "static cache",
    }


def test_setups_have_dashes_of_their_own_where_kinds_lie_on_each_other(figures: list[Any]) -> None:
    names = [
        f"{dtype} {kind}" for kind in ("dynamic", "static") for dtype in ("float32", "bfloat16")
    ]
    times = {name: [(10, [1.0]), (100, [2.0])] for name in names}
    plots.bench_plot(Path("unused.png"), times, {}, {})
    (axes,) = figures[0].axes
    looks = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in axes.lines}
    assert len(looks) == len(set(looks.values())) == 4
    widths = [line.get_linewidth() for line in axes.lines]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 4


def test_memory_is_drawn_beside_it_for_the_kinds_that_store_something(figures: list[Any]) -> None:
    plots.bench_plot(Path("a.png"), SERIES, MEMORY, {})
    (line,) = figures[0].axes[1].lines
    assert (line.get_label(), list(line.get_ydata())) == ("static cache", [2048, 20480])
    assert line.get_color() == figures[0].axes[0].lines[1].get_color()
    plots.bench_plot(Path("a.png"), {"none": SERIES["none"]}, {}, {})
    assert len(figures[1].axes) == 1


def test_a_length_is_marked_and_a_caption_stands_below(figures: list[Any]) -> None:
    plots.bench_plot(Path("a.png"), SERIES, MEMORY, {"static": 31.6}, "It pays.")
    axes = figures[0].axes[0]
    (mark,) = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert (mark.get_xdata(), mark.get_color()) == ([31.6] * 2, axes.lines[1].get_color())
    assert figures[0].get_supxlabel() == "It pays."


@pytest.mark.parametrize(
    "seconds", [[0.1], [0.3, 0.31], [0.3, 0.42], [0.0123, 0.0124], [1.0, 2.0], [0.21, 90.0], [7e-7]]
)
@pytest.mark.parametrize("lengths", [[1], [10], [999, 1000], [10, 1000]])
def test_every_axis_has_two_ticks_or_more(
    seconds: list[float], lengths: list[int], figures: list[Any]
) -> None:
    times = {"static": [(n, seconds) for n in lengths]}
    plots.bench_plot(Path("a.png"), times, {"static": [(n, 1500 * n) for n in lengths]}, {})
    for axes in figures[0].axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            shown = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
            assert len(shown) >= 2
            assert all(axis.get_major_formatter()(tick, 0) for tick in shown)
    low, high = figures[0].axes[0].get_ylim()
    assert low <= min(seconds) and max(seconds) <= high


def test_a_colour_belongs_to_the_kind_in_whichever_order_and_company(figures: list[Any]) -> None:
    """Two of a kind differ nevertheless."""
    for kinds in (["static", "none"], ["none", "paged", "static"], ["static", "static:a=1"]):
        times = {kind: [(n, [0.1 * n * 3**i]) for n in (10, 100)] for i, kind in enumerate(kinds)}
        plots.bench_plot(Path("a.png"), times, {}, {})
    first, second, third = (
        {line.get_label(): line.get_color() for line in figure.axes[0].lines} for figure in figures
    )
    assert first["static cache"] == second["static cache"] == third["static cache"]
    assert first["no cache"] == second["no cache"] == plots.COLOURS[0]
    assert len(set(second.values())) == 3 and len(set(third.values())) == 2


def test_the_names_of_many_lines_are_all_within_the_figure(figures: list[Any]) -> None:
    times = {f"batch-{i} static": [(10, [0.1]), (20, [0.2])] for i in range(60)}
    plots.bench_plot(Path("a.png"), times, {}, {}, "It pays.")
    figure = figures[0]
    figure.draw_without_rendering()
    (names,) = figure.legends
    (caption,) = (text for text in figure.texts if text.get_text() == "It pays.")
    assert names.get_window_extent().y0 > caption.get_window_extent().y1
    lines = figure.axes[0].lines
    assert max(line.get_linewidth() for line in lines) < 15  # all of them lie on each other
    assert max(line.get_markersize() for line in lines) < 20


def test_kinds_that_lie_on_each_other_are_told_apart(figures: list[Any]) -> None:
    """They take turns along one line: where one has a dash, the others have gaps."""
    times = {kind: [(10, [0.1]), (100, [1.0])] for kind in ("dynamic", "static", "paged")}
    memory = {kind: [(10, 2048), (100, 20480)] for kind in ("dynamic", "static")}
    apart = {"int8": [(10, [0.2]), (100, [2.0])]}
    plots.bench_plot(Path("a.png"), {**times, **apart}, memory, {})
    for axes, n in zip(figures[0].axes, (3, 2), strict=True):
        lines = axes.lines[:n]
        on = []
        for line in lines:
            offset, (dash, gap) = line._unscaled_dash_pattern
            assert gap == (n - 1) * dash
            on.append((n * dash - offset) % (n * dash))  # where its dash begins
        assert sorted(on) == [i * dash for i in range(n)]
        assert len({line.get_markersize() for line in lines}) == n  # marks in each other
        assert {line.get_markerfacecolor() for line in lines} == {"none"}
        named = [text.get_text() for text in axes.get_legend().get_texts()]
        assert named == [f"{kind} cache" for kind in (*times, "int8")][: len(axes.lines)]
    assert figures[0].axes[0].lines[3].get_linestyle() == "-"


def test_a_plot_names_what_was_measured(figures: list[Any]) -> None:
    about = "Time to generate\na model (01234567), float32, 2 threads, a processor; " + "int8 " * 60
    plots.bench_plot(Path("a.png"), SERIES, MEMORY, {}, "", about)
    plots.gap_plot(Path("a.png"), {"static": {"float32": [1e-7, 2e-7]}}, about)
    for figure in figures:
        assert " ".join(figure.get_suptitle().split()) == " ".join(about.split())
        assert figure.get_suptitle().startswith("Time to generate\na model")
        widest = max(map(len, figure.get_suptitle().splitlines()))
        assert widest <= 13 * figure.get_figwidth()  # letters of this size in an inch


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [
        ([10, 50, 100, 500, 1000], [10, 50, 100, 500, 1000]),
        ([10, 20, 30], [10, 20, 30]),
        ([5], [5]),
        ([1, 1000, 1001, 1002], [1, 1002]),
    ],
)
def test_labels_that_would_run_into_each_other_are_left_out(
    lengths: list[int], kept: list[int], figures: list[Any]
) -> None:
    assert axes_of.apart(lengths) == kept
    plots.bench_plot(Path("a.png"), {"none": [(n, [n / 10]) for n in lengths]}, {}, {})
    assert list(figures[0].axes[0].get_xticks()) == (kept if kept[1:] else [2, 5, 10])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0005, "0.5 ms"), (0.5, "500 ms"), (1, "1 s"), (2.0, "2 s"), (5000, "5,000 s")],
)
def test_times_have_their_units(seconds: float, text: str) -> None:
    assert axes_of.seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("n", "text"), [(512, "512 B"), (2048, "2 KiB"), (3 * 2**20, "3 MiB"), (5 * 2**30, "5 GiB")]
)
def test_sizes_have_their_units(n: int, text: str) -> None:
    assert axes_of.bytes_text(n) == text


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_loss_plot_shows_the_score_on_an_axis_of_its_own(figures: list[Any]) -> None:
    plots.loss_plot(Path("a.png"), LOG, "bits_per_byte", title="train-lm, runs/lm")
    left, right = figures[0].axes
    assert left.get_title() == "train-lm, runs/lm"
    assert list(left.lines[0].get_ydata()) == [5.0, 4.0, 3.5]
    assert list(right.lines[0].get_xdata()) == [2]
    assert right.get_ylabel() == "held out: bits per byte"
    assert legend(figures[0]) == ["loss in training", "bits per byte, held out"]


def test_the_score_of_averaged_weights_is_a_line_of_its_own(figures: list[Any]) -> None:
    log = [*LOG, {"step": 2, "averaged": {"bits_per_byte": 2.5}}, {"step": 3, "valid": {"per": 1}}]
    plots.loss_plot(Path("a.png"), log[:-1], "bits_per_byte")
    right = figures[0].axes[1]
    assert [list(line.get_ydata()) for line in right.lines] == [[3.0], [2.5]]
    assert legend(figures[0])[1:] == [
        "bits per byte, held out",
        "bits per byte, held out, averaged weights",
    ]
    plots.loss_plot(Path("a.png"), [LOG[0], log[-1]], "per")
    assert figures[1].axes[1].get_ylabel() == "held out: PER %"


def test_the_held_out_loss_is_drawn_beside_that_of_training(figures: list[Any]) -> None:
    log = [
        LOG[0],
        {"step": 1, "valid": {"per": 50}},  # of a run that was begun before there was one
        {"step": 2, "valid": {"per": 40, "loss": 2.5}},
        {"step": 2, "averaged": {"per": 30, "loss": 2.25}},
    ]
    plots.loss_plot(Path("a.png"), log, "per", "loss")
    left, right = figures[0].axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in (*left.lines, *right.lines)}
    assert drawn == {
        "loss in training": [[1, 5]],
        "loss, held out": [[2, 2.5]],
        "loss, held out, averaged weights": [[2, 2.25]],
        "PER %, held out": [[1, 50], [2, 40]],
        "PER %, held out, averaged weights": [[2, 30]],
    }
    assert legend(figures[0]) == list(drawn)


def test_a_loss_that_stays_the_same_looks_flat(figures: list[Any]) -> None:
    log = [{"step": n, "loss": 2.0 + n % 2 / 100, "valid": {"per": 3 - n % 2 / 50}} for n in (1, 2)]
    plots.loss_plot(Path("a.png"), log, "per")
    for axes in figures[0].axes:
        assert axes.get_yscale() == "linear" and axes.get_ylim()[0] == 0
        (low, high), values = axes.get_ylim(), axes.lines[0].get_ydata()
        assert max(values) - min(values) < (high - low) / 50 and high < 1.2 * max(values)


def test_what_label_smoothing_leaves_of_the_loss_is_a_line_with_its_reason(
    figures: list[Any],
) -> None:
    plots.loss_plot(Path("a.png"), LOG, "bits_per_byte", loss_floor=0.6875)
    (line,) = [line for line in figures[0].axes[0].lines if line.get_linestyle() == ":"]
    assert set(line.get_ydata()) == {0.6875}
    assert legend(figures[0])[1] == "lowest loss that label smoothing leaves: 0.69"
    plots.loss_plot(Path("a.png"), LOG, "bits_per_byte")
    assert len(figures[1].axes[0].lines) == 1


def test_a_training_without_a_step_leaves_no_plot(figures: list[Any]) -> None:
    plots.loss_plot(Path("a.png"), [{"step": 0, "valid": {"x": 1.0}}], "x")
    assert figures == []


# Names of others


FORMULA = "$\\frac{$ \\x1b[31m\x1b[31m\udcff"  # which matplotlib cannot parse, nor a file encode
DRAWINGS: dict[str, Callable[[Path], None]] = {
    "bench": lambda path: plots.bench_plot(
        path, {FORMULA: SERIES["none"]}, {FORMULA: MEMORY["static"]}, {}, FORMULA, FORMULA
    ),
    "loss": lambda path: plots.loss_plot(path, LOG, FORMULA, FORMULA, 0.5, FORMULA),
    "gap": lambda path: plots.gap_plot(path, {FORMULA: {FORMULA: [0.1, 0.2]}}, FORMULA),
    "attention": lambda path: heat_maps.attention_plot(
        path, [[[0.5, 0.5]]], [FORMULA, "$a$"], [FORMULA], [FORMULA]
    ),
}


@pytest.mark.parametrize("name", DRAWINGS)
@pytest.mark.parametrize("suffix", STARTS)
def test_no_name_is_a_formula_or_steers_in_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str
) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(plots, "write_durable", lambda _, data: written.append(data))
    DRAWINGS[name](tmp_path / f"a{suffix}")
    assert written[0].startswith(STARTS[suffix])
    if suffix == ".svg":  # whose comments say what is drawn
        said = written[0].decode()
        ElementTree.fromstring(said)
        assert "$\\frac{$" in said and "\x1b" not in said


def test_every_drawing_is_tried_above() -> None:
    drawn = {
        name.removesuffix("_plot")
        for module in (plots, heat_maps)
        for name in vars(module)
        if name.endswith("_plot")
    }
    assert drawn == DRAWINGS.keys()
