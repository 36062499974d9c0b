"""Tables that keep their numbers whole: headings wrap first, then the table is split in two."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rich import box
from rich.align import Align
from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kvtool.ui.inert import in_a_line

GAP = 2  # blanks between two columns
PROSE = 16  # a column of words is not squeezed below this


@dataclass(frozen=True)
class Column:
    """A heading and the side its cells stand at. Numbers stand right and never wrap.

    A `key` column says what a row is about; it is repeated when a table is split. A `spare` one
    gives way before it comes to that, the highest number first: it is left out, or, if it has a
    `brief` heading, stays under that with numbers of one digit. `by_word`: texts may be squeezed to
    their longest word.
    """

    name: str
    justify: Literal["left", "right", "center"] = "right"
    key: bool = False
    style: str = ""
    spare: int = 0
    brief: str = ""
    by_word: bool = False


def build_table(
    title: str,
    columns: Sequence[Column | str],
    rows: Sequence[Sequence[str]],
    width: int,
    encoding: str = "utf-8",
) -> Iterator[RenderableType]:
    """Yield what to print for a table in `width` columns. A text for a column is a left-hand one.

    What does not fit beside the key columns (or the first column, if none is a key) follows as a
    second table below.
    """
    named = [Column(each, "left") if isinstance(each, str) else each for each in columns]
    named = [replace(column, name=in_a_line(column.name)) for column in named]
    rows = [[in_a_line(cell) for cell in row] for row in rows]
    if title:
        yield Text(in_a_line(title), style="bold")
    if not rows:
        yield Text("(no rows)", style="dim")
        return
    named, cells, left_out = fitted(
        named, [list(texts) for texts in zip(*rows, strict=True)], width
    )
    note = ", ".join(left_out)
    rows = list(zip(*cells, strict=True))
    widths = [floor(column, texts) for column, texts in zip(named, cells, strict=True)]
    keys = [i for i, column in enumerate(named) if column.key] or [0]
    for chosen in split(widths, keys, width):
        part = [[row[i] for i in chosen] for row in rows]
        yield _grid([named[i] for i in chosen], part, width, encoding)
        if note:
            yield Text(f"(no room for {note})", style="dim")
            note = ""
        yield Text()


def floor(column: Column, cells: Sequence[str]) -> int:
    """The least width of a column: its numbers in full, or the longest word of its texts."""
    words = [cell_len(word) for text in (column.name, *cells) for word in text.split()]
    widest = max((cell_len(cell) for cell in cells), default=0)
    if column.justify == "right":
        return max([widest, *map(cell_len, column.name.split())], default=0)
    return max([0 if column.by_word else min(widest, PROSE), *words], default=0)


def fitted(
    columns: Sequence[Column], cells: Sequence[list[str]], width: int
) -> tuple[list[Column], list[list[str]], list[str]]:
    """Columns and their cells, shortened or left out as far as they may be until one table of
    `width` holds them -> and the names of those left out.

    >>> columns = [Column("a"), Column("b", spare=1), Column("c", spare=2)]
    >>> _, cells, left_out = fitted(columns, [["11"], ["22"], ["33"]], width=7)
    >>> cells, left_out
    ([['11'], ['22']], ['c'])
    """
    kept = dict(enumerate(zip(columns, cells, strict=True)))
    order = sorted((i for i, c in enumerate(columns) if c.spare), key=lambda i: -columns[i].spare)
    out = []
    for i in order:
        if sum(floor(*part) for part in kept.values()) + GAP * (len(kept) - 1) <= width:
            break
        column, texts = kept[i]
        if column.brief:
            kept[i] = replace(column, name=column.brief), [one_digit(text) for text in texts]
        else:
            out.append(kept.pop(i)[0].name)
    names = [column.name for column in columns if column.name in out]
    return [c for c, _ in kept.values()], [texts for _, texts in kept.values()], names


def one_digit(text: str) -> str:
    """A number in scientific notation as short as it gets; another text stays.

    >>> one_digit("4.6e-07"), one_digit("1.2e+00"), one_digit("-")
    ('5e-7', '1e+0', '-')
    """
    if not re.fullmatch(r"\d\.\d+e[-+]\d+", text):
        return text
    return re.sub(r"e([-+])0", r"e\1", f"{float(text):.0e}")


def split(widths: Sequence[int], keys: Sequence[int], width: int) -> list[list[int]]:
    """Divide columns into tables no wider than `width`, each with all key columns and one other.

    >>> split([6, 8, 8, 8], keys=[0], width=26)
    [[0, 1, 2], [0, 3]]
    """
    tables = [list(keys)]
    for i in range(len(widths)):
        if i in keys:
            continue
        wanted = sorted([*tables[-1], i])
        fits = sum(widths[j] for j in wanted) + GAP * (len(wanted) - 1) <= width
        if fits or len(tables[-1]) == len(keys):
            tables[-1] = wanted
        else:
            tables.append(sorted([*keys, i]))
    return tables


def share(least: Sequence[int], most: Sequence[int], width: int) -> list[int]:
    """Widths from `least` towards `most` that, with the gaps, fill at most `width`.

    rich's own division goes by proportion, and may cut a number to keep a heading on one line.

    >>> share([4, 4], most=[4, 9], width=12)
    [4, 6]
    """
    widths = list(least)
    spare = width - sum(least) - GAP * (len(least) - 1)
    while spare > 0 and widths != list(most):
        for i, limit in enumerate(most):
            if widths[i] < limit and spare > 0:
                widths[i] += 1
                spare -= 1
    return widths


def _grid(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int, encoding: str
) -> Table:
    cells = [[row[i] for row in rows] for i in range(len(columns))]
    described = list(zip(columns, cells, strict=True))
    least = [floor(column, texts) for column, texts in described]
    most = [max(map(cell_len, [column.name, *texts])) for column, texts in described]
    table = Table(
        box=box.SIMPLE_HEAD if encoding.startswith("utf") else box.ASCII_DOUBLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, GAP - 1, 0, 0),  # the box itself draws the other blank
        header_style="bold",
    )
    for column, chosen in zip(columns, share(least, most, width), strict=True):
        # Beside headings of more lines it stands at the bottom, cells of rows at the top.
        heading = Align(Text(column.name), column.justify, vertical="bottom")
        table.add_column(heading, justify=column.justify, style=column.style, width=chosen)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
