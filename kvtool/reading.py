"""Files that others wrote: opened, bounded and parsed in this one place. Imports no torch.

What a stranger hands over may be a FIFO, a device, ten terabytes of holes, or JSON that says one
thing twice. Only a regular file is opened, no more of it is read than its kind can need, and JSON
means one thing or is refused.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import itertools
import json
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from kvtool import ending
from kvtool.errors import FileError

FIXED_NAMES = ("config.json", "tokenizer.json", "source.json", "target.json", "model.safetensors")
MAX_JSON_BYTES = 3 * 2**24  # the tokenizer.json of gemma-2 has 34 million, and few are larger
MAX_CONFIG_BYTES = 2**24  # the largest known has a tenth of it
MAX_PARTS = 3 * 2**20  # commas, lists and objects of JSON; gemma-2 has 2.4 million
QUICK_JSON = 2**20  # characters; beyond, the parser is native code that takes a second or more
MAX_NESTED = 64  # lists and objects within each other; tokenizers have some ten
MAX_TEXT_BYTES = 2**30  # of a text to train on
MAX_SHOWN = 80  # characters of a name or value from a file, in an error


@contextlib.contextmanager
def opened(path: Path, what: str, flag: str = "") -> Iterator[BufferedReader]:
    """The regular, non-empty file that `flag` gave, open for reading.

    What was opened is looked at, and not its name, so that nothing can take its place in between;
    nobody waits for the writer of a FIFO. Raises FileError, also for errors while it is read.
    """
    require_file(path, what, flag)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            require_regular(file, _named(path, flag), what)
            yield file
    except OSError as error:
        where = _named(path, flag)
        raise FileError(f"{where}: {what} cannot be read ({error.strerror})") from error


def read_bytes(path: Path, what: str, flag: str = "", most: int = MAX_TEXT_BYTES) -> bytes:
    """Read a whole regular file of up to `most` bytes, which `flag` gave. Raises FileError."""
    with opened(path, what, flag) as file:
        return read_whole(file, _named(path, flag), what, most)


def require_regular(file: BufferedReader, where: str, what: str) -> None:
    """Raise FileError, which begins with `where`, unless an open file is a regular one."""
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise FileError(f"{where}: is not a regular file (expected {what})")


def read_whole(file: BufferedReader, where: str, what: str, most: int) -> bytes:
    """All of an open file. Raises FileError, which begins with `where`, above `most` bytes."""
    size = os.fstat(file.fileno()).st_size
    if size > most:
        raise FileError(
            f"{where}: is too large for {what} ({size:,} bytes, expected {most:,} or fewer)"
        )
    return file.read(most)


def read_text(path: Path, what: str, flag: str = "", most: int = MAX_TEXT_BYTES) -> str:
    """Read UTF-8 text without a byte order mark. Raises FileError with a bad byte's offset."""
    data = read_bytes(path, what, flag, most)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = _named(path, flag)
        raise FileError(
            f"{where}: is not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start})",
            "Convert it to UTF-8 first.",
        ) from error


def read_json_object(
    path: Path, what: str, most: int = MAX_JSON_BYTES, finite: bool = True
) -> dict[str, Any]:
    """Read a JSON file that holds one object. Raises FileError with the place of an error."""
    return json_object(path, read_text(path, what, most=most), finite)


def json_object(path: Path, text: str | bytes, finite: bool = True) -> dict[str, Any]:
    """The object that the text of the file `path` holds. Raises FileError."""
    try:
        data = parse_json(text, finite)
    except ValueError as error:
        raise FileError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise FileError(f"{path}: holds no JSON object (found {type(data).__name__})")
    return data


def parse_json(text: str | bytes, finite: bool = True) -> Any:
    """The value of a JSON text that means one thing (RFC 8259). Raises ValueError for others.

    Refused are a name that an object has twice (Python's parser would take the last), nesting too
    deep to print or copy, more parts than fit in a gigabyte, and if `finite` NaN, Infinity and
    numbers that become infinite.
    """
    checks: Any = {"parse_constant": _refuse, "parse_float": _finite} if finite else {}
    signs: Any = "[{," if isinstance(text, str) else (b"[", b"{", b",")
    n_parts = sum(map(text.count, signs))  # also those in strings, of which there are few
    if n_parts > MAX_PARTS:
        expected = f"expected {MAX_PARTS:,} or fewer"
        raise ValueError(f"it has {n_parts:,} commas and brackets, {expected}")
    try:
        with ending.signals_at_default() if len(text) > QUICK_JSON else contextlib.nullcontext():
            found = json.loads(text, object_pairs_hook=_unique, parse_int=_whole, **checks)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check_nesting(found)
    return found


def _check_nesting(value: Any) -> None:
    within = [value]
    for _ in range(MAX_NESTED):
        containers = [item for item in within if isinstance(item, (dict, list))]
        within = []
        for item in containers:
            within += item.values() if isinstance(item, dict) else item
        if not within:
            return
    raise ValueError("it is nested too deeply")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = sorted(name for name, _ in pairs)
        twice = next(name for name, after in itertools.pairwise(names) if name == after)
        raise ValueError(f"{short(twice)} occurs twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{short(text, 20)} is beyond every floating-point number")
    return number


def _whole(text: str) -> int:
    if len(text) > 40:  # Python refuses 4,300 digits in words of its own, and prints what has fewer
        raise ValueError(f"{short(text, 20)} is a number of {len(text):,} digits")
    return int(text)


def short(text: str, length: int = MAX_SHOWN) -> str:
    """A name or value from a file, cut where it would flood an error message."""
    return text if len(text) <= length else f"{text[:length]}..."


def quoted(value: object) -> str:
    """A value from a file as Python writes it, cut where it would flood an error message."""
    return short(repr(value[:MAX_SHOWN] if isinstance(value, str) else value))


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with opened(path, "a file to hash") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _named(path: Path, flag: str) -> str:
    return f"{flag} {path}" if flag else str(path)


def require_file(path: Path, what: str, flag: str = "") -> Path:
    """Return `path`, which `flag` gave, if it is a regular, non-empty file; else raise FileError
    saying what it is."""
    where = _named(path, flag)
    try:
        info = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            lost = f"{where}: is a link to {os.readlink(path)}, which does not exist"
            raise FileError(f"{lost} (expected {what})") from None
        hint = nearest(path) or "Check the path."
        raise FileError(f"{where}: not found (expected {what})", hint) from None
    except OSError as error:
        raise FileError(f"{where}: {what} cannot be opened ({error.strerror})") from error
    if stat.S_ISDIR(info.st_mode):
        raise FileError(f"{where}: is a folder (expected {what})")
    if not stat.S_ISREG(info.st_mode):
        raise FileError(f"{where}: is not a regular file (expected {what})")
    if info.st_size == 0:
        raise FileError(f"{where}: is empty, 0 bytes (expected {what})")
    return path


def nearest(path: Path) -> str:
    """Name the files beside `path` with similar names in a sentence, the most similar first; "" for
    none, and for a name that a checkpoint's file must have."""
    try:
        names = sorted(entry.name for entry in path.parent.iterdir())
    except FileNotFoundError:
        return f"The folder {path.parent} does not exist either." if str(path.parent) != "." else ""
    except OSError:
        return ""
    if path.name in FIXED_NAMES:
        return ""
    # Two names are alike for their suffix alone: what stands before it must be similar too.
    stems = difflib.get_close_matches(path.stem, {Path(n).stem for n in names}, n=9, cutoff=0.7)
    similar = [name for name in names if Path(name).stem in stems]
    close = difflib.get_close_matches(path.name, similar, n=3)
    found = " or ".join(str(path.parent / name) for name in close)
    return f"Did you mean {found}?" if close else ""
