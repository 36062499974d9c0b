"""A promoted file has the same numbers, bit for bit, and all else that the first one said."""

from __future__ import annotations

import os
import resource
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from gguf_files import Made
from kvtool.core.checkpoint.gguf import formats, promote
from kvtool.core.checkpoint.gguf.header import GGUFHeader
from kvtool.errors import CapacityError, FileError, UsageError

KNOWN = [f.name for f in formats.FORMATS.values() if f.number in gguf.quants._type_traits]


def promoted(source: Path, out: Path, layers: int | None = None) -> Path:
    promote.write(promote.plan(GGUFHeader(source), layers), out, lambda n, name: None)
    return out


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def raw_file(path: Path, kind: Type, n_rows: int = 7, n_values: int = 512) -> Path:
    """A file of one tensor of `kind`: random bytes that are finite numbers of any kind."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    drawn = np.random.default_rng(int(kind))
    data = drawn.integers(0, 60, (n_rows, n_values // block * nbytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.a.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["F32", "F16", *KNOWN])
def test_a_tensor_of_any_format_is_what_gguf_dequantises(name: str, tmp_path: Path) -> None:
    kind = getattr(Type, name)
    source = raw_file(tmp_path / "raw.gguf", kind)
    (before,) = gguf.GGUFReader(source).tensors
    expected = gguf.dequantize(before.data, kind)
    (after,) = gguf.GGUFReader(promoted(source, tmp_path / "f32.gguf")).tensors
    assert after.tensor_type == Type.F32
    assert after.data.shape == expected.shape
    assert np.array_equal(after.data.view(np.uint32), expected.view(np.uint32))


def test_pieces_of_a_large_tensor_are_put_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(formats, "PIECE", 700)  # cuts rows, and is no whole number of blocks
    source = Made().write(tmp_path / "a.gguf")
    theirs = gguf.GGUFReader(source).tensors
    ours = gguf.GGUFReader(promoted(source, tmp_path / "b.gguf")).tensors
    for a, b in zip(theirs, ours, strict=True):
        assert a.name == b.name
        assert np.array_equal(gguf.dequantize(a.data, a.tensor_type), b.data)


def test_all_fields_and_the_order_of_tensors_are_kept_but_for_the_file_type(
    tmp_path: Path,
) -> None:
    source = Made("qwen2").write(tmp_path / "a.gguf")
    out = promoted(source, tmp_path / "b.gguf")
    before, after = fields(source), fields(out)
    assert list(before) == list(after)
    assert {name for name in before if before[name] != after[name]} == {"general.file_type"}
    assert after["general.file_type"] == 0
    names = [[t.name for t in gguf.GGUFReader(path).tensors] for path in (source, out)]
    assert names[0] == names[1]
    assert out.stat().st_size == promote.plan(GGUFHeader(source)).nbytes


def test_the_first_blocks_alone_make_a_smaller_model(tmp_path: Path) -> None:
    made = Made(n_layers=3)
    source = made.write(tmp_path / "a.gguf")
    out = promoted(source, tmp_path / "b.gguf", layers=2)
    assert fields(out)["llama.block_count"] == 2
    names = [t.name for t in gguf.GGUFReader(out).tensors]
    assert names == [n for n in made.shapes if not n.startswith("blk.2.")]
    with pytest.raises(UsageError, match=r"--layers 4: .* has 3 blocks"):
        promote.plan(GGUFHeader(source), 4)


def test_whole_numbers_stay_and_an_unknown_quantisation_is_named(tmp_path: Path) -> None:
    whole = raw_file(tmp_path / "i32.gguf", Type.I32, n_values=4)
    out = promoted(whole, tmp_path / "b.gguf")
    pair = [gguf.GGUFReader(path).tensors[0] for path in (whole, out)]
    assert [t.tensor_type for t in pair] == [Type.I32, Type.I32]
    assert np.array_equal(pair[0].data, pair[1].data)
    source = raw_file(tmp_path / "q8k.gguf", Type.Q8_K)
    with pytest.raises(FileError, match=r"blk\.0\.a\.weight is Q8_K, which the package gguf can"):
        promote.plan(GGUFHeader(source))


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path: Path) -> None:
    source = Made().write(tmp_path / "a.gguf")
    found, out = promote.plan(GGUFHeader(source)), tmp_path / "b.gguf"

    def stopped(n: int, name: str) -> None:
        if name.startswith("blk.1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        promote.write(found, out, stopped)
    assert os.listdir(tmp_path) == ["a.gguf"]
    with pytest.raises(FileError, match=r"--out .*a\.gguf: is there already"):
        promote.require_room(found, source)

    def comes_between(n: int, name: str) -> None:
        out.write_bytes(b"mine")

    with pytest.raises(FileError, match="is there already"):
        promote.write(found, out, comes_between)
    assert out.read_bytes() == b"mine" and sorted(os.listdir(tmp_path)) == ["a.gguf", "b.gguf"]


def test_what_does_not_fit_on_the_disk_is_refused_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = promote.plan(GGUFHeader(Made().write(tmp_path / "a.gguf")))

    class Disk:
        free = found.nbytes - 1

    monkeypatch.setattr(promote.shutil, "disk_usage", lambda path: Disk)
    with pytest.raises(CapacityError, match=r"b\.gguf: needs .* MiB \(.* MiB free\)"):
        promote.require_room(found, tmp_path / "b.gguf")
    Disk.free += 1
    assert promote.require_room(found, tmp_path / "b.gguf") == found.nbytes


def test_a_file_that_is_cut_while_it_is_read_leaves_nothing(tmp_path: Path) -> None:
    source = Made().write(tmp_path / "a.gguf")
    found = promote.plan(GGUFHeader(source))
    os.truncate(source, source.stat().st_size - 5000)
    with pytest.raises(FileError, match="became shorter while it was read"):
        promote.write(found, tmp_path / "b.gguf", lambda n, name: None)
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_no_more_is_held_than_a_piece(tmp_path: Path) -> None:
    source = raw_file(tmp_path / "a.gguf", Type.Q8_0, n_rows=4096, n_values=4096)
    found = promote.plan(GGUFHeader(source))
    formats.need_gguf()  # what it imports is not counted
    tracemalloc.start()
    promote.write(found, tmp_path / "b.gguf", lambda n, name: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.nbytes > 2**26 and peak < 2**25  # 64 MiB are written


@pytest.mark.parametrize("formats", [("F32",), ("Q4_1",)])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_a_disk_that_fills_up_is_said_of_the_file_that_is_written(
    tmp_path: Path, part: float, formats: tuple[str, ...]
) -> None:
    found = promote.plan(GGUFHeader(Made(formats=formats).write(tmp_path / "a.gguf")))
    out = tmp_path / "b.gguf"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    most = found.start + int((found.nbytes - found.start) * part)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        with pytest.raises(FileError, match=r"^--out .*b.gguf: cannot be written \(File too large"):
            promote.write(found, out, lambda n, name: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
