"""A report as one page of HTML that needs nothing else: what is told in a terminal, in tables that
sort, with the plot and all settings. Its only script is the one below; names and texts are text."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from kvtool.ui.cases import flat
from kvtool.ui.environment import caption
from kvtool.ui.inert import in_a_line
from kvtool.ui.tables import Column

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --line: #d9dce1; --soft: #5d6570;
  --head: #f4f5f7; --right: #0a6b3d; --wrong: #b3261e; --open: #7a5600; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --paper: #15171a; --line: #363b42;
  --soft: #a0a8b3; --head: #1e2126; --right: #5fd39a; --wrong: #ff8a80; --open: #f0c25c; }
  figure svg { filter: invert(1) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; margin: .5rem 0 0; }
h2 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
.about, .note { color: var(--soft); margin: .2rem 0 1rem; overflow-wrap: anywhere; }
.verdict { border-left: 4px solid; padding: .4rem .8rem; background: var(--head);
  overflow-wrap: anywhere; }
.right { border-color: var(--right); } .right b { color: var(--right); }
.wrong { border-color: var(--wrong); } .wrong b { color: var(--wrong); }
.open { border-color: var(--open); } .open b { color: var(--open); }
.told { margin: .3rem 0; overflow-wrap: anywhere; } .more { margin-left: 1.2rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: separate; border-spacing: 0; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
td { white-space: nowrap; } td.prose { white-space: normal; min-width: 14rem; }
tbody tr:last-child td { border-bottom: 0; }
th { background: var(--head); font-weight: 600; white-space: nowrap; }
td.key { position: sticky; left: 0; background: var(--paper); }
.number { text-align: right; } .middle { text-align: center; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0;
  cursor: pointer; text-align: inherit; }
th button::after { content: " \\2195"; color: var(--soft); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
figure { margin: 1.6rem 0; overflow-x: auto; }
figure svg { height: auto; max-width: 100%; min-width: 38rem; display: block; }
summary { cursor: pointer; margin: 1.6rem 0 .5rem; font-weight: 600; }
.facts td { white-space: normal; overflow-wrap: anywhere; } .facts td:first-child { width: 16rem; }
@media (max-width: 40rem) { body { font-size: 14px; } main { padding: .7rem; }
  th, td { padding: .25rem .45rem; } .facts td:first-child { width: 9rem; } }
"""
SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentNode, body = head.closest("table").tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => {
    const text = row.cells[head.cellIndex].textContent.trim();
    const number = text.replace(/,/g, "").match(/^[+-]?[0-9]+([.][0-9]+)?(e[+-]?[0-9]+)?/i);
    return /^(-$|~)/.test(text) ? [2, 0] : number ? [0, Number(number[0])] : [1, text];
  };
  const order = ([a, x], [b, y]) => a - b || (a === 1 ? x.localeCompare(y) : x - y) * (up ? 1 : -1);
  const rows = [...body.rows].map(row => [key(row), row]);
  rows.sort((one, other) => order(one[0], other[0]));
  for (const [, row] of rows) body.append(row);
};
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{}'"
MARKS = {True: ("right", "✓"), False: ("wrong", "✗"), None: ("open", "!")}
SIDES = {"right": "number", "center": "middle", "left": ""}
LONG = 32  # letters; a longer cell may wrap
# What an SVG needs in a file of its own only, and texts, which are drawn as shapes.
ALONE = re.compile(r"<!--.*?-->|<metadata>.*?</metadata>|\sxmlns(:\w+)?=\"[^\"]*\"", re.DOTALL)

Draw = Callable[[Any, Path], object]


class Told:
    """Stands in for Output where a report is shown: keeps what it is told, as HTML."""

    def __init__(self, sorts: bool = True) -> None:
        self.sorts = sorts  # where the page has the script for it
        self.verdicts: list[str] = []
        self.texts: list[str] = []  # stand above the tables, which may be long
        self.tables: list[str] = []
        self.caption = ""  # what the tables are of
        self.json = self.quiet = False
        self.verbose = True

    def table(
        self, title: str, columns: Sequence[Column | str], rows: Sequence[Sequence[str]]
    ) -> None:
        """Keep a table."""
        if title:
            self.tables.append(f"<h2>{line(title)}</h2>")
        self.tables.append(table(columns, rows, self.sorts))

    def text(self, text: str = "", style: str = "", end: str = "\n", wrap: bool = True) -> None:
        """Keep a paragraph; one that begins with blanks belongs to that above."""
        if text:
            kind = "told more" if text.startswith(" ") else "told"
            self.texts.append(f'<p class="{kind}">{line(text.strip())}</p>')

    def verdict(self, ok: bool | None, text: str) -> None:
        """Keep a verdict, which goes to the top."""
        kind, mark = MARKS[ok]
        self.verdicts.append(f'<p class="verdict {kind}"><b>{mark}</b> {line(text)}</p>')

    def note(self, text: str) -> None:
        """Keep a remark."""
        self.texts.append(f'<p class="note">{line(text)}</p>')

    hint = detail = warn = note


def line(text: str) -> str:
    """Any text as a line of HTML that shows it and means nothing.

    >>> line("<a href='x'>\\n")
    '&lt;a href=&#x27;x&#x27;&gt;\\\\n'
    """
    return escape(in_a_line(text))


def table(
    columns: Sequence[Column | str], rows: Sequence[Sequence[str]], sorts: bool = True
) -> str:
    """A table; what is wider than the screen scrolls below its own border."""
    named = [Column(each, "left") if isinstance(each, str) else each for each in columns]
    sides = [SIDES[column.justify] for column in named]
    if keys := [i for i, column in enumerate(named) if column.key]:
        sides[keys[-1]] += " key"
    heads = (
        f'<th scope="col" class="{side.strip()}">'
        + (f'<button type="button">{line(column.name)}</button>' if sorts else line(column.name))
        + "</th>"
        for column, side in zip(named, sides, strict=True)
    )
    body = "\n".join("<tr>" + "".join(map(_cell, row, sides)) + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table>\n<thead><tr>{"".join(heads)}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(text: str, side: str) -> str:
    kind = f"{side} prose".strip() if len(text) > LONG else side.strip()
    return f'<td class="{kind}">{line(text)}</td>' if kind else f"<td>{line(text)}</td>"


def told_by(show: Callable[[Any, Any], object], report: Any) -> Told:
    """What a report is shown as, every row of it."""
    told = Told()
    if hasattr(report, "verbose"):
        report = dataclasses.replace(report, verbose=True)
    show(report, told)
    return told


def picture(draw: Draw, report: Any) -> str:
    """The plot of a report as an SVG to stand in a page; "" if nothing was drawn."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plot.svg"
        draw(report, path)
        if not path.exists():
            return ""
        text = path.read_text(encoding="utf-8")
    return ALONE.sub("", text[text.index("<svg") :])


def to_page(content: Mapping[str, Any], told: Told, svg: str = "") -> str:
    """The page of a document, of what was told and a plot."""
    title = str(content["schema"]).removesuffix("/1").replace(".", " ", 1)
    about = told.caption or caption(content["measured_on"])
    facts = list(flat(content, ("settings", "resolved", "environment")))
    plot = f'<figure role="img" aria-label="The plot of the result">{svg}</figure>' if svg else ""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    settings = table(["setting", "value"], facts, sorts=False)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{escape(POLICY.format(digest))}">
<title>{line(title)}</title>
<style>{STYLE}</style>
</head>
<body><main>
<h1>{line(title)}</h1>
<p class="about">{line(about)}</p>
{"".join(told.verdicts)}
{chr(10).join([*told.texts, *told.tables])}
{plot}
<details><summary>Settings and versions</summary>
<div class="facts">{settings}</div></details>
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""
