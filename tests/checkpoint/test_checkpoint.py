"""Checkpoints: what is saved comes back, and what contradicts the configuration is refused."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from checkpoint_cases import (
    CPU,
    EMBEDDING,
    QKV,
    SOURCE_TOKENIZER,
    TINY,
    TINY_PAIR,
    TOKENIZER,
    change_weights,
    load,
    refusal,
    same,
    saved,
    unread,
)
from kvtool import reading
from kvtool.config import ModelConfig
from kvtool.core import machine
from kvtool.core.checkpoint import checkpoint
from kvtool.core.checkpoint.safetensors_file import SafetensorsFile
from kvtool.errors import CapacityError, CheckFailed, FileError, UsageError

# --- there and back


@pytest.mark.parametrize("config", [TINY, TINY_PAIR], ids=["decoder", "seq2seq"])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_model_gives_the_logits_of_the_saved_one(
    tmp_path: Path, config: ModelConfig, positions: str, tied: bool
) -> None:
    model = saved(tmp_path, config, positions=positions, tied=tied).eval()
    loaded = load(tmp_path)
    tokens = torch.tensor([[1, 5, 9, 2]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.inference_mode():
        found, expected = (
            m(tokens, source=m.encode(tokens, mask) if config.n_encoder_layers else None)
            for m in (loaded, model)
        )
    assert torch.equal(found, expected)
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))


def test_a_loaded_head_is_the_embedding_where_the_configuration_ties_them(tmp_path: Path) -> None:
    saved(tmp_path / "tied")
    saved(tmp_path / "pair", TINY_PAIR)
    saved(tmp_path / "untied", tied=False)
    tied, pair, untied = (load(tmp_path / name) for name in ("tied", "pair", "untied"))
    assert tied.get_parameter("head.weight") is tied.get_parameter(EMBEDDING)
    assert pair.get_parameter("decoder.head.weight") is pair.get_parameter(f"decoder.{EMBEDDING}")
    assert untied.get_parameter("head.weight") is not untied.get_parameter(EMBEDDING)


def test_a_checkpoint_says_all_that_a_command_needs(tmp_path: Path) -> None:
    saved(tmp_path, TINY_PAIR)
    found = checkpoint.load(str(tmp_path), CPU, torch.float32)
    assert found.config == TINY_PAIR
    assert found.tokenizer.fingerprint == TOKENIZER.fingerprint
    assert found.source_tokenizer is not None
    assert found.source_tokenizer.fingerprint == SOURCE_TOKENIZER.fingerprint
    assert found.path == tmp_path
    assert found.sha256 == reading.sha256(tmp_path / "model.safetensors")
    assert not found.model.training


def test_a_decoder_only_checkpoint_has_one_tokenizer(tmp_path: Path) -> None:
    saved(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert checkpoint.load(str(tmp_path), CPU, torch.float32).source_tokenizer is None


def test_saving_returns_the_digest_and_writes_the_same_bytes_each_time(tmp_path: Path) -> None:
    model = saved(tmp_path / "a")
    digest = checkpoint.save(tmp_path / "b" / "c", model, TOKENIZER)
    data = (tmp_path / "b" / "c" / "model.safetensors").read_bytes()
    assert digest == hashlib.sha256(data).hexdigest()
    assert data == (tmp_path / "a" / "model.safetensors").read_bytes()


def test_a_shared_head_is_not_stored_and_other_programs_can_read_the_rest(tmp_path: Path) -> None:
    model = saved(tmp_path)
    path = tmp_path / "model.safetensors"
    expected = {name: w for name, w in model.state_dict().items() if name != "head.weight"}
    assert same(safetensors.torch.load_file(path), expected)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_weights_are_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, data: bytes) -> None:
        if path.name != "model.safetensors":
            return write(path, data)
        assert {entry.name for entry in tmp_path.iterdir()} == {"config.json", "tokenizer.json"}
        raise FileError("disk full")

    write = checkpoint.write_durable
    monkeypatch.setattr(checkpoint, "write_durable", fail)
    with pytest.raises(FileError, match="disk full"):
        saved(tmp_path)


def test_a_source_tokenizer_goes_with_an_encoder_and_with_nothing_else(tmp_path: Path) -> None:
    model = saved(tmp_path)
    with pytest.raises(ValueError, match="source tokenizer"):
        checkpoint.save(tmp_path, model, TOKENIZER, SOURCE_TOKENIZER)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    model = saved(tmp_path / "a")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match=r"file/b: cannot be made \("):
        checkpoint.save(tmp_path / "file" / "b", model, TOKENIZER)


# --- number formats


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32, torch.float64])
def test_every_float_format_is_read_and_converted(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    model = saved(tmp_path).to(stored)
    checkpoint.save(tmp_path, model, TOKENIZER)
    assert checkpoint.load_weights(tmp_path, TINY)[QKV].dtype == stored
    expected = {name: w.to(wanted) for name, w in model.state_dict().items()}
    assert same(dict(load(tmp_path, wanted).state_dict()), expected)


def test_weights_that_overflow_the_wanted_format_are_its_fault_and_not_the_files(
    tmp_path: Path,
) -> None:
    saved(tmp_path)
    change_weights(tmp_path, norm__weight=torch.tensor([1.0, 70_000.0, -1e5, 2.0]))
    message = refusal(tmp_path, UsageError, dtype=torch.float16)
    assert message.startswith("--dtype float16: 2 values of norm.weight are beyond its range")
    assert load(tmp_path, torch.bfloat16)


@pytest.mark.parametrize(("check", "kind"), [(False, FileError), (True, CheckFailed)])
def test_nan_and_infinity_are_counted_in_the_first_tensor_that_has_them(
    tmp_path: Path, check: bool, kind: type[FileError | CheckFailed]
) -> None:
    model = saved(tmp_path)
    qkv = model.get_parameter(QKV).detach().clone()
    qkv[0, 1], qkv[2, 3], qkv[3, 3] = float("nan"), float("inf"), float("-inf")
    change_weights(tmp_path, layers__0__attn__qkv__weight=qkv)
    message = refusal(tmp_path, kind, check=check)
    assert message == f"{tmp_path}/model.safetensors: {QKV} holds 3 NaN or infinite values"
    change_weights(tmp_path, norm__weight=torch.full((4,), float("nan")))
    assert message + ", and so do 1 more tensors" == refusal(tmp_path, kind, check=check)
    assert checkpoint.load_weights(tmp_path, TINY)[QKV].isnan().sum() == 1


# --- what loading costs


def test_loading_draws_nothing_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path)

    def draw(*_: object, **__: object) -> None:
        raise AssertionError("drawn at random, only to be overwritten")

    monkeypatch.setattr(torch.Tensor, "normal_", draw)
    before = torch.get_rng_state()
    assert same(dict(load(tmp_path).state_dict()), dict(model.state_dict()))
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_stays_without_memory(tmp_path: Path) -> None:
    for positions in ("sinusoidal", "rotary"):
        saved(tmp_path, TINY_PAIR, positions=positions)
        loaded = load(tmp_path)
        tables = [m.table for m in loaded.modules() if hasattr(m, "table") and m.table is not None]
        tensors = [t for t in tables if isinstance(t, torch.Tensor)]
        assert len(tensors) == 2
        assert all(not t.is_meta for t in [*tensors, *loaded.parameters()])


def test_a_model_beyond_the_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, d_model=128, n_heads=2)  # 73 kB of float32
    monkeypatch.setattr(machine, "available_bytes", lambda device: 400_000)
    assert load(tmp_path)
    monkeypatch.setattr(SafetensorsFile, "read", unread)
    monkeypatch.setattr(machine, "available_bytes", lambda device: 300_000)
    message = refusal(tmp_path, CapacityError, dtype=torch.float64)
    assert "model.safetensors: needs 0.000771 GiB (0.000279 GiB available)" in message


def test_unknown_memory_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    monkeypatch.setattr(machine, "available_bytes", lambda device: None)
    assert load(tmp_path)


def test_weights_can_be_loaded_for_a_configuration_without_any_other_file(tmp_path: Path) -> None:
    model = saved(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "tokenizer.json").unlink()
    expected = {name: w for name, w in model.state_dict().items() if name != "head.weight"}
    assert same(checkpoint.load_weights(tmp_path, TINY), expected)
    with pytest.raises(FileError, match="lacks 6 of 14 tensors"):
        checkpoint.load_weights(tmp_path, dataclasses.replace(TINY, n_layers=2))


def test_parameters_train_and_own_their_memory(tmp_path: Path) -> None:
    saved(tmp_path)
    parameters = dict(load(tmp_path).named_parameters())
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in parameters.values())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in parameters.values())


def test_no_error_says_more_than_fits_a_screen() -> None:
    error = FileError(10**6 * "a", 10**6 * "b")
    assert len(str(error)) < 4100 and "aaa... bbb" not in str(error)
    assert error.message.endswith("a...") and error.hint.endswith("b...")
