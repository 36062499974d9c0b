"""The prompts for a server: the user's own, or built-in ones of many kinds."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvtool.core.servers.client import Refused
from kvtool.core.servers.engine import MAX_ID, Engine
from kvtool.errors import FileError
from kvtool.reading import parse_json, read_text

MAX_FILE_BYTES = 2**24  # bytes of a file of prompts
LINE_END = re.compile(r"\r\n?|\n")  # others, as U+2028, may stand in a prompt
MIN_TOKENS = 12  # of a prompt; shorter ones leave nothing to share
DRAWN = 6  # ids that a server without a tokenizer is made to go on from

# Cut to these many tokens. With the tail behind them they stand on both sides of 64 tokens, where
# kernels change: llama.cpp's flash attention has another one for 64 queries or more.
LENGTHS = (44, 53, 47, 58, 50)

TEXTS = (
    "The history of the lighthouse begins long before electricity. Sailors trusted fires that were "
    "lit on hills, and later towers of stone with lamps of oil, whose keepers climbed the stairs "
    "every evening to trim the wick, to polish the glass and to write down what the weather did.",
    "def merge(a, b):\n    # merges two sorted lists into one\n    result = []\n    i = j = 0\n"
    "    while i < len(a) and j < len(b):\n        if a[i] <= b[j]:\n            result.append("
    "a[i])\n            i += 1\n        else:\n            result.append(b[j])\n"
    "            j += 1\n",
    "Once upon a time there was a small town by the sea where every clock showed a different hour, "
    "and nobody minded, because the baker rose with the first of them and the fishermen with the "
    "last. Then one morning a stranger came, who carried a clock of her own under the arm.",
    "year, city, rain in mm, days of sun\n1998, Bergen, 2250, 61\n1999, Bergen, 2417, 58\n2000, "
    "Lisbon, 774, 203\n2001, Lisbon, 812, 199\n2002, Quito, 1118, 142\n2003, Quito, 1067, 150\n",
    "Q: A train leaves at a quarter past nine and needs three hours and fifty minutes. When does "
    "it arrive?\nA: At five past one.\nQ: What is the capital of Australia, and why is it not the "
    "largest city?\nA: Canberra, since neither Sydney nor Melbourne would let the other have it.\n",
    '{"name": "kettle", "price": 24.5, "colours": ["red", "black"], "stock": {"north": 12, "south":'
    ' 0}, "reviews": [{"stars": 5, "text": "boils fast"}, {"stars": 2, "text": "it fell off"}]}',
    "Les voyageurs arrivèrent à la gare avant l'aube. Il faisait froid, et le marchand de café "
    "n'avait pas encore ouvert sa boutique. On attendait le premier train pour la côte, qui avait "
    "du retard, comme toujours au mois de novembre quand la brume descend sur les rails.",
    "Theorem. Every bounded monotone sequence of real numbers converges. Proof. Let a_n be "
    "increasing and bounded above, and let s be the least upper bound of its values. For every "
    "epsilon > 0 there is an index N with a_N > s - epsilon, and so for all n > N we have",
)


def read_prompts(path: Path, warn: Callable[[str], None]) -> list[str | list[int]]:
    """One prompt a line: a text, or if every line is JSON, a string or a list of ids.

    warn: is called if lines are left out, with why. Raises FileError.
    """
    lines = LINE_END.split(read_text(path, "prompts, one a line", "--prompts", MAX_FILE_BYTES))
    first = {line: number for number, line in reversed([*enumerate(lines, 1)]) if line.strip()}
    filled = sorted((number, line) for line, number in first.items())
    if not filled:
        raise FileError(f"--prompts {path}: has no line with a prompt")
    if repeated := sum(bool(line.strip()) for line in lines) - len(filled):
        warn(
            f"--prompts: left out {repeated} of {repeated + len(filled)} lines, which repeat others"
        )
    if not all(line.lstrip()[0] in '"[' for _, line in filled):
        return [line for _, line in filled]
    return [_json_prompt(path, number, line) for number, line in filled]


def _json_prompt(path: Path, number: int, line: str) -> str | list[int]:
    where = f"--prompts {path}: line {number}"
    try:
        found = parse_json(line)
    except ValueError as error:
        raise FileError(f"{where} is not valid JSON ({error})") from error
    if isinstance(found, str) and found:
        if any("\ud800" <= c <= "\udfff" for c in found):
            raise FileError(f"{where}: has half of a surrogate pair, which is no text")
        return found
    if isinstance(found, list) and found and all(_is_id(i) for i in found):
        return found
    raise FileError(f"{where}: found {json.dumps(found)[:40]} (expected a text, or a list of ids)")


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_ID


def built_in(engine: Engine, n: int) -> list[list[int]]:
    """The ids of `n` built-in prompts; if the server has no tokenizer, texts of its own making.

    Raises ServerError.
    """
    try:
        return [_cut(engine.tokenize(TEXTS[i % len(TEXTS)]), i) for i in range(n)]
    except Refused:
        pass
    return [_made(engine, LENGTHS[i % len(LENGTHS)], i) for i in range(n)]


def _cut(ids: list[int], i: int) -> list[int]:
    """The first ids, as many as the i-th prompt has. A second round begins further behind."""
    start = i // len(TEXTS) * 5
    return [*ids[:1], *ids[1 + start :]][: LENGTHS[i % len(LENGTHS)]]


def _made(engine: Engine, length: int, seed: int) -> list[int]:
    """A prompt without a tokenizer: low ids, which every vocabulary has, and the server's
    continuation."""
    draws = random.Random(seed)
    ids = [draws.randrange(1, 50) for _ in range(DRAWN)]
    return [*ids, *engine.complete(ids, length - DRAWN).tokens]


def ids_of(engine: Engine, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    """The ids of prompts. Raises ServerError, and FileError for a prompt that is too short."""
    found = [engine.tokenize(p) if isinstance(p, str) else p for p in prompts]
    for number, ids in enumerate(found, 1):
        if len(ids) < MIN_TOKENS:
            found_n = f"{len(ids)} tokens (expected {MIN_TOKENS} or more)"
            raise FileError(f"--prompts: prompt {number} has {found_n}")
    return found
