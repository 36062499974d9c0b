"""Checkpoints that torch.save wrote: weights are read, and nothing else ever runs."""

from __future__ import annotations

import io
import pickle as pickle_errors
import signal
import struct
import tarfile
import zipfile
from collections import OrderedDict
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_cases import load, refusal, same, saved
from kvtool import reading
from kvtool.core import machine
from kvtool.core.checkpoint import checkpoint, pickle_walk, pickled_file
from kvtool.core.models import Model
from kvtool.errors import CapacityError, FileError

QKV = "layers.0.attn.qkv.weight"


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """What tmp_path holds all but the weights of."""
    model = saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    return model


@pytest.fixture
def pickle(tmp_path: Path, model: Model) -> Path:
    """Where the weights may be."""
    return tmp_path / "model.pt"


class Code:
    """Runs when it is unpickled."""

    ran = False

    def __reduce__(self) -> Any:
        return setattr, (Code, "ran", True)


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("wrapper", ["", "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_state_dict_loads(
    tmp_path: Path, model: Model, name: str, wrapper: str, zipped: bool
) -> None:
    state = {key: value for key, value in model.state_dict().items() if key != "head.weight"}
    found = {wrapper: state, "step": 7} if wrapper else state
    torch.save(found, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert same(dict(load(tmp_path).state_dict()), dict(model.state_dict()))
    digest = checkpoint.load(str(tmp_path), torch.device("cpu"), torch.float32).sha256
    assert digest == reading.sha256(tmp_path / name)


def test_pickled_views_become_weights_of_their_own(tmp_path: Path, model: Model) -> None:
    state = dict(model.state_dict())  # with the head, which shares the embedding's memory
    state[QKV] = state[QKV].T.contiguous().T
    state["norm.weight"] = torch.ones(1).expand(4)
    torch.save(state, tmp_path / "model.pt")
    loaded = load(tmp_path)
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    for parameter in loaded.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


@pytest.mark.parametrize("found", [{"a": Code()}, torch.nn.Linear(2, 2)], ids=["call", "module"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_does_not_run(
    pickle: Path, found: Any, zipped: bool
) -> None:
    torch.save(found, pickle, _use_new_zipfile_serialization=zipped)
    message = refusal(pickle.parent)
    assert "holds code objects, which kvtool never runs (expected tensors)" in message
    assert message.endswith("Save a state_dict or safetensors.")
    assert not Code.ran


def test_a_torchscript_program_is_refused_as_code(
    pickle: Path, recwarn: pytest.WarningsRecorder
) -> None:
    torch.save({}, pickle)
    with zipfile.ZipFile(pickle, "a") as archive:
        archive.writestr("model/constants.pkl", b"")  # by this name torch knows a program
    assert "model.pt: holds code objects" in refusal(pickle.parent)
    assert not recwarn.list  # one error line, and no torch warning before it


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (torch.zeros(2), "holds no state_dict (found Tensor)"),
        ([1], "holds no state_dict (found list)"),
        ({"a": 5}, "a is of type int (expected a named tensor)"),
        ({5: torch.zeros(2)}, "5 is of type Tensor (expected a named tensor)"),
        ({"a": torch.zeros(2, dtype=torch.int64)}, "a has dtype int64 (expected one of F32"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "a has dtype complex64"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "a is torch.sparse_coo on cpu (expected dense)"),
        ({"a": torch.zeros(2, device="meta")}, "a is torch.strided on meta (expected dense)"),
        ({}, "lacks 8 of 8 tensors"),
    ],
)
def test_a_pickle_of_anything_but_weights_is_refused(
    pickle: Path, found: Any, message: str
) -> None:
    torch.save(found, pickle)
    assert f"model.pt: {message}" in refusal(pickle.parent)


def test_a_damaged_pickle_is_refused_without_advice_to_run_it(pickle: Path, model: Model) -> None:
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer, _use_new_zipfile_serialization=zipped)
        whole = buffer.getvalue()
        for n in range(1, len(whole), 97):
            pickle.write_bytes(whole[:n])
            message = refusal(pickle.parent)
            assert "model.pt: is damaged or no PyTorch file (" in message
            assert "weights_only" not in message


def test_a_pickle_with_a_wrong_byte_is_refused_or_loads(tmp_path: Path, model: Model) -> None:
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    whole = path.read_bytes()
    refused = set()
    with open(path, "r+b", buffering=0) as file:
        for i in range(len(whole) - 1200, len(whole), 3):  # the table of contents
            file.seek(i)
            file.write(bytes([whole[i] ^ 0xFF]))
            try:
                load(tmp_path)
            except FileError as error:
                refused.add(type(error.__cause__).__name__)
            file.seek(i)
            file.write(whole[i : i + 1])
    assert refused >= {"BadZipFile", "UnicodeDecodeError"}


def test_a_pickle_that_inflates_beyond_the_memory_is_refused_before_it_is_opened(
    pickle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(pickle, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1_000_000))
    assert pickle.stat().st_size < 2000
    monkeypatch.setattr(machine, "available_bytes", lambda device: 500_000)
    assert "model.pt: needs 0.000931 GiB" in refusal(pickle.parent, CapacityError)


# --- pickles that would build what nobody asked for


def step(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


# A tuple that holds itself doubled sixty times: three bytes a doubling, 2^60 numbers to hash.
DOUBLED = b"K\x01\x85q\x00" + 60 * b"h\x00\x86q\x00"
MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
STORAGE = step("storage") + b"ctorch\nFloatStorage\n"
BOMBS = {
    "a key": b"}" + DOUBLED + b"K\x01s",
    "a key among others": b"}(" + DOUBLED + b"K\x01u",
    "a storage's kind": b"(" + DOUBLED + b"tQ",
    "a storage's key": b"(" + STORAGE + DOUBLED + step("cpu") + b"K\x04tQ",
    "a key of an ordered dictionary": b"ccollections\nOrderedDict\n(](" + DOUBLED + b"K\x01\x86etR",
    "an element of a set": b"cbuiltins\nset\n(](" + DOUBLED + b"etR",
    "a size": b"ctorch\nSize\n" + DOUBLED + b"\x85R",
    "a device": b"ctorch\ndevice\n" + DOUBLED + b"\x85R",
}


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def write_zip(path: Path, body: bytes, **others: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(body))
        for name, data in {"byteorder": b"little", "version": b"3\n", **others}.items():
            archive.writestr(f"archive/{name}", data)


def write_legacy(path: Path, *bodies: bytes) -> None:
    usual = (MAGIC, b"M\xe9\x03", b"}", b"}", b"]")
    path.write_bytes(b"".join(map(pickled, [*bodies, *usual[len(bodies) :]])))


@pytest.mark.parametrize("what", BOMBS)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_be_hashed_or_printed_for_ever_is_refused(
    pickle: Path, what: str, zipped: bool
) -> None:
    with pytest.raises(pickle_walk.Refused):  # and if not, this test fails, and does not hang
        pickle_walk.walk(io.BytesIO(pickled(BOMBS[what])))
    if zipped:
        write_zip(pickle, BOMBS[what])
    else:
        write_legacy(pickle, MAGIC, b"M\xe9\x03", b"}", BOMBS[what])
    assert pickle.stat().st_size < 1000
    assert "model.pt: is damaged or no PyTorch file (" in refusal(pickle.parent)


def test_the_small_pickles_of_the_old_format_are_bounded_too(pickle: Path) -> None:
    write_legacy(pickle)
    assert "lacks 8 of 8 tensors" in refusal(pickle.parent)
    write_legacy(pickle, DOUBLED)
    assert "(it does not begin as torch.save begins it)" in refusal(pickle.parent)
    write_legacy(pickle, MAGIC, DOUBLED)
    assert "(it does not begin as torch.save begins it)" in refusal(pickle.parent)
    write_legacy(pickle, MAGIC, b"M\xe9\x03", b"}", b"}", b"](" + DOUBLED + b"e")
    assert "(its keys are no list of strings)" in refusal(pickle.parent)


def test_what_is_not_hashed_may_be_nested_and_is_no_tensor(pickle: Path) -> None:
    write_zip(pickle, b"}" + step("a") + DOUBLED + b"s")
    assert "model.pt: a is of type tuple (expected a named tensor)" in refusal(pickle.parent)


def test_memory_that_only_a_pickle_asks_for_is_refused(pickle: Path) -> None:
    write_zip(pickle, b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R")
    assert "holds code objects" in refusal(pickle.parent)
    huge = b"(" + STORAGE + step("0") + step("cpu") + b"\x8a\x06\0\0\0\0\0\x01"
    write_legacy(pickle, MAGIC, b"M\xe9\x03", b"}", huge + b"NtQ", b"](" + step("0") + b"e")
    assert "(it has fewer values than it says)" in refusal(pickle.parent)
    write_zip(pickle, huge + b"tQ", **{"data/0": bytes(16)})
    assert "(0 has other values than it says)" in refusal(pickle.parent)


class Calls:
    """Is pickled as what a call makes, with attributes set on it."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("zipped", [True, False])
def test_attributes_in_place_of_methods_do_nothing(
    pickle: Path, model: Model, zipped: bool
) -> None:
    weights = {name: value for name, value in model.state_dict().items() if name != "head.weight"}
    make, hides = torch._utils._rebuild_parameter_with_state, {"detach": OrderedDict()}
    hidden = {name: Calls(make, (w, False, OrderedDict(), hides)) for name, w in weights.items()}
    torch.save(hidden, pickle, _use_new_zipfile_serialization=zipped)
    assert "holds code objects" in refusal(pickle.parent)
    methods = dict.fromkeys(("items", "get", "keys", "values", "__len__"), 7)
    state = Calls(OrderedDict, ([*weights.items()],), methods)
    torch.save(state, pickle, _use_new_zipfile_serialization=zipped)
    assert same(dict(load(pickle.parent).state_dict()), dict(model.state_dict()))


def test_a_value_that_a_stride_repeats_without_end_is_refused(pickle: Path) -> None:
    torch.save({"a": torch.ones(1).expand(2**40)}, pickle)
    message = refusal(pickle.parent)
    assert (
        "its tensors repeat values (they have 4,398,046,511,104 bytes, but it holds 4)" in message
    )


def test_steps_without_end_are_refused(pickle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_walk, "MAX_STEPS", 1000)
    write_zip(pickle, 999 * b"]0" + b"}")
    assert "is no step of a state_dict" in refusal(pickle.parent)  # torch's reader drops nothing
    write_zip(pickle, 1001 * b"]" + b"}")
    assert "(it takes more than 1,000 steps)" in refusal(pickle.parent)
    monkeypatch.setattr(pickled_file, "MAX_PICKLE_BYTES", 100)
    write_zip(pickle, 101 * b"]" + b"}")
    assert "(its pickle is too large)" in refusal(pickle.parent)


# --- archives that two readers would see in two ways


def test_an_archive_has_one_table_of_contents_at_its_end(pickle: Path, model: Model) -> None:
    torch.save(model.state_dict(), pickle)
    whole = pickle.read_bytes()
    for changed in (whole + b"\0", b"PK\x03\x04" + whole, whole + whole, whole[:-2] + b"\1\0x"):
        pickle.write_bytes(changed)
        assert "model.pt: is damaged or no PyTorch file (" in refusal(pickle.parent)


def test_no_two_files_of_an_archive_have_one_name_or_bytes(
    pickle: Path, recwarn: pytest.WarningsRecorder
) -> None:
    write_zip(pickle, b"}", **{"DATA.pkl": pickled(BOMBS["a key"])})  # torch ignores the case
    assert "(two files have one name)" in refusal(pickle.parent)
    write_zip(pickle, b"}")
    with zipfile.ZipFile(pickle, "a") as archive:
        entry = copy(archive.infolist()[0])
        entry.filename = entry.orig_filename = "archive/data/0"
        archive.filelist.append(entry)
        archive._didModify = True
    assert "(files in it overlap)" in refusal(pickle.parent)


def test_a_tar_archive_is_never_opened_as_one(pickle: Path) -> None:
    """torch looks for the oldest format first, by a reader of archives of all kinds."""
    write_legacy(pickle)
    head = tarfile.TarInfo().tobuf()
    pickle.write_bytes(head + pickle.read_bytes())
    assert "(it is a tar archive)" in refusal(pickle.parent)


def test_what_torch_advises_is_never_shown(pickle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def advise(*given: Any, **options: Any) -> None:
        raise pickle_errors.UnpicklingError("Weights only load failed. Use weights_only=False")

    write_zip(pickle, b"}")
    monkeypatch.setattr(torch, "load", advise)
    message = refusal(pickle.parent)
    assert "weights_only" not in message and "(UnpicklingError)" in message


def test_signals_end_torchs_reader_at_once(pickle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the main thread in native code, where a handler of Python's would wait."""
    seen = []

    def look(*given: Any, **options: Any) -> dict[str, Any]:
        seen.append(signal.getsignal(signal.SIGTERM))
        return {}

    write_zip(pickle, b"}")
    monkeypatch.setattr(torch, "load", look)
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        refusal(pickle.parent)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIG_DFL]
