"""Reference logits in files: what was saved comes back, and what is damaged is refused."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from kvtool.core import machine
from kvtool.core.models import Model
from kvtool.core.reference import oracle, reference, reference_file
from kvtool.core.reference.reference import Reference
from kvtool.errors import CapacityError, FileError, UsageError
from small_models import random_model

IDS = [3, 1, 4, 1, 5]
LOGITS = np.random.default_rng(0).normal(size=(5, 23))
GOOD = {"ids.0": np.array(IDS), "logits.0": LOGITS}


def npz(folder: Path, **arrays: object) -> Path:
    """An .npz whose names have an underscore here where the file has a point."""
    named = {name.replace("_", "."): np.asarray(array) for name, array in arrays.items()}
    np.savez_compressed(folder / "r.npz", **named)
    return folder / "r.npz"


def refusal(path: Path) -> str:
    with pytest.raises(FileError) as caught:
        reference.load(path)
    return caught.value.message


# What is right


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    kept = [
        Reference(IDS, LOGITS, "π and\nmore"),
        Reference([7], LOGITS[:1]),
        Reference([1], LOGITS[1:2], ""),
    ]
    reference.save(tmp_path / "r.safetensors", kept)
    found = reference.load(tmp_path / "r.safetensors")
    assert [(r.ids, r.text) for r in found] == [(r.ids, r.text) for r in kept]
    assert all(np.array_equal(a.logits, b.logits) for a, b in zip(found, kept, strict=True))


def test_prompts_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    kept = [Reference([n], LOGITS[:1] + n) for n in range(12)]
    reference.save(tmp_path / "r.safetensors", kept)
    assert [r.ids for r in reference.load(tmp_path / "r.safetensors")] == [[n] for n in range(12)]


@pytest.mark.parametrize("name", ["ids_0 logits_0", "ids logits"])
def test_an_npz_that_numpy_wrote_is_read(tmp_path: Path, name: str) -> None:
    ids, logits = name.split()
    (found,) = reference.load(npz(tmp_path, **{ids: IDS, logits: LOGITS}))
    assert found.ids == IDS and np.array_equal(found.logits, LOGITS) and found.text is None


def test_the_oracle_makes_the_reference_in_float64() -> None:
    model = random_model()
    weights = dict(model.state_dict())
    found = reference.make_reference(weights, model.config, [("a", IDS), ("b", [2])])
    assert [(r.text, r.ids, r.logits.dtype) for r in found] == [
        ("a", IDS, np.float64),
        ("b", [2], np.float64),
    ]
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    assert np.array_equal(found[0].logits, oracle.logits(arrays, model.config, IDS))


# What is refused


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids_0": IDS}, "logits.0 is missing, and ids.0 is there"),
        ({"logits_0": LOGITS}, "ids.0 is missing, and logits.0 is there"),
        ({"ids_0": IDS, "logits_0": LOGITS, "logits_1": LOGITS}, "ids.1 is missing"),
        ({}, "holds no references (expected ids.0 and logits.0)"),
        ({"other": IDS}, "holds 'other' (expected ids.0, logits.0, ids.1 and so on)"),
        ({"ids_0": IDS, "logits_0": LOGITS, "logit_1": LOGITS}, "holds 'logit.1' (expected"),
        ({"ids_007": IDS, "logits_007": LOGITS}, "holds 'ids.007'"),
        ({f"ids_{'9' * 5000}": IDS}, f"holds 'ids.{'9' * 76}...' (expected"),
        ({"ids_²": IDS, "logits_²": LOGITS}, "holds 'ids.²'"),
        ({"ids": IDS, "logits": LOGITS, "ids_0": IDS}, "holds ids and ids.0, which are one"),
        ({"ids_0": IDS, "logits": LOGITS, "logits_0": LOGITS}, "holds logits and logits.0, which"),
        (
            {"ids_0": IDS, "logits_0": LOGITS + 0j},
            "logits.0 is complex128 (expected plain",
        ),
        ({"ids_0": ["a"], "logits_0": LOGITS}, "ids.0 is <U1 (expected plain numbers)"),
        ({"ids_0": [1.0, 2.0], "logits_0": LOGITS[:2]}, "ids.0 is float64 [2] (expected whole"),
        ({"ids_0": [], "logits_0": LOGITS[:0]}, "ids.0 is float64 [0]"),
        ({"ids_0": [IDS], "logits_0": LOGITS}, "ids.0 is int64 [1, 5]"),
        ({"ids_0": 3, "logits_0": LOGITS}, "ids.0 is int64 []"),
        ({"ids_0": IDS, "logits_0": LOGITS[:4]}, "logits.0 is float64 [4, 23]"),
        ({"ids_0": IDS, "logits_0": LOGITS[0]}, "logits.0 is float64 [23]"),
        ({"ids_0": IDS, "logits_0": LOGITS.astype(int)}, "logits.0 is int64 [5, 23]"),
        ({"ids_0": IDS, "logits_0": LOGITS * np.nan}, "logits.0 holds NaN or infinities"),
        ({"ids_0": IDS, "logits_0": LOGITS * np.inf}, "logits.0 holds NaN or infinities"),
        (
            {"ids_0": IDS, "logits_0": LOGITS, "ids_1": IDS, "logits_1": LOGITS.astype("f2")},
            "holds logits of float16 and float64 (expected one)",
        ),
    ],
)
def test_a_file_without_a_whole_reference_is_refused(
    tmp_path: Path, arrays: dict[str, object], message: str
) -> None:
    path = npz(tmp_path, **arrays)
    assert refusal(path).startswith(f"{path}: {message}")


SPRUNG: list[str] = []


def spring(word: str) -> None:
    SPRUNG.append(word)


class Trap:
    """Unpickling it runs code."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return spring, ("code ran",)


def test_pickled_objects_are_refused_and_never_run(tmp_path: Path) -> None:
    path = npz(tmp_path, ids_0=np.array([Trap()], dtype=object), logits_0=LOGITS)
    assert refusal(path) == f"{path}: ids.0 is object (expected plain numbers)"
    path.write_bytes(pickle.dumps(Trap()))
    assert refusal(path) == f"{path}: is not an .npz file (File is not a zip file)"
    assert SPRUNG == []
    pickle.loads(pickle.dumps(Trap()))
    assert SPRUNG == ["code ran"]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    path = npz(tmp_path, ids_0=IDS, logits_0=LOGITS).rename(tmp_path / "r.npz")
    if suffix == ".safetensors":
        path = tmp_path / "r.safetensors"
        reference.save(path, [Reference(IDS, LOGITS)])
    data = path.read_bytes()
    for length in range(1, len(data), 41):
        path.write_bytes(data[:length])
        assert str(path) in refusal(path)


def test_a_damaged_npz_is_refused_or_holds_the_same(tmp_path: Path) -> None:
    path = npz(tmp_path, ids_0=IDS, logits_0=LOGITS)
    data = path.read_bytes()
    refused = 0
    for offset in range(0, len(data), 7):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :])
        try:
            (found,) = reference.load(path)
        except FileError:
            refused += 1
        else:  # a byte that nobody reads, such as a date
            assert found.ids == IDS and np.array_equal(found.logits, LOGITS)
    assert refused > len(data) // 14


def test_what_is_not_a_reference_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    buffer = io.BytesIO()
    np.save(buffer, np.array(IDS))
    path.write_bytes(buffer.getvalue())
    assert refusal(path) == f"{path}: is not an .npz file (File is not a zip file)"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("ids.0.npy", b"no array")
    assert refusal(path).startswith(f"{path}: ")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "is a Git LFS pointer (expected reference logits)" in refusal(path)
    path.write_bytes(b"")
    assert "is empty, 0 bytes" in refusal(path)
    assert "is a folder" in refusal(tmp_path)
    assert "not found (expected reference logits)" in refusal(tmp_path / "none.npz")
    other = tmp_path / "r.bin"
    other.write_bytes(b"x")
    assert refusal(other) == f"--reference {other}: .bin (expected .safetensors or .npz)"


def header(shape: str, descr: str = "'<f8'", fortran: str = "False") -> bytes:
    """The beginning of an .npy file, which may lie."""
    text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def archive(path: Path, *members: tuple[str, bytes]) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, data in members:
            file.writestr(name, data)
    return path


IDS_NPY = ("ids.0.npy", header("(5,)", "'<i8'") + np.array(IDS).tobytes())
LOGITS_NPY = ("logits.0.npy", header("(5, 23)") + LOGITS.tobytes())


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([IDS_NPY, IDS_NPY, LOGITS_NPY], "holds ids.0 twice"),
        ([IDS_NPY, LOGITS_NPY, ("notes.txt", b"x")], "'notes.txt' in it is no array"),
        (
            [IDS_NPY, ("logits.0.npy", header("(5, 23)") + LOGITS.tobytes()[:-8])],
            "logits.0 has 912 bytes (not as many as float64 [5, 23] has)",
        ),
        (
            [IDS_NPY, ("logits.0.npy", header("(5, 1000000000)"))],
            "logits.0 has 0 bytes (not as many as float64 [5, 1000000000] has)",
        ),
        ([IDS_NPY, ("logits.0.npy", header("(5, -23)"))], "logits.0 has 0 bytes (not as many"),
        ([IDS_NPY, ("logits.0.npy", header(f"({'9' * 4000},)"))], "logits.0 has 0 bytes (not"),
        ([IDS_NPY, ("logits.0.npy", header(f"({'9' * 5000},)"))], "is not an .npz file of plain"),
        ([IDS_NPY, ("logits.0.npy", header("(" * 900))], "is not an .npz file of plain arrays ("),
        (
            [IDS_NPY, ("logits.0.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + bytes(2**22))],
            "logits.0 is not an array of plain numbers",
        ),
        ([(f"ids.{i}.npy", b"") for i in range(20_000)], "is not an .npz file (its list of"),
    ],
)
def test_an_archive_that_lies_is_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    found = refusal(archive(tmp_path / "r.npz", *members))
    assert found.startswith(f"{tmp_path / 'r.npz'}: {message}") and "\n" not in found


def test_arrays_by_columns_and_of_the_other_byte_order_are_read(tmp_path: Path) -> None:
    by_columns = np.asfortranarray(LOGITS).astype(">f8", order="F")
    (found,) = reference.load(npz(tmp_path, ids_0=np.array(IDS, ">i2"), logits_0=by_columns))
    assert found.ids == IDS and np.array_equal(found.logits, LOGITS)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_reference_that_fits_no_memory_or_not_the_model_is_refused_unread(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = npz(tmp_path, ids_0=IDS, logits_0=LOGITS)
    if suffix == ".safetensors":
        path = tmp_path / "r.safetensors"
        reference.save(path, [Reference(IDS, LOGITS)])
    for kind in (reference_file.NpzArrays, reference_file.SafetensorsArrays):
        monkeypatch.setattr(kind, "read", None)  # calling it is a TypeError
    monkeypatch.setattr(machine, "available_bytes", lambda device: 900)
    with pytest.raises(CapacityError, match=r"r\..*needs"):
        reference.load(path)
    with pytest.raises(FileError, match=r"logits.0 are over 23 tokens \(the model has 24\)"):
        reference.load(path, random_model(vocab_size=24).config)
    with pytest.raises(CapacityError, match=r"ids.0: is 5 tokens long \(the model holds 4\)"):
        reference.load(path, random_model(context=4).config)


@pytest.mark.parametrize("bad", ['"ids.0": {}, "ids.0"', '"__metadata__": {"a": NaN}, "ids.0"'])
def test_a_header_that_says_two_things_is_refused(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "r.safetensors"
    reference.save(path, [Reference(IDS, LOGITS)])
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].decode().replace('"ids.0"', bad, 1).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert "its header is not valid JSON" in refusal(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_format_that_numpy_does_not_have_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "r.safetensors"
    logits = torch.from_numpy(LOGITS).to(dtype)
    safetensors.torch.save_file({"ids.0": torch.tensor(IDS), "logits.0": logits}, path)
    assert refusal(path).startswith(f"{path}: logits.0 ") and "(expected " in refusal(path)


def test_only_safetensors_are_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has not the suffix"):
        reference.save(tmp_path / "r.npz", [])


@pytest.mark.parametrize(
    ("found", "kind", "message"),
    [
        (
            Reference(IDS, LOGITS[:, :22]),
            FileError,
            "logits.0 are over 22 tokens (the model has 23)",
        ),
        (Reference([3, 1, 4, 1, 23], LOGITS), FileError, "ids.0 are not all within 0 to 22"),
        (Reference([3, 1, 4, 1, -1], LOGITS), FileError, "ids.0 are not all within 0 to 22"),
        (Reference([1] * 65, np.zeros((65, 23))), CapacityError, "ids.0: is 65 tokens long"),
    ],
)
def test_a_reference_of_another_model_is_refused(
    found: Reference, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match="--reference") as caught:
        reference.check_fits([found], random_model().config)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "kind", "message"),
    [([], UsageError, "is empty"), ([1] * 65, CapacityError, "is 65 tokens long .* holds 64")],
)
def test_a_prompt_that_the_model_cannot_read_is_refused(
    ids: list[int], kind: type[Exception], message: str
) -> None:
    model = random_model()
    with pytest.raises(kind, match=message):
        reference.make_reference(dict(model.state_dict()), model.config, [("", ids)])


# The comparison


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(positions="rotary", n_kv_heads=2)


@pytest.fixture(scope="module")
def right(model: Model) -> Reference:
    (found,) = reference.make_reference(dict(model.state_dict()), model.config, [("", IDS)])
    return found


def test_the_right_model_differs_by_rounding(model: Model, right: Reference) -> None:
    rows = reference.compare(
        model, random_model(positions="rotary", n_kv_heads=2).double(), [right]
    )
    assert [(row.prompt, row.position, row.token) for row in rows] == [
        (0, position, token) for position, token in enumerate(IDS)
    ]
    assert max(row.gap_float64 for row in rows) < 1e-14
    assert 0 < max(row.max_difference for row in rows) < 1e-5
    assert max(row.ulps for row in rows) < 64
    assert all(row.same_top1 and 0 <= row.kl < 1e-9 for row in rows)


def test_one_wrong_logit_is_seen_at_its_position_alone(model: Model, right: Reference) -> None:
    logits = right.logits.copy()
    logits[3, 7] += 100.0
    rows = reference.compare(
        model, random_model(positions="rotary", n_kv_heads=2).double(), [Reference(IDS, logits)]
    )
    assert [row.position for row in rows if row.gap_float64 > 1e-12] == [3]
    wrong = rows[3]
    assert abs(wrong.max_difference - 100) < 1e-4 and not wrong.same_top1 and wrong.kl > 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_is_infinitely_wrong(right: Reference, value: float) -> None:
    broken = random_model(positions="rotary", n_kv_heads=2)
    with torch.no_grad():
        broken.norm.weight[0] = value
    rows = reference.compare(broken, broken.double(), [right])
    assert all(row.max_difference == row.gap_float64 == float("inf") for row in rows)
