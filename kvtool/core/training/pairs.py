"""Source-target pairs for training and scoring, from the embedded dictionary or a TSV file.

This file imports no torch. A source with several right targets, such as a word with several
pronunciations, is one Pair. So all of its targets are on one side of a split.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvtool.errors import FileError, UsageError
from kvtool.files import PACKAGE
from kvtool.reading import MAX_TEXT_BYTES, nearest, read_bytes

CMUDICT = "cmudict"
CMUDICT_FILE = PACKAGE / "data" / "cmudict.txt.xz"
CMUDICT_SHA256 = "81917843c7f44ce2b094ac63873c2c7a4cf802040792c455ba3ca406891c3d22"

# The published split of the dictionary by g2p-seq2seq. A user's file gets a dev set of that share.
SPLIT_MODULUS = 20
DEV_REMAINDER = 19
TEST_REMAINDERS = (17, 18)

# The phones of the dictionary. Other dictionaries put a stress digit after vowels.
_PHONES = (
    "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W "
    "Y Z ZH"
)
PHONES = frozenset(_PHONES.split())

LONGEST_LINE = 65_536  # characters of a source and its target; contexts are shorter
BLOCK = 1 << 24  # bytes that are unpacked at once
# Memory is checked after every MANY_LINES lines, for LINE_NBYTES each: two texts and their objects.
MANY_LINES, LINE_NBYTES = 1 << 20, 512

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")  # all but the tab
_HEADER_NAMES = {"source", "src", "input", "word", "target", "tgt", "output", "pronunciation"}
_UNPACK, _CONVERT = "Unpack it first.", "Convert it to UTF-8 first."
_NOT_TSV = {
    b"version https://git-lfs": ("a Git LFS pointer", "Get the file itself with git lfs pull."),
    b"<!doctype html": ("an HTML page", ""),
    b"%PDF-": ("a PDF document", ""),
    b"PK\x03\x04": ("a zip archive", _UNPACK),
    b"\x1f\x8b": ("a gzip file in a gzip file", _UNPACK),
    b"BZh91AY&SY": ("a bzip2 archive", _UNPACK),
    b"\xfd7zXZ\x00": ("an xz archive", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("a zstd archive", _UNPACK),
    b"\xff\xfe\x00\x00": ("UTF-32 text", _CONVERT),  # before UTF-16, with the same first bytes
    b"\xff\xfe": ("UTF-16 text", _CONVERT),
    b"\xfe\xff": ("UTF-16 text", _CONVERT),
}


@dataclass(frozen=True)
class Pair:
    """One source and all its right targets, without repeats, in the order of the file."""

    source: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class TsvFile:
    """The contents of one TSV file."""

    pairs: tuple[Pair, ...]
    n_rows: int  # lines with a pair, repeated ones included
    n_blank: int  # blank lines
    sha256: str  # of the bytes on disk, compressed or not


@dataclass(frozen=True)
class Splits:
    """The training, dev and test pairs, and their origins.

    sha256: covers the pairs of `train` and `valid`, on which a training run depends. It does not
    change if a file is moved or compressed, or gets other line ends. test: may be empty; then
    `test_name` is "". notes: sentences for the user.
    """

    train: tuple[Pair, ...]
    valid: tuple[Pair, ...]
    test: tuple[Pair, ...]
    name: str
    sha256: str
    valid_name: str
    test_name: str
    notes: tuple[str, ...] = ()


def load_data(data: str, valid: Path | None = None, test: Path | None = None) -> Splits:
    """Load `data`, "cmudict" or the path of a TSV file, with its dev and test pairs.

    A file `valid` or `test` replaces that part; words held out by the dictionary's own split stay
    out of training. Without `valid`, a TSV with 20 sources or more gives every 20th to the dev set
    (index % 20 == 19), and a smaller one is its own dev set. Sources in two parts are noted, not
    removed. Raises FileError for a file that cannot be read or is no TSV, CapacityError for too
    little memory, and UsageError if `data` is "".
    """
    notes: list[str] = []
    if data == CMUDICT:
        splits = load_cmudict()
    else:
        splits = _split_tsv(data_path(data), hold_out=valid is None, notes=notes)
    if valid is not None:
        splits = replace(splits, valid=_read_part(valid, notes, "--valid"), valid_name=str(valid))
    if test is not None:
        splits = replace(splits, test=_read_part(test, notes, "--test"), test_name=str(test))
    return replace(
        splits,
        sha256=_fingerprint(splits.train, splits.valid),
        notes=(*notes, *_overlaps(splits)),
    )


def load_evaluation(data: str) -> tuple[str, tuple[Pair, ...], tuple[str, ...]]:
    """The pairs to score a model on, their name, and notes for the user: the test words of
    "cmudict", or all of a TSV file. Raises as `load_data`."""
    if data == CMUDICT:
        splits = load_cmudict()
        return splits.test_name, splits.test, ()
    notes: list[str] = []
    pairs = _read_part(data_path(data), notes, "--data")
    return data, pairs, tuple(notes)


def load_cmudict() -> Splits:
    """The embedded dictionary: spelling -> phones without stress, split as by g2p-seq2seq.

    Words keep the order of the file: index % 20 == 19 is dev, 17 and 18 are test, and the rest is
    training. Pronunciations that differ only in stress count as one. Raises FileError if the
    installed file is damaged.
    """
    # Each digit is a stress mark or the number of a variant: "a(2) EY1" becomes "a() EY".
    text = _cmudict_bytes().translate(None, b"0123456789").decode("ascii")
    words: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        word, phones = line.partition(" #")[0].split(" ", 1)
        word = word.removesuffix("()")
        known = words.get(word, ())
        if phones not in known:
            words[word] = (*known, phones)
    pairs = _merged(words)
    train = tuple(
        pair
        for index, pair in enumerate(pairs)
        if index % SPLIT_MODULUS not in (*TEST_REMAINDERS, DEV_REMAINDER)
    )
    valid = pairs[DEV_REMAINDER::SPLIT_MODULUS]
    test = tuple(
        pair for index, pair in enumerate(pairs) if index % SPLIT_MODULUS in TEST_REMAINDERS
    )
    return Splits(
        train,
        valid,
        test,
        name=CMUDICT,
        sha256=_fingerprint(train, valid),
        valid_name=f"{CMUDICT}, words with index % 20 = 19",
        test_name=f"{CMUDICT}, words with index % 20 = 17 or 18",
    )


def read_tsv(path: Path, flag: str = "") -> TsvFile:
    """Read lines of source TAB target in UTF-8, gzipped or not, and merge equal sources.

    Pairs are in the order of the first lines of their sources. There is no header: the first line
    is a pair. Spaces around a source or target are dropped. Blank lines are skipped and counted. A
    byte order mark and CRLF are accepted.
    Raises FileError, naming the line, if it does not have two fields, has an empty field or a
    control character, is longer than LONGEST_LINE characters, or is not UTF-8 (with the offset in
    the decompressed file). Raises FileError if there is no pair, and CapacityError for too little
    memory.
    """
    raw = read_bytes(path, "a TSV file", flag)
    data = _decompress(path, raw)
    _check_kind(path, data)
    merged: dict[str, dict[str, None]] = {}
    n_rows = n_blank = 0
    for number, line in enumerate(_lines(path, data), start=1):
        if not number % MANY_LINES:
            _count_memory(path, MANY_LINES * LINE_NBYTES)
        # A concatenation of files with byte order marks has them inside too.
        line = line.removesuffix("\r").removeprefix("\ufeff")
        if "\t" not in line and not line.strip():
            n_blank += 1
            continue
        source, target = _fields(f"{path}: line {number}", line)
        merged.setdefault(source, {})[target] = None
        n_rows += 1
    if not n_rows:
        found = _count(n_blank, "blank line") if n_blank else "0 bytes of text"
        raise FileError(f"{path}: holds no pairs ({found}, expected source TAB target)")
    return TsvFile(_merged(merged), n_rows, n_blank, hashlib.sha256(raw).hexdigest())


def _merged(targets_of: Mapping[str, Iterable[str]]) -> tuple[Pair, ...]:
    return tuple(Pair(source, tuple(targets)) for source, targets in targets_of.items())


def _cmudict_bytes() -> bytes:
    """The text of the dictionary as published. Raises FileError if it is damaged."""
    try:
        import lzma  # a Python built without liblzma must still run everything else
    except ImportError as error:
        raise FileError(
            f"{CMUDICT_FILE}: cannot be read (this Python was built without the lzma module)",
            "Give your own pairs with --data, or use a Python that has lzma.",
        ) from error
    packed = read_bytes(CMUDICT_FILE, "the embedded dictionary")
    try:
        data = lzma.decompress(packed)
    except (lzma.LZMAError, EOFError):
        data = b""
    if hashlib.sha256(data).hexdigest() != CMUDICT_SHA256:
        raise FileError(
            f"{CMUDICT_FILE}: is damaged (its text has not the SHA-256 {CMUDICT_SHA256[:12]}...)",
            "Install kvtool again.",
        )
    return data


def data_path(data: str) -> Path:
    """The file that --data names. Raises FileError if there is none, UsageError if it is ""."""
    if not data:
        raise UsageError("--data: is empty", f"Give a TSV file, or {CMUDICT}.")
    path = Path(data)
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        close = difflib.get_close_matches(data, [CMUDICT])
        hint = f"Did you mean {CMUDICT}?" if close else nearest(path)
        raise FileError(
            f"--data {data}: not found",
            hint or f"Give a file with source TAB target on each line, or {CMUDICT}.",
        ) from None
    except OSError:
        pass  # reading it will raise the right error
    return path


def _split_tsv(path: Path, hold_out: bool, notes: list[str]) -> Splits:
    train = valid = _read_part(path, notes, "--data")
    name = valid_name = str(path)
    if hold_out and len(train) >= SPLIT_MODULUS:
        valid = train[DEV_REMAINDER::SPLIT_MODULUS]
        valid_name = f"{path}, sources with index % 20 = 19"
        train = tuple(
            pair for index, pair in enumerate(train) if index % SPLIT_MODULUS != DEV_REMAINDER
        )
    elif hold_out:
        valid_name = f"{path}, the training data"
        are = "is" if len(train) == 1 else "are"
        notes.append(
            f"{path}: {_count(len(train), 'source')} {are} too few to hold some out "
            f"(expected {SPLIT_MODULUS} or more), so the dev scores are on the training data"
        )
    return Splits(train, valid, (), name, sha256="", valid_name=valid_name, test_name="")


def _read_part(path: Path, notes: list[str], flag: str) -> tuple[Pair, ...]:
    """The pairs of a file; adds notes for the user to `notes`."""
    tsv = read_tsv(path, flag)
    if tsv.n_blank:
        notes.append(f"{path}: {_count(tsv.n_blank, 'blank line')} skipped")
    first = tsv.pairs[0]
    if first.source.lower() in _HEADER_NAMES and first.targets[0].lower() in _HEADER_NAMES:
        notes.append(
            f"{path}: the first pair, {first.source!r} and {first.targets[0]!r}, "
            "looks like a header and is used as data"
        )
    return tsv.pairs


def _overlaps(splits: Splits) -> list[str]:
    """A note for every two parts that share sources."""
    parts = {"training": splits.train, "dev": splits.valid, "test": splits.test}
    if splits.valid is splits.train:
        del parts["dev"]  # it has a note of its own
    sources = {name: {pair.source for pair in pairs} for name, pairs in parts.items()}
    notes = []
    for held_out, seen in (("dev", "training"), ("test", "training"), ("test", "dev")):
        both = len(sources.get(held_out, set()) & sources.get(seen, set()))
        if both:
            of = _count(len(sources[held_out]), f"{held_out} source")
            notes.append(
                f"{both:,} of {of} are also in the {seen} data, "
                f"so the {held_out} scores are not of unseen sources only"
            )
    return notes


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _fingerprint(*parts: Sequence[Pair]) -> str:
    """The SHA-256 of the pairs of all parts; fields contain no tabs and line ends."""
    digest = hashlib.sha256()
    for part in parts:
        lines: Iterable[str] = ("\t".join((pair.source, *pair.targets)) for pair in part)
        digest.update("\n".join(lines).encode() + b"\n\n")
    return digest.hexdigest()


def _decompress(path: Path, raw: bytes) -> bytes:
    """The bytes of a file, unpacked if they are gzip by their first bytes. Raises FileError."""
    if not raw.startswith(b"\x1f\x8b"):
        return raw
    found: list[bytes] = []
    nbytes = 0
    try:
        with gzip.open(io.BytesIO(raw)) as file:
            while block := file.read(BLOCK):
                found.append(block)
                nbytes += len(block)
                if nbytes > MAX_TEXT_BYTES:
                    raise FileError(
                        f"{path}: unpacks to more than {MAX_TEXT_BYTES:,} bytes",
                        "Train on a part of it.",
                    )
                _count_memory(path, 2 * nbytes)  # these blocks, and their concatenation
    except (OSError, EOFError, zlib.error) as error:
        raise FileError(f"{path}: is a damaged gzip file ({error})") from error
    return b"".join(found)


def _count_memory(path: Path, nbytes: int) -> None:
    """Raise CapacityError unless `nbytes` more are available."""
    import torch  # late, since this file imports no torch

    from kvtool.core.machine import require_memory

    require_memory(f"{path}: its text", nbytes, torch.device("cpu"))


def _check_kind(path: Path, data: bytes) -> None:
    """Raise FileError for a file that has the first bytes of another format."""
    start = data[:32].lower()
    for magic, (what, hint) in _NOT_TSV.items():
        if start.startswith(magic.lower()):
            raise FileError(f"{path}: is {what} (expected UTF-8 text, source TAB target)", hint)


def _lines(path: Path, data: bytes) -> Iterator[str]:
    """Yield the lines without line feeds. Raises FileError for a long line or a wrong byte."""
    offset = 0
    for number, line in enumerate(io.BytesIO(data), start=1):
        if len(line) > LONGEST_LINE:  # bytes; a character has one to four
            n = len(line.removesuffix(b"\n").decode(errors="replace"))
            if n > LONGEST_LINE:
                raise FileError(
                    f"{path}: line {number}: {n:,} characters (expected {LONGEST_LINE:,} or fewer)",
                    "Write source TAB target on each line.",
                )
        try:
            yield line.removesuffix(b"\n").decode()
        except UnicodeDecodeError as error:
            raise FileError(
                f"{path}: line {number}: is not UTF-8 "
                f"(byte 0x{line[error.start]:02x} at offset {offset + error.start})",
                _CONVERT,
            ) from error
        offset += len(line)


def _fields(where: str, line: str) -> tuple[str, str]:
    """The source and target of a line. `where` names the line in errors. Raises FileError."""
    bad = _CONTROL.search(line)
    if bad:
        raise FileError(
            f"{where}: holds the control character 0x{ord(bad[0]):02x} "
            f"in column {bad.start() + 1} (expected text)",
            "Line ends are LF or CRLF, and the encoding is UTF-8.",
        )
    fields = [field.strip() for field in line.split("\t")]
    if len(fields) == 1:
        raise FileError(f"{where}: 1 field, need 2", "Write source TAB target on each line.")
    if len(fields) > 2:
        raise FileError(
            f"{where}: {len(fields)} fields, need 2",
            "Write a source's second target on a line of its own, with the source again.",
        )
    source, target = fields
    if not source or not target:
        raise FileError(f"{where}: the {'target' if source else 'source'} is empty")
    return source, target
