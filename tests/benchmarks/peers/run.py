"""Time kvtool, transformers and llama.cpp on the same weights; write the tables and the figure.

    make peers

llama.cpp is the one in the package xllamacpp, which the tests install.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
from figure import draw
from measure import Series, in_turns, make_large, make_model, make_series, measure

from kvtool.core.bench.timing import iqr
from kvtool.ui.environment import environment

DOCS = Path(__file__).parents[3] / "docs"
LENGTHS = [10, 50, 100, 500, 1000]
N_PROMPT = 8
LONG_PROMPT = 1000  # tokens, of which the reading is timed
LARGE = {1: 512, 8: 128}  # rows of the large model, and the prompt of each
LARGE_NEW, LARGE_ROUNDS = 33, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--output", type=Path, default=DOCS)
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)  # before minutes of measuring
    found: dict[int, list[Series]] = {}
    text = [introduction(asked.rounds)]
    for threads in asked.threads:
        torch.set_num_threads(threads)
        found[threads] = one_count(threads, asked.lengths, asked.rounds)
        reading = one_count(threads, [1], asked.rounds, LONG_PROMPT)
        text.append(section(threads, found[threads], reading))
        print(text[-1])
    text.append(large_section(asked.threads, min(asked.rounds, LARGE_ROUNDS)))
    print(text[-1])
    (asked.output / "peers.md").write_text("\n".join(text))
    first = asked.threads[0]
    draw(asked.output / "peers.png", found[first], first)


def one_count(
    threads: int, lengths: Sequence[int], rounds: int, n_prompt: int = N_PROMPT
) -> list[Series]:
    """All subjects with a number of threads, measured behind a prompt."""
    model = make_model(n_prompt + max(lengths) + 32)
    prompt = torch.randint(model.config.vocab_size, (1, n_prompt))
    with (
        tempfile.TemporaryDirectory() as folder,
        make_series(model, prompt, threads, Path(folder)) as series,
    ):
        measure(series, lengths, rounds, tell)
    return series


def tell(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr)


def large_section(counts: Sequence[int], rounds: int) -> str:
    """The tables of a model of 135 million weights."""
    rows = ", ".join(f"{b} row{'s' * (b > 1)} behind {n} tokens" for b, n in LARGE.items())
    tables = [
        large_table(threads, batch, n, rounds) for threads in counts for batch, n in LARGE.items()
    ]
    introduced = f"""## A model of 135 million weights

Random weights in the shape of SmolLM2-135M (Llama's form, 30 layers of 576), float32: {rows}, and
{LARGE_NEW - 1} tokens decoded. Medians of {rounds} rounds in turns, and the distance between the
quartiles.
"""
    return "\n".join([introduced, *tables])


def large_table(threads: int, batch: int, n_prompt: int, rounds: int) -> str:
    """Tokens of the prompt a second, and the time of a step, for a number of rows."""
    torch.set_num_threads(threads)
    model = make_large(n_prompt + LARGE_NEW + 32)
    prompt = torch.randint(model.config.vocab_size, (batch, n_prompt))
    with (
        tempfile.TemporaryDirectory() as folder,
        make_series(model, prompt, threads, Path(folder), "llama") as series,
    ):
        runs = in_turns(series[:-1], LARGE_NEW, rounds, tell)
    cells = {
        name: [
            spread([n_prompt * batch / run.prefill_s for run in found]),
            spread([run.decode_s / (LARGE_NEW - 1) * 1e3 for run in found], 1),
        ]
        for name, found in runs.items()
    }
    words = f"{threads} thread{'s' * (threads > 1)}, {batch} row{'s' * (batch > 1)}"
    return table(words, ["prompt, tokens/s", "a step, ms"], cells)


def spread(values: Sequence[float], digits: int = 0) -> str:
    """The median and the distance between the quartiles."""
    return f"{median(values):,.{digits}f} ± {iqr(values):,.{digits}f}"


def introduction(rounds: int) -> str:
    """The conditions, in words."""
    env = environment()
    llama = f"llama.cpp of xllamacpp {installed('xllamacpp')}"
    peers = f"transformers {installed('transformers')}, {llama}"
    return f"""# How fast is kvtool beside transformers and llama.cpp?

Written by `make peers`: the same random weights in GPT-2's form (2 layers, width 256, 8 heads,
vocabulary 4,096, float32) in every program, batch 1, a prompt of {N_PROMPT} tokens, greedy. All
generate the same tokens. Microseconds per token of a whole run, prompt and allocation included:
medians of {rounds} rounds, in which the programs take turns, another one first in each; behind ±
the distance between the quartiles, and where that is over a quarter of the median, no figure:
something else had the processor. What a program makes of a model once is not in them: loading
it, or kvtool's table of addresses. llama.cpp is asked as a server, and its times are its own: HTTP
is not in them, what its loop does for each token is. The floor is the time of one token's matrix
products, and of reading its keys and values, each in one call of compiled code.

{env["cpu"]}, torch {env["torch"]}, {peers}.
"""


def installed(name: str) -> str:
    """The version of a package, if it is there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def section(threads: int, series: Sequence[Series], reading: Sequence[Series]) -> str:
    """The tables for a number of threads."""
    floor, ours = series[-1], series[0]
    title = "One thread" if threads == 1 else f"{threads} threads"
    times = {each.name: [time(each, n) for n in each.samples] for each in series}
    ratios = {each.name: [ratio(each, ours, n) for n in each.samples] for each in series[1:-1]}
    ratios["kvtool dynamic, times the floor"] = [ratio(ours, floor, n) for n in ours.samples]
    prompts = {each.name: [time(each, 1, 1000)] for each in reading[:-1]}
    lengths = [f"n = {n:,}" for n in ours.samples]
    tables = [
        table("µs per token", lengths, times),
        table("times kvtool dynamic", lengths, ratios),
        table(f"a prompt of {LONG_PROMPT:,} tokens and the first token", ["ms"], prompts),
    ]
    return "\n".join([f"## {title}\n", *tables])


def time(series: Series, length: int, unit: int = 1) -> str:
    """The median and the distance between the quartiles, in so many microseconds."""
    if not series.quiet(length):
        return "disturbed"
    digits = 0 if unit == 1 else 1
    median, iqr = series.median(length) / unit, series.iqr(length) / unit
    return f"{median:,.{digits}f} ± {iqr:,.{digits}f}"


def ratio(above: Series, below: Series, length: int) -> str:
    """How many times as long one takes as another."""
    if not (above.quiet(length) and below.quiet(length)):
        return "disturbed"
    return f"{above.median(length) / below.median(length):.2f}"


def table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table of Markdown, with a name before each row."""
    lines = [[title, *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *cells] for name, cells in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
