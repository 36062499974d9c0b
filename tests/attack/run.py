"""Attack kvtool by the files that strangers hand over, and say what was held.

    make attack

First what was thought of, each as a command in a process of its own; then thousands of mutants of
sound folders and files. Written into docs/security.md; ends with 1 if anything was not held.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attacks_around  # noqa: F401
import attacks_files  # noqa: F401
import attacks_runs  # noqa: F401
import attacks_sizes  # noqa: F401
import attacks_tokenizers  # noqa: F401
import attacks_weights  # noqa: F401
from arena import ATTACKS, Arena, Attack
from storm import Storm, storm
from subjects import Subject, make_subjects

from kvtool import app

DOC = Path(__file__).parents[2] / "docs" / "security.md"
BEGIN, END = "<!-- written by make attack -->", "<!-- end -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--only", default="", help="attacks whose name or kind has this text")
    parser.add_argument("--no-doc", action="store_true", help="leave docs/security.md as it is")
    asked = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a forked process would wait for its threads
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        subjects = _quietly_made(root / "sound")
        chosen = [a for a in ATTACKS if asked.only in f"{a.kind} {a.name}"]
        started = time.monotonic()
        failed = _tried(chosen, root, asked.jobs)
        seconds = time.monotonic() - started
        found = storm(subjects, asked.mutants, root / "storm", asked.jobs, asked.first, _tell)
    table = report(chosen, failed, found, seconds)
    print(table)
    for line in (*failed.values(), *found.escapes):
        print(f"NOT HELD: {line}")
    if not (asked.no_doc or asked.only):
        before, _, rest = DOC.read_text().partition(BEGIN)
        DOC.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{rest.partition(END)[2]}")
    return 1 if failed or found.escapes else 0


def _quietly_made(root: Path) -> list[Subject]:
    """The sound files. Each command is run once, so that forked processes find all loaded."""
    root.mkdir()
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for handle in (1, 2):
        os.dup2(nowhere, handle)
    try:
        subjects = make_subjects(root)
        codes = {s.name: app.run(s.argv(s.copied(root / "tried"))) for s in subjects}
        sys.stdout.flush()
    finally:
        for handle, old in zip((1, 2), kept, strict=True):
            os.dup2(old, handle)
    if any(codes.values()):
        raise RuntimeError(f"a sound subject was not read: {codes}")
    return subjects


def _tried(attacks: Sequence[Attack], root: Path, jobs: int) -> dict[int, str]:
    """The attacks that were not held, by their place in the list, and why."""

    def one(number: int) -> str:
        arena = Arena(root / f"a{number}" / "here", root / "sound")
        try:
            return arena.why_not_held(attacks[number].prepare(arena))
        except Exception as error:
            return f"the attack itself failed: {error!r}"

    failed = {}
    with ThreadPoolExecutor(jobs) as pool:
        for number, why in enumerate(pool.map(one, range(len(attacks)))):
            attack = attacks[number]
            if why:
                failed[number] = f"{attack.kind}: {attack.name}: {why}"
                print(f"  not held: {failed[number]}", flush=True)
    return failed


def _tell(n: int) -> None:
    if n % 1000 == 0:
        print(f"  {n:,} mutants", flush=True)


def report(attacks: Sequence[Attack], failed: dict[int, str], found: Storm, seconds: float) -> str:
    """Two tables in Markdown."""
    kinds = list(dict.fromkeys(attack.kind for attack in attacks))
    lines = ["| kind of attack | tried | held |", "|---|--:|--:|"]
    for kind in kinds:
        numbers = [n for n, attack in enumerate(attacks) if attack.kind == kind]
        held = sum(n not in failed for n in numbers)
        lines.append(f"| {kind} | {len(numbers)} | {held} |")
    lines.append(f"| **all**, {seconds:,.0f} s | {len(attacks)} | {len(attacks) - len(failed)} |")
    lines += ["", "| mutants of | loaded | answered no | refused | neither |"]
    lines.append("|---|--:|--:|--:|--:|")
    columns = ("loaded", "answered no", "refused", "escaped")
    for subject, counts in sorted(found.counts.items()):
        lines.append(f"| {subject} | {' | '.join(f'{counts[c]:,}' for c in columns)} |")
    totals = [sum(counts[c] for counts in found.counts.values()) for c in columns]
    lines.append(
        f"| **all {sum(totals):,}**, {found.seconds:,.0f} s | "
        f"{' | '.join(f'{total:,}' for total in totals)} |"
    )
    lines += ["", f"The slowest mutant took {found.slowest:.1f} s of a processor, the largest "
              f"{found.largest / 2**20:,.0f} MiB more than the libraries do."]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
