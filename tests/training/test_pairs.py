"""Reading and splitting pairs: the user's TSV files."""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli_probe import HANGS
from kvtool.core import machine
from kvtool.core.training import pairs
from kvtool.core.training.pairs import Pair, load_data, read_tsv
from kvtool.errors import CapacityError, FileError, UsageError

lzma = pytest.importorskip("lzma")

gzipped = partial(gzip.compress, mtime=0)  # the same bytes on every run
steady = settings(derandomize=True, deadline=None, database=None)


@pytest.fixture
def tsv(tmp_path):
    """A function that writes bytes to a file and returns its path."""

    def write(data: bytes, name: str = "pairs.tsv") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def rows(n: int, start: int = 0) -> bytes:
    return b"".join(b"w%d\tt%d\n" % (i, i) for i in range(start, start + n))


# The embedded dictionary


def test_pairs_and_scores_import_without_torch():
    wing = "kvtool.core.training"
    code = f"import sys, {wing}.pairs, {wing}.scoring; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=HANGS).returncode == 0


# Reading a TSV file


def test_equal_sources_are_merged_in_the_order_of_their_first_line(tsv):
    path = tsv(b"b\tB1\na\tA1\nb\tB2\nb\tB1\n")
    read = read_tsv(path)
    assert read.pairs == (Pair("b", ("B1", "B2")), Pair("a", ("A1",)))
    assert (read.n_rows, read.n_blank) == (4, 0)
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "data",
    [
        b"a b\tc d\nx\ty\n",
        b"a b\tc d\nx\ty",  # no line end at the end
        b"\xef\xbb\xbfa b\tc d\r\nx\ty\r\n",
        b"\xef\xbb\xbfa b\tc d\n\xef\xbb\xbfx\ty\n",  # two files, joined
        b" a b \t c d \nx \t y\n",
        gzipped(b"a b\tc d\nx\ty\n"),
        gzipped(b"a b\tc d\n") + gzipped(b"\xef\xbb\xbfx\ty\r\n"),
    ],
)
def test_line_ends_byte_order_marks_spaces_and_gzip_change_nothing(tsv, data):
    assert read_tsv(tsv(data)).pairs == (Pair("a b", ("c d",)), Pair("x", ("y",)))


def test_blank_lines_are_skipped_and_counted(tsv):
    read = read_tsv(tsv(b"\na\tb\n\r\n   \nc\td\n\n"))
    assert (len(read.pairs), read.n_rows, read.n_blank) == (2, 2, 4)


def test_only_a_line_feed_ends_a_line(tsv):
    source, target = "a\u2028b", "c\u0085d"
    read = read_tsv(tsv(f"{source}\t{target}\n".encode()))
    assert read.pairs == (Pair(source, (target,)),)


def test_one_row_is_a_file(tsv):
    assert read_tsv(tsv(b"source\ttarget")).pairs == (Pair("source", ("target",)),)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (rows(16) + b"word\n", ": line 17: 1 field, need 2"),
        (b"\n" * 16 + b"word W ER D\n", ": line 17: 1 field, need 2"),
        (b"a\tb\tc\n", ": line 1: 3 fields, need 2"),
        (b"a\tb\t\n", ": line 1: 3 fields, need 2"),
        (b"x\ty\n\tb\n", ": line 2: the source is empty"),
        (b"x\ty\na\t \n", ": line 2: the target is empty"),
        (b"x\ty\n\t\n", ": line 2: the source is empty"),
        (b"x\ty\na\tb\0c\n", ": line 2: holds the control character 0x00 in column 4 "),
        (b"a\tb\rc\td\r", ": line 1: holds the control character 0x0d in column 4 "),
        (b"a\tb\x1b[31m\n", ": line 1: holds the control character 0x1b in column 4 "),
        (b"x\ty\na\tb\xff\n", ": line 2: is not UTF-8 (byte 0xff at offset 7)"),
        (b"\xef\xbb\xbfa\tb\xff\n", ": line 1: is not UTF-8 (byte 0xff at offset 6)"),
        (gzipped(b"x\ty\n\xe9t\xe9\tb"), ": line 2: is not UTF-8 (byte 0xe9 at offset 4)"),
        ("a\tb\n".encode("utf-16"), ": is UTF-16 text "),
        ("a\tb\n".encode("utf-16-le"), ": line 1: holds the control character 0x00 in column 2 "),
        (b"", ": is empty, 0 bytes "),
        (gzipped(b""), ": holds no pairs (0 bytes of text, "),
        (b"\n \n\r\n", ": holds no pairs (3 blank lines, "),
        (b"\n", ": holds no pairs (1 blank line, "),
        (gzipped(rows(99))[:-9], ": is a damaged gzip file "),
        (b"\x1f\x8b\x08junk that is no gzip member", ": is a damaged gzip file "),
        (b"version https://git-lfs.github.com/spec/v1\n", ": is a Git LFS pointer "),
        (b"<!DOCTYPE HTML>\n<title>404</title>\n", ": is an HTML page "),
        (lzma.compress(b"a\tb\n"), ": is an xz archive "),
        (bz2.compress(b"a\tb\n"), ": is a bzip2 archive "),
        (gzipped(gzipped(rows(9))), ": is a gzip file in a gzip file "),
        (b"%PDF-1.7\n%\xe2\xe3\n", ": is a PDF document "),
        ("a\tb\n".encode("utf-32"), ": is UTF-32 text "),
    ],
)
def test_a_bad_file_is_refused_with_its_line_and_offset(tsv, data, message):
    path = tsv(data)
    with pytest.raises(FileError) as caught:
        read_tsv(path)
    assert caught.value.message.startswith(f"{path}{message}")


@pytest.mark.parametrize("letter", ["x", "\t", "é", "🦉"])
def test_a_line_may_have_so_many_characters_and_no_more(tsv, letter):
    room = pairs.LONGEST_LINE - 4
    line = f"a{letter * room}b\tc"
    with pytest.raises(FileError) as caught:
        read_tsv(tsv(f"x\ty\n{line}d\r\n".encode()))
    said = "line 2: 65,538 characters (expected 65,536 or fewer). Write source TAB target"
    assert said in str(caught.value)
    if letter == "\t":
        with pytest.raises(FileError, match=f"line 1: {room + 2} fields, need 2"):
            read_tsv(tsv(line.encode()))
    else:
        assert read_tsv(tsv(line.encode())).pairs == (Pair(f"a{letter * room}b", ("c",)),)


@pytest.mark.parametrize("copies", [1, 3])  # a gzip file may be several, one behind the other
def test_a_gzip_file_is_unpacked_up_to_a_bound(tsv, monkeypatch, copies):
    monkeypatch.setattr(pairs, "BLOCK", 100)
    monkeypatch.setattr(pairs, "MAX_TEXT_BYTES", 8 * 3000)
    whole = tsv(gzipped(b"ab\tcdef\n" * (3000 // copies)) * copies)
    assert read_tsv(whole).n_rows == 3000
    more = tsv(gzipped(b"ab\tcdef\n" * (3003 // copies)) * copies)
    with pytest.raises(FileError, match=r"unpacks to more than 24,000 bytes\. Train on a part"):
        read_tsv(more)


@pytest.mark.parametrize("data", [rows(3000), gzipped(rows(3000))], ids=["plain", "gzip"])
def test_the_memory_that_pairs_take_is_counted(tsv, monkeypatch, data):
    monkeypatch.setattr(pairs, "MANY_LINES", 1000)
    asked = []
    monkeypatch.setattr(machine, "available_bytes", lambda device: asked.append(1) or 500_000)
    with pytest.raises(CapacityError, match=r"pairs.tsv: its text: needs"):
        read_tsv(tsv(data))
    assert asked
    monkeypatch.setattr(machine, "available_bytes", lambda device: 600_000)
    assert read_tsv(tsv(data)).n_rows == 3000


def test_a_flipped_byte_in_a_gzip_file_is_noticed(tsv):
    data = bytearray(gzipped(rows(200)))
    data[len(data) // 2] ^= 0x10
    with pytest.raises(FileError):
        read_tsv(tsv(bytes(data)))


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(FileError, match="is a folder"):
        read_tsv(tmp_path)


FIELD = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    lambda text: text == text.strip() and not text.startswith("\ufeff")
)
TABLE = st.dictionaries(FIELD, st.lists(FIELD, min_size=1, unique=True), min_size=1)


@steady
@given(TABLE)
def test_what_is_written_is_what_is_read(tmp_path_factory, table):
    path = tmp_path_factory.getbasetemp() / "written.tsv"
    lines = [f"{source}\t{target}\n" for source, targets in table.items() for target in targets]
    path.write_bytes("".join(lines).encode())
    read = read_tsv(path)
    assert {pair.source: list(pair.targets) for pair in read.pairs} == table
    assert read.n_rows == len(lines)


@steady
@given(st.binary(max_size=200))
def test_any_bytes_are_pairs_or_a_file_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.tsv"
    path.write_bytes(data)
    try:
        read = read_tsv(path)
    except FileError as error:
        assert error.message.startswith(f"{path}: ")
    else:
        assert all(p.source and all(p.targets) for p in read.pairs)


# Splitting


def test_every_20th_source_is_held_out_for_dev(tsv):
    splits = load_data(str(tsv(rows(40))))
    assert [p.source for p in splits.valid] == ["w19", "w39"]
    assert [p.source for p in splits.train] == [f"w{i}" for i in range(40) if i not in (19, 39)]
    assert (splits.test, splits.test_name, splits.notes) == ((), "", ())
    assert splits.valid_name.endswith("pairs.tsv, sources with index % 20 = 19")


def test_sources_are_counted_after_merging(tsv):
    splits = load_data(str(tsv(rows(19) + b"w0\tother\n" * 30)))
    assert splits.valid == splits.train
    splits = load_data(str(tsv(rows(19) + b"w0\tother\n" * 30 + b"last\tone\n")))
    assert splits.valid == (Pair("last", ("one",)),)
    assert splits.train[0].targets == ("t0", "other")


@pytest.mark.parametrize(("n", "count"), [(1, "1 source is too"), (19, "19 sources are too")])
def test_too_few_sources_are_their_own_dev_set_and_a_note_says_so(tsv, n, count):
    splits = load_data(str(tsv(rows(n))))
    assert splits.valid == splits.train and len(splits.train) == n
    (note,) = splits.notes
    assert count in note and "dev scores are on the training data" in note


def test_given_dev_and_test_files_leave_the_training_file_whole(tsv):
    train = tsv(rows(40))
    valid, test = tsv(rows(3, 100), "valid.tsv"), tsv(rows(4, 200), "test.tsv")
    splits = load_data(str(train), valid, test)
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [40, 3, 4]
    assert (splits.valid_name, splits.test_name) == (str(valid), str(test))
    assert splits.notes == ()


def test_sources_in_two_parts_are_noted_and_kept(tsv):
    train, valid = tsv(rows(40)), tsv(rows(10, 38), "valid.tsv")
    splits = load_data(str(train), valid, tsv(rows(5, 39), "test.tsv"))
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [40, 10, 5]
    assert [note.split(",")[0] for note in splits.notes] == [
        "2 of 10 dev sources are also in the training data",
        "1 of 5 test sources are also in the training data",
        "5 of 5 test sources are also in the dev data",
    ]


def test_blank_lines_and_a_header_are_noted(tsv):
    splits = load_data(str(tsv(b"Source\tTarget\n\n" + rows(30))))
    assert "1 blank line skipped" in splits.notes[0]
    assert "looks like a header and is used as data" in splits.notes[1]
    assert splits.train[0] == Pair("Source", ("Target",))


def test_the_hash_follows_the_training_and_dev_pairs_and_nothing_else(tsv):
    plain = load_data(str(tsv(rows(40))))
    packed = load_data(str(tsv(gzipped(rows(40).replace(b"\n", b"\r\n")), "other.gz")))
    tested = load_data(str(tsv(rows(40))), test=tsv(rows(2, 50), "test.tsv"))
    assert plain.sha256 == packed.sha256 == tested.sha256
    other_target = load_data(str(tsv(rows(40).replace(b"t7", b"tt7"))))
    other_dev = load_data(str(tsv(rows(40))), valid=tsv(rows(2, 50), "valid.tsv"))
    other_order = load_data(str(tsv(rows(10, 10) + rows(10) + rows(20, 20))))
    hashes = [splits.sha256 for splits in (plain, other_target, other_dev, other_order)]
    assert len(set(hashes)) == 4


def test_data_that_is_not_there_is_refused_with_the_nearest_name(tsv, tmp_path):
    tsv(rows(2), "train.tsv")
    with pytest.raises(FileError, match=r"Did you mean cmudict\?"):
        load_data("cmudct")
    with pytest.raises(FileError, match=r"Did you mean .*train\.tsv\?"):
        load_data(str(tmp_path / "trian.tsv"))
    for unlike in ("zzz", "plan.tsv"):  # a suffix alone makes no likeness
        with pytest.raises(FileError, match="or cmudict"):
            load_data(str(tmp_path / unlike))
    with pytest.raises(FileError, match=r"--test .*zzz: not found \(expected a TSV file\)"):
        load_data("cmudict", test=tmp_path / "zzz")
    with pytest.raises(FileError, match=r"not found\. The folder .*none does not exist either"):
        load_data(str(tmp_path / "none" / "train.tsv"))
    with pytest.raises(FileError, match=r"not found\. Give a file"):
        load_data(str(tmp_path / "train.tsv" / "train.tsv"))
    with pytest.raises(UsageError, match="--data: is empty"):
        load_data("")


def test_a_link_to_nowhere_is_refused_as_what_it_is(tmp_path):
    (tmp_path / "a.tsv").symlink_to("b.tsv")
    message = r"a\.tsv: is a link to b\.tsv, which does not exist \(expected a TSV file\)$"
    for given_as in (
        {"data": str(tmp_path / "a.tsv")},
        {"data": "cmudict", "test": tmp_path / "a.tsv"},
    ):
        with pytest.raises(FileError, match=message):
            load_data(**given_as)


def test_a_file_that_may_not_be_seen_is_not_called_missing(tmp_path, monkeypatch):
    def deny(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "lstat", deny)
    monkeypatch.setattr(Path, "stat", deny)
    with pytest.raises(FileError, match=r"cannot be opened \(Permission denied\)$"):
        load_data(str(tmp_path / "a.tsv"))
