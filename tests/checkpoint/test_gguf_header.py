"""GGUF files that are not what they should be: one line each, before anything is allocated."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from gguf_files import Made
from kvtool.core.checkpoint.gguf.formats import FORMATS
from kvtool.core.checkpoint.gguf.header import GGUFHeader
from kvtool.errors import FileError


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Made().write(tmp_path_factory.mktemp("gguf") / "good.gguf")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def start(n_tensors: int = 0, n_fields: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_fields)


def field(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], number: int = 0, offset: int = 0) -> bytes:
    numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, offset)
    return text(name) + numbers


def padded(data: bytes, more: int = 0) -> bytes:
    return data + bytes(-len(data) % 32 + more)


BAD = {
    "not a GGUF": (b"PK\x03\x04" + bytes(60), "is not a GGUF file (begins with b'PK"),
    "three bytes": (b"GGU", "is not a GGUF file (begins with b'')"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "for big-endian machines"),
    "version 1": (start(version=1) + bytes(8), "is GGUF of version 1 (expected 2 or 3)"),
    "no fields": (start(n_fields=2**63), "is cut short, or damaged, within its header"),
    "many tensors": (start(n_tensors=2**60), f"claims {2**60} tensors (at most 262144)"),
    "long name": (start(1) + struct.pack("<Q", 2**62), "is cut short, or damaged"),
    "long list": (
        start(n_fields=1) + field("a", 9, struct.pack("<IQ", 4, 2**61)),
        f"a claims {2**61} items",
    ),
    "long texts": (
        start(n_fields=1) + field("a", 9, struct.pack("<IQ", 8, 2**20)), "is cut short, or damaged"
    ),
    "a list of lists": (
        start(n_fields=1) + field("a", 9, struct.pack("<IQ", 9, 1)) + bytes(16),
        "a is a list of the unknown type 9",
    ),
    "unknown type": (start(n_fields=1) + field("a", 77, bytes(8)), "a has the unknown type 77"),
    "a field twice": (
        start(n_fields=2) + field("a", 4, bytes(4)) * 2, "has the field a twice"
    ),
    "part": (
        start(n_fields=1) + field("split.count", 2, struct.pack("<H", 3)),
        "is one part of a model in 3 files",
    ),
    "alignment": (
        start(n_fields=1) + field("general.alignment", 4, struct.pack("<I", 3)),
        "general.alignment is 3 (expected a power of two)",
    ),
    "huge": (start(1) + tensor("a", (2**60,)), "a has shape [1152921504606846976] at 0"),
    "terabytes": (padded(start(1) + tensor("a", (2**40,))), "is cut short (64 bytes, expected"),
    "no dimensions": (start(1) + tensor("a", ()), "a has 0 dimensions (expected 1 to 4)"),
    "empty": (start(1) + tensor("a", (4, 0)), "a has shape [0, 4] at 0"),
    "unknown format": (start(1) + tensor("a", (4,), 99), "a has the unknown format 99"),
    "half a block": (
        start(1) + tensor("a", (33,), 2), "a has rows of 33 values (expected a multiple of 32, as"
    ),
    "unaligned": (padded(start(1) + tensor("a", (4,), 0, 4), 64), "a is at 4 (expected a mult"),
    "twice": (padded(start(2) + tensor("a", (4,)) * 2, 64), "holds a twice"),
    "overlapping": (
        padded(start(2) + tensor("a", (16,)) + tensor("b", (16,), 0, 32), 128),
        "b overlaps the tensor before it",
    ),
    "a name that is none": (start(1) + tensor("a\x1b[31m", (4,)), "names nothing"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_line_that_names_it(name: str, tmp_path: Path) -> None:
    data, said = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(FileError) as refused:
        GGUFHeader(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused.value.message.startswith(f"{path}: ")
    assert said in refused.value.message
    assert "\n" not in refused.value.message and "\x1b" not in refused.value.message
    assert peak < 2**22  # what it claims is not allocated


def test_a_file_cut_anywhere_is_refused(good: Path, tmp_path: Path) -> None:
    data, path = good.read_bytes(), tmp_path / "cut.gguf"
    ends = [*range(1, 400, 7), len(data) // 2, len(data) - 64]
    for end in ends:
        path.write_bytes(data[:end])
        with pytest.raises(FileError, match=r"cut short|not a GGUF"):
            GGUFHeader(path)


def test_a_header_says_what_the_package_gguf_says(good: Path) -> None:
    ours, theirs = GGUFHeader(good), gguf.GGUFReader(good)
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        mine = ours.tensors[t.name]
        assert (mine.format.number, mine.begin) == (int(t.tensor_type), t.data_offset)
        assert list(mine.shape) == [int(n) for n in t.shape[::-1]]
        assert mine.end - mine.begin == t.n_bytes
    for name, field_ in theirs.fields.items():
        if not name.startswith("GGUF."):
            expected = field_.contents()
            found = ours.get(name)
            assert found == (pytest.approx(expected) if isinstance(expected, float) else expected)


def test_every_format_has_the_blocks_of_the_package_gguf() -> None:
    assert {f.number: (f.name, f.block, f.nbytes) for f in FORMATS.values()} == {
        int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()
    }


def test_tensors_stand_where_an_alignment_of_their_own_says(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(128)
    for name in "ab":
        writer.add_tensor(name, np.ones(5, dtype=np.float32), raw_dtype=Type.F32)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file):
        write()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFHeader(tmp_path / "a.gguf")
    assert found.tensors["b"].begin - found.tensors["a"].begin == 128


@pytest.mark.parametrize("fields", [
    b"", field("general.architecture", 8, text("")),
    field("general.architecture", 4, struct.pack("<I", 7)),
])  # fmt: skip
def test_a_file_that_names_no_architecture_says_so(tmp_path: Path, fields: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(padded(start(n_fields=bool(fields)) + fields))
    with pytest.raises(FileError, match=r"general\.architecture is missing"):
        _ = GGUFHeader(path).architecture


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    name = struct.pack("<Q", 2) + b"\xff\xfe"
    path.write_bytes(padded(start(n_fields=1) + name + struct.pack("<II", 4, 7)))
    with pytest.raises(FileError, match="has a name that is not UTF-8"):
        GGUFHeader(path)
