"""The files that hold weights: every way to be damaged is refused, by name, before it is read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_cases import TINY, load, put_together, refusal, same, saved, take_apart
from kvtool import reading
from kvtool.core.checkpoint import checkpoint, safetensors_header
from kvtool.core.checkpoint.safetensors_file import SafetensorsFile
from kvtool.core.models import Model
from kvtool.errors import FileError, KvtoolError

QKV = "layers.0.attn.qkv.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """What is saved in tmp_path."""
    return saved(tmp_path)


@pytest.fixture
def weights(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid model.safetensors, of which no tensor may be read."""

    def unread(file: SafetensorsFile) -> None:
        raise AssertionError("tensors were read before all checks had passed")

    monkeypatch.setattr(SafetensorsFile, "read", unread)
    return tmp_path / WEIGHTS


# --- one byte wrong anywhere


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path, model: Model) -> None:
    for name in (WEIGHTS, "config.json", "tokenizer.json"):
        path = tmp_path / name
        whole = path.read_bytes()
        # Without its last line break a JSON file is still whole.
        for n in reversed(range(len(whole.rstrip()))):
            os.truncate(path, n)  # 100 times as fast as writing the file anew
            with pytest.raises(FileError):
                load(tmp_path)
        path.write_bytes(whole)


@pytest.mark.parametrize("flipped", [0x01, 0x02, 0xFF])
def test_a_header_with_a_wrong_byte_is_refused_or_changes_nothing(
    tmp_path: Path, model: Model, flipped: int
) -> None:
    path = tmp_path / WEIGHTS
    whole = path.read_bytes()
    expected = checkpoint.load_weights(tmp_path, TINY)
    refused = 0
    n_header = 8 + int.from_bytes(whole[:8], "little")
    with open(path, "r+b", buffering=0) as file:
        for i in range(n_header):
            file.seek(i)
            file.write(bytes([whole[i] ^ flipped]))
            try:
                assert same(checkpoint.load_weights(tmp_path, TINY), expected)
            except FileError:
                refused += 1
            file.seek(i)
            file.write(whole[i : i + 1])
    assert refused > 0.9 * n_header  # the rest is the metadata's text and padding


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I64", "BOOL"]) | JSON,
        "shape": st.lists(st.integers(-1, 2**70), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-8, 72), max_size=3) | JSON,
    }
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(header=st.dictionaries(st.text(max_size=3), ENTRY | JSON, max_size=3) | JSON)
def test_any_json_in_a_header_is_read_as_the_format_says_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.unlink(missing_ok=True)
    put_together(path, header, bytes(64))
    try:
        found, _ = SafetensorsFile(path).read()
    except KvtoolError:
        return
    assert sum(tensor.nbytes for tensor in found.values()) == 64


# --- the length of the header


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**31, 10_000])
def test_a_header_longer_than_its_file_is_refused(weights: Path, length: int) -> None:
    weights.write_bytes(struct.pack("<Q", length) + weights.read_bytes()[8:])
    n = weights.stat().st_size
    assert f"is cut short or no safetensors file ({n} bytes, expected {length + 8}" in refusal(
        weights.parent
    )


def test_a_header_beyond_the_formats_limit_is_refused_unread(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_header, "LARGEST_HEADER", 100)
    assert "bytes (expected 100 or fewer)" in refusal(weights.parent)


def test_a_file_too_short_for_a_length_is_refused(weights: Path) -> None:
    weights.write_bytes(b"\0\0\0")
    assert f"{WEIGHTS}: is cut short or no safetensors file (3 bytes" in refusal(weights.parent)


# --- what is no safetensors file at all


@pytest.mark.parametrize(
    ("data", "found", "hint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html>", "is an HTML page", "Download the file itself"),
        (b"\xef\xbb\xbf\n  <HTML lang=en>", "is an HTML page", "Download the file itself"),
    ],
)
@pytest.mark.parametrize("name", [WEIGHTS, INDEX, "model.pt", "pytorch_model.bin"])
def test_what_a_download_left_in_place_of_a_file_is_named(
    weights: Path, name: str, data: bytes, found: str, hint: str
) -> None:
    weights.unlink()
    (weights.parent / name).write_bytes(data)
    message = refusal(weights.parent)
    assert f"{name}: {found}" in message and hint in message


def test_a_pickle_under_the_name_of_safetensors_is_recognised(weights: Path) -> None:
    torch.save({"a": torch.zeros(2)}, weights)
    message = refusal(weights.parent)
    assert "is a zip archive (expected safetensors). If torch.save wrote it, name it model.pt" in (
        message
    )


# --- what the header says


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("\ud7ff".encode("utf-16").decode("latin-1"), "is not valid JSON"),
        ('{"a":NaN}', "NaN is no JSON number"),
        ('{"a":1' + "0" * 5000 + "}", "is not valid JSON"),
        ('{"a":{},"a":{}}', "a occurs twice"),
        ('{"a":{"dtype":"F32","dtype":"F32"}}', "dtype occurs twice"),
        ("[]", "its header holds no JSON object (found list)"),
        ("7", "its header holds no JSON object (found int)"),
        ({"__metadata__": []}, "__metadata__ in its header is not an object of strings"),
        ({"__metadata__": {"a": 1}}, "__metadata__ in its header is not an object of strings"),
        ({"a": 5}, "a is not described by dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32"}}, "a is not described by dtype, shape and data_offsets"),
    ],
)
def test_a_header_of_another_form_is_refused(weights: Path, header: Any, message: str) -> None:
    put_together(weights, header)
    assert f"{WEIGHTS}: " in refusal(weights.parent)
    assert message in refusal(weights.parent)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "F33", "has dtype F33 (expected one of F32, F16, BF16, F64)"),
        ("dtype", "I64", "has dtype I64 (expected one of F32, F16, BF16, F64)"),
        ("dtype", "F8_E4M3", "has dtype F8_E4M3"),
        ("dtype", ["F32"], "has dtype ['F32']"),
        ("dtype", "F16", "has 192 bytes (expected 96 for [12, 4] of F16)"),
        ("shape", [12, -4], "has shape [12, -4]"),
        ("shape", [12, 4.0], "has shape [12, 4.0]"),
        ("shape", [True, 48], "has shape [True, 48]"),
        ("shape", 48, "has shape 48"),
        ("shape", [1] * 9, "(expected up to 8 whole numbers, none negative)"),
        ("shape", [2**40, 2**40], "(expected more than 2^64 for"),
        ("shape", [13, 4], "has 192 bytes (expected 208 for [13, 4] of F32)"),
        ("data_offsets", [0], "has data_offsets [0]"),
        ("data_offsets", [0, 192.0], "has data_offsets [0, 192.0]"),
        ("data_offsets", [False, 192], "has data_offsets [False, 192]"),
        ("data_offsets", [-192, 0], "has data_offsets [-192, 0]"),
        ("data_offsets", [192, 0], "has data_offsets [192, 0]"),
        ("data_offsets", [10**30, 10**30 + 192], "is cut short"),
        ("data_offsets", [10**300, 10**300 + 192], "is a number of 301 digits"),
    ],
)
def test_a_wrong_field_is_refused_with_its_tensor(
    weights: Path, field: str, value: Any, message: str
) -> None:
    header, data = take_apart(weights)
    header[QKV][field] = value
    put_together(weights, header, data)
    found = refusal(weights.parent)
    assert message in found
    assert QKV in found or "cut short" in message or "digits" in message


def test_bytes_belong_to_exactly_one_tensor(weights: Path) -> None:
    header, data = take_apart(weights)
    first, second = sorted(header, key=lambda name: header[name].get("data_offsets", [9e9]))[:2]
    begin, end = header[second]["data_offsets"]

    header[second]["data_offsets"] = [begin - 4, end - 4]
    put_together(weights, header, data)
    expected = f"{second} overlaps the tensor before it (starts at {begin - 4}, expected {begin})"
    assert expected in refusal(weights.parent)

    header[second]["data_offsets"] = [begin, end]
    del header[first]
    put_together(weights, header, data)
    assert f"{second} follows a gap (starts at {begin}, expected 0)" in refusal(weights.parent)


def test_bytes_after_the_last_tensor_are_refused(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes() + b"\0\0\0")
    assert f"{WEIGHTS}: has 3 bytes after the last tensor" in refusal(weights.parent)


def test_a_cut_in_the_tensors_is_reported_with_both_sizes(weights: Path) -> None:
    n = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-1])
    assert f"is cut short ({n - 1} bytes, expected {n})" in refusal(weights.parent)


def test_tensors_may_lie_in_any_order_and_differ_in_format(tmp_path: Path, model: Model) -> None:
    path = tmp_path / WEIGHTS
    tensors = safetensors.torch.load(path.read_bytes())  # load_file would map what we overwrite
    tensors["norm.weight"] = tensors["norm.weight"].double()
    header, data = {}, b""
    for name in sorted(tensors, reverse=True):
        part = tensors[name].numpy().tobytes()
        dtype = "F64" if name == "norm.weight" else "F32"
        offsets = [len(data), len(data) + len(part)]
        shape = list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += part
    put_together(path, dict(sorted(header.items())), data)
    found, digest = SafetensorsFile(path).read()
    assert same(found, tensors)
    assert digest() == reading.sha256(path)
    assert same(dict(load(tmp_path).state_dict()), dict(model.state_dict()))


def test_long_names_do_not_flood_the_message(weights: Path) -> None:
    put_together(weights, {"x" * 10_000: 5})
    assert len(refusal(weights.parent)) < 1000


def test_a_file_replaced_between_check_and_reading_is_noticed(tmp_path: Path, model: Model) -> None:
    path = tmp_path / WEIGHTS
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileError, match="became shorter while it was read"):
        file.read()
    put_together(path, {})
    with pytest.raises(FileError, match="changed while it was read"):
        file.read()


# --- shards


def shard(folder: Path, model: Model, places: Callable[[str], str]) -> dict[str, str]:
    """Store each tensor in the file that `places` says, with an index, and return that."""
    tensors = {name: w for name, w in model.state_dict().items() if name != "head.weight"}
    index = {name: places(name) for name in tensors}
    for place in set(index.values()):
        part = {name: tensors[name].contiguous() for name in tensors if index[name] == place}
        (folder / place).write_bytes(safetensors.torch.save(part))
    write_index(folder, index)
    (folder / WEIGHTS).unlink(missing_ok=True)
    return index


def write_index(folder: Path, index: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))


def by_layer(name: str) -> str:
    return "part-2.safetensors" if name.startswith("layers") else "part-1.safetensors"


def test_shards_load_like_one_file(tmp_path: Path, model: Model) -> None:
    shard(tmp_path, model, by_layer)
    assert same(dict(load(tmp_path).state_dict()), dict(model.state_dict()))


def test_one_file_is_preferred_to_shards_and_shards_to_a_pickle(
    tmp_path: Path, model: Model
) -> None:
    torch.save({}, tmp_path / "model.pt")
    assert load(tmp_path)
    write_index(tmp_path, {"a": "nowhere"})
    assert load(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    assert "nowhere: not found (a shard that " in refusal(tmp_path)
    (tmp_path / INDEX).unlink()
    assert "model.pt: lacks 8 of 8 tensors" in refusal(tmp_path)


@pytest.mark.parametrize("place", ["../stolen", "/etc/x", "a/b", "..", ".", "", "a\\b", "a\0b"])
def test_an_index_opens_nothing_outside_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    model = saved(tmp_path / "model")
    index = shard(tmp_path / "model", model, by_layer)
    (tmp_path / "model" / "part-2.safetensors").rename(tmp_path / "stolen")
    for name, shard_name in index.items():
        index[name] = place if shard_name == "part-2.safetensors" else shard_name
    write_index(tmp_path / "model", index)
    opened: list[Path] = []
    monkeypatch.setattr(SafetensorsFile, "__init__", lambda self, path: opened.append(path))
    message = refusal(tmp_path / "model")
    assert f"{INDEX}: places layers." in message and "(expected a file name)" in message
    assert not opened


def test_an_absent_shard_is_named_and_no_other_is_offered_for_it(
    weights: Path, model: Model
) -> None:
    index = shard(weights.parent, model, by_layer)
    n = len(set(index.values()))
    (weights.parent / "part-2.safetensors").unlink()
    message = refusal(weights.parent)
    assert f"part-2.safetensors: not found (a shard that {INDEX} lists). Download" in message
    (weights.parent / "part-1.safetensors").unlink()
    message = refusal(weights.parent)
    assert f"part-1.safetensors: not found (2 of {n} shards are missing that {INDEX}" in message


def test_an_index_agrees_with_its_shards(weights: Path, model: Model) -> None:
    folder = weights.parent
    index = shard(folder, model, by_layer)
    write_index(folder, {**index, QKV: "part-1.safetensors"})
    assert f"places {QKV} in part-1.safetensors, which does not hold it" in refusal(folder)
    del index[QKV]
    write_index(folder, index)
    assert f"does not list {QKV}, which part-2.safetensors holds" in refusal(folder)


@pytest.mark.parametrize("index", [[], None, {"a": 5}, "x"])
def test_an_index_without_file_names_is_refused(weights: Path, index: Any) -> None:
    weights.unlink()
    write_index(weights.parent, index)
    assert f"{INDEX}: weight_map is not an object of file names" in refusal(weights.parent)


def test_a_damaged_shard_is_refused_under_its_own_name(weights: Path, model: Model) -> None:
    shard(weights.parent, model, by_layer)
    path = weights.parent / "part-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "part-1.safetensors: is cut short" in refusal(weights.parent)
