"""Checkpoints that torch.save wrote: weights are read, and nothing else ever runs."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_cases import load, refusal, same, saved
from kvtool import reading
from kvtool.core import checkpoint, machine
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
