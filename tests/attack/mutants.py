"""Files with one random fault or a few, each made from a number: what a stranger, a bad disk or a
slip of the hand may leave. The same number makes the same fault.

A fault is in the bytes, in what JSON says (also within the header of safetensors), or in what lies
under a name: nothing, a folder, a link, a FIFO, another of the files, a great hole.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOLE = 3 * 2**30  # bytes that a sparse file claims to have
ODD_NAMES = ("", "..", "../x", "/etc/passwd", "\x1b[31mred", "a\nb", "'", "$\\frac{", "é", "\u202e")
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**62, 2**64, -(2**63), 0.0, -0.5,
    1e-40, 1e308, "0", "llama", [], {}, [[]], [0], [-1], [2**62], {"a": 1}, [None], *ODD_NAMES,
)  # fmt: skip
ODD_TEXTS = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 5000, '{"a":1,"a":2}', "")


def mutate(folder: Path, names: list[str], seed: int) -> str:
    """Put one to three faults into the files `names` of a folder -> what was done, in words."""
    rng = random.Random(seed)
    said = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = folder / rng.choice(names)
        kind = rng.choice(KINDS)
        if not _whole(path):
            continue  # an earlier fault took it away
        said.append(f"{path.name}: {kind(path, rng) or kind.__name__}")
    return "; ".join(said) or "nothing"


def _whole(path: Path) -> bool:
    return not path.is_symlink() and path.is_file() and path.stat().st_size < HOLE


def bytes_changed(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if data:
            # Headers are at the front, a zip's directory at the end.
            n, near = len(data), rng.choice((0, 64, 512, 4096))
            place = rng.randrange(n) if not near else rng.randrange(min(near, n))
            place = n - 1 - place if rng.random() < 0.3 else place
            data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    path.write_bytes(data)
    return "bytes changed"


def bytes_moved(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    b = min(b, a + rng.choice((1, 8, 100, 10_000)))
    way = rng.choice(("cut out", "doubled", "cut off", "appended", "inserted"))
    path.write_bytes(
        {
            "cut out": data[:a] + data[b:],
            "doubled": data[:b] + data[a:],
            "cut off": data[:a],
            "appended": data + data[a:b],
            "inserted": data[:a] + rng.randbytes(rng.choice((1, 8, 100))) + data[a:],
        }[way]
    )
    return f"bytes {way}"


def json_changed(path: Path, rng: random.Random) -> str:
    """Change a value, a name, or a text that stands for a value; other files get other bytes."""
    data = path.read_bytes()
    header = path.suffix == ".safetensors"
    length = int.from_bytes(data[:8], "little") if header else 0
    try:
        tree = json.loads(data[8 : 8 + length] if header else data)
    except (ValueError, RecursionError):
        return bytes_changed(path, rng)
    places = list(_places(tree))
    if not places:
        return bytes_changed(path, rng)
    holder, key = rng.choice(places)
    marker = "\x00here\x00"
    action = rng.choice(("value", "value", "value", "text", "dropped", "renamed", "deep", "long"))
    if action == "dropped":
        del holder[key]
    elif action == "renamed" and isinstance(holder, dict):
        holder[rng.choice((*ODD_NAMES, *map(str, holder)))] = holder.pop(key)
    elif action == "deep":
        holder[key] = [[[[[[holder[key]]]]]]]
    elif action == "long":
        holder[key] = [holder[key]] * 20_000
    else:
        holder[key] = marker if action == "text" else rng.choice(ODD_VALUES)
    text = json.dumps(tree).replace(json.dumps(marker), rng.choice(ODD_TEXTS)).encode()
    path.write_bytes(
        len(text).to_bytes(8, "little") + text + data[8 + length :] if header else text
    )
    return f"{action} at {str(key)[:40]!r}"


def _places(tree: Any) -> Any:
    """Everywhere in a tree: (what holds it, its name or number). Vocabularies are sampled."""
    if isinstance(tree, (dict, list)):
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        for key in keys if len(keys) <= 100 else keys[:50] + keys[-50:]:
            yield tree, key
            yield from _places(tree[key])


def gone(path: Path, rng: random.Random) -> str:
    path.unlink()
    return "gone"


def emptied(path: Path, rng: random.Random) -> str:
    path.write_bytes(b"")
    return "empty"


def a_folder(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "a folder"


def a_fifo(path: Path, rng: random.Random) -> str:
    path.unlink()
    os.mkfifo(path)
    return "a FIFO"


def a_link(path: Path, rng: random.Random) -> str:
    target = rng.choice(("/etc/passwd", "/dev/zero", "/dev/stdin", path.name, "nowhere", ".", "/"))
    path.unlink()
    path.symlink_to(target)
    return f"a link to {target}"


def a_hole(path: Path, rng: random.Random) -> str:
    os.truncate(path, HOLE)
    return "a great hole at the end"


def another_file(path: Path, rng: random.Random) -> str:
    other = rng.choice(sorted(entry for entry in path.parent.iterdir() if _whole(entry)))
    path.write_bytes(other.read_bytes())
    return f"the contents of {other.name}"


KINDS: tuple[Callable[[Path, random.Random], str], ...] = (
    *(json_changed,) * 8, *(bytes_changed,) * 6, *(bytes_moved,) * 4,
    gone, emptied, a_folder, a_fifo, a_link, a_hole, another_file,
)  # fmt: skip
