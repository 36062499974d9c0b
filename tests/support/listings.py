"""What README and docs show as printed by a command, found, compared and printed again.

A listing is a fenced block below a comment that says how it was printed:

    <!-- printed at 80 columns: kvtool verify-cache --self-test -->

or "printed at 80 columns, figures vary: ..." where figures depend on the machine. A line "..." in
it stands for lines left out. Below

    <!-- lines of docs/bench.md -->

are lines that stand in a listing of that page.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "weights" / "README.md"]
FENCED = re.compile(r"^```(?:console|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LISTED = re.compile(
    r"^<!-- printed at (\d+) columns(, figures vary)?: kvtool (.+) -->\n(?=```)", re.MULTILINE
)
QUOTED = re.compile(r"^<!-- lines of (\S+) -->\n(?=```)", re.MULTILINE)
BY_HAND = re.compile(r"^<!-- by hand: (\S.*) -->\n(?=```)", re.MULTILINE)  # and what it needs
SECONDS = re.compile(r"\(\d+ s\)")
# Of a right cache, the processor decides: on some, other shapes give the same bits.
RIGHT = re.compile(r"\b(?:identical, rounding|identical|rounding) +")
FIGURE = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?x?(?![\w.]*\w)(?! more\b)")
LEFT_OUT = "..."


class Listing(NamedTuple):
    page: Path
    command: str  # without "kvtool"
    columns: int
    varies: bool  # whether figures depend on the machine
    text: str  # what is printed, without the line of the command
    first: str  # that line, if it is shown

    def __str__(self) -> str:
        return f"{self.page.name}: {self.command}"


def listings() -> list[Listing]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in LISTED.finditer(text):
            fenced = FENCED.match(text, match.end())
            assert fenced is not None, f"{page.name}: no console or text below {match[0]}"
            lines = fenced[1].splitlines(keepends=True)
            first = lines.pop(0) if lines[0].startswith("$ ") else ""
            columns, varies = int(match[1]), bool(match[2])
            found.append(Listing(page, match[3], columns, varies, "".join(lines), first))
    return found


def quoted(page: Path) -> list[tuple[Path, list[str]]]:
    """The lines that a page quotes, and the page that they are of."""
    text = page.read_text(encoding="utf-8")
    return [
        (ROOT / match[1], found[1].splitlines())
        for match in QUOTED.finditer(text)
        if (found := FENCED.match(text, match.end())) is not None
    ]


def unlisted() -> list[str]:
    """Commands shown with what they print, and without a comment that says how."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        known = {
            match.end() for marks in (LISTED, QUOTED, BY_HAND) for match in marks.finditer(text)
        }
        for fenced in FENCED.finditer(text):
            lines = fenced[1].splitlines()
            printed = [line for line in lines if not line.startswith("$ ")]
            if lines[0].startswith("$ kvtool") and printed and fenced.start() not in known:
                found.append(f"{page.name}: {lines[0]}")
    return found


def form(text: str, varies: bool) -> list[str]:
    """The lines of a listing without what may differ from run to run.

    Where figures vary, so do the widths of columns: blanks count as one, and a heading's words may
    be on any of its lines.
    """
    lines = [SECONDS.sub("(# s)", line.rstrip()) for line in text.strip("\n").splitlines()]
    if not varies:
        return [RIGHT.sub("right ", line) for line in lines]
    lines = [" ".join(FIGURE.sub("#", re.sub("─+", "─", line)).split()) for line in lines]
    found: list[str] = []
    for line in lines:
        if line == "─":
            heading: list[str] = []
            while found and found[-1]:
                heading += found.pop().split()
            found.append(" ".join(sorted(heading)))
        found.append(line)
    return found


def same(listing: Listing, printed: str) -> bool:
    """Whether a command has printed what is listed."""
    found = form(printed, listing.varies)
    head, left_out, tail = listing.text.partition(f"{LEFT_OUT}\n")
    if not left_out:
        return found == form(listing.text, listing.varies)
    first, last = form(head, listing.varies), form(tail, listing.varies)
    return found[: len(first)] == first and found[-len(last) :] == last


def difference(listing: Listing, printed: str) -> str:
    """A diff of what is listed and what was printed, as far as they are compared; the remedy."""
    listed, found = (form(text, listing.varies) for text in (listing.text, printed))
    diff = difflib.unified_diff(listed, found, "listed", "printed", n=0, lineterm="")
    word = "self-test" if "--self-test" in listing.command else listing.command.split()[0]
    remedy = f"python -m pytest tests/project/test_listings.py --update-listings {word}"
    return "\n".join([f"{listing} prints something else", *diff, f"If that is right: {remedy}"])


def printed_by(listing: Listing, folder: Path) -> str:
    """What the command prints now, run as a user runs it."""
    (folder / "docs").symlink_to(ROOT / "docs")
    ran = subprocess.run(
        [sys.executable, "-m", "kvtool", *shlex.split(listing.command)],
        cwd=folder,
        env={**os.environ, "COLUMNS": str(listing.columns), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert ran.returncode in (0, 1), f"{listing}: exit {ran.returncode}"
    return "".join(line.rstrip() + "\n" for line in ran.stdout.strip("\n").splitlines())


def update(listing: Listing, printed: str) -> None:
    """Put what was printed in the place of what is listed; where lines were left out, the first
    paragraph, if there is a head, and as many of the last lines as there are."""
    head, left_out, tail = listing.text.partition(f"{LEFT_OUT}\n")
    if left_out:
        lines = printed.splitlines(keepends=True)
        last = "".join(lines[-len(tail.splitlines()) :])
        first = printed.partition("\n\n")[0] + "\n" if head else ""
        printed = first + left_out + last
    page = listing.page.read_text(encoding="utf-8")
    before, after = (f"{listing.first}{text}```\n" for text in (listing.text, printed))
    assert page.count(before) == 1, listing
    page = page.replace(before, after)
    for old, new in zip(SUMMARY.findall(listing.text), SUMMARY.findall(printed), strict=True):
        page = page.replace(f"\n{old}:\n", f"\n{new}:\n")
    listing.page.write_text(page, encoding="utf-8")


SUMMARY = re.compile(r"^✓ (.+)$", re.MULTILINE)  # a conclusion, which the page may say before
