"""How plan shows what it found."""

from __future__ import annotations

from typing import Any

from kvtool.commands.bench.formatting import listed, tokens
from kvtool.commands.plan.report import PlanReport, Row, named
from kvtool.commands.plan.sizes import shown
from kvtool.config import LARGEST_SIZE
from kvtool.ui.output import Output
from kvtool.ui.tables import Column


def show(report: PlanReport, out: Output) -> None:
    """The layers in words, a row for each cache, and the conclusion."""
    assumed = " assumed" if report.dtype_assumed else ""
    out.text(f"{report.model}: {layers_text(report.layers)}; {report.dtype}{assumed}")
    out.text(weights_text(report))
    if report.expanded_token_bytes:
        out.text(latent_text(report))
    several = len({row.impl for row in report.caches}) > 1
    columns = [
        Column("cache", "left", key=True),
        *[Column("impl", "left", key=True)] * several,
        Column("bytes"),
        Column("size", spare=1),
        Column("a token"),
        *[Column("most rows"), Column("most tokens")] * (report.memory is not None),
        *[Column("ms at least"), Column("tokens/s")] * (report.bandwidth is not None),
    ]
    rows = [_cells(row, report, several) for row in report.caches]
    out.table(f"Keys and values of {report.asked}", columns, rows)
    for sentence in (*page_texts(report), *peak_texts(report)):
        out.text(sentence)
    out.verdict(None if report.exit_code else True, report.conclusion)


def _cells(row: Row, report: PlanReport, several: bool) -> list[str]:
    cells = [row.cache, *[row.impl] * several, f"{row.bytes:,}", shown(row.bytes)]
    cells.append(f"{row.bytes_per_token:,}")
    if report.memory is not None:
        cells += [_most(row.most_rows), _most(row.most_tokens)]
    if row.floor_s is not None:
        cells += [milliseconds(row.floor_s), f"{report.rows_planned / row.floor_s:,.0f}"]
    return cells


def milliseconds(seconds: float) -> str:
    """With three digits.

    >>> milliseconds(0.0641), milliseconds(0.041), milliseconds(1.3425), milliseconds(0.0000021)
    ('64.1', '41.0', '1,342', '0.0021')
    """
    ms = 1000 * seconds
    if ms < 0.1:
        return f"{ms:.2g}"
    return f"{ms:,.{0 if ms >= 100 else 1 if ms >= 10 else 2}f}"


def _most(n: int | None) -> str:
    return "any" if n == LARGEST_SIZE else f"{n:,}"


def layers_text(layers: list[dict[str, Any]]) -> str:
    """How many layers keep what.

    >>> layers_text([{"layers": 2, "n_heads": 8, "key_dim": 64, "value_dim": 64, "window": 0}])
    '2 layers of 8 key-value heads of 64'
    """
    found = []
    for row in layers:
        what = f"{row['layers']} layer{'s' if row['layers'] != 1 else ''}"
        if not row["n_heads"]:
            found.append(f"{what} that use the keys of others")
            continue
        if not row["value_dim"]:
            found.append(f"{what} of a latent of {row['key_dim']}")
            continue
        width = str(row["key_dim"])
        if row["value_dim"] != row["key_dim"]:
            width += f" and {row['value_dim']}"
        heads = "heads" if row["n_heads"] != 1 else "head"
        window = f" (window {row['window']:,})" if row["window"] else ""
        found.append(f"{what} of {row['n_heads']} key-value {heads} of {width}{window}")
    return listed(found)


def weights_text(report: PlanReport) -> str:
    """How large the weights are, and who says so."""
    if report.weights_bytes is None:
        return f"weights: not counted, as {report.weights_unknown}"
    said = {
        "headers": "by the file's header",
        "configuration": "counted from the configuration",
        "configuration of the language model": "of the language model, counted; its other parts "
        "are not",
        "option": "as given",
    }[report.weights_said_by]
    return f"weights: {report.weights_bytes:,} bytes, {shown(report.weights_bytes)}, {said}"


def latent_text(report: PlanReport) -> str:
    """What a latent saves."""
    n = report.expanded_token_bytes
    assert n is not None
    return f"expanded to the keys and values of all heads, a token would take {n:,} bytes"


def page_texts(report: PlanReport) -> list[str]:
    """What pages take besides."""
    return [
        f"{row.cache}: {row.pages:,} pages, a table of {shown(row.table_bytes)}, and "
        f"{shown(row.waste_bytes)} of the last pages empty"
        for row in report.caches
        if row.pages is not None and row.table_bytes is not None and row.waste_bytes is not None
    ]


def peak_texts(report: PlanReport) -> list[str]:
    """What a long prompt takes for a moment."""
    return [
        f"{named(row)}: right after a prompt of {tokens(report.tokens)} it holds "
        f"{shown(row.peak_bytes)}, until the next step cuts its windows: that must fit"
        for row in report.caches
        if row.peak_bytes > row.bytes
    ]
