"""Checkpoints: what is saved comes back, and what contradicts the configuration is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

from checkpoint_cases import (
    CPU,
    SOURCE_TOKENIZER,
    TINY,
    TINY_PAIR,
    TOKENIZER,
    load,
    refusal,
    same,
    saved,
)
from kvtool import reading
from kvtool.config import ModelConfig
from kvtool.core import machine
from kvtool.core.checkpoint import checkpoint, sizes
from kvtool.core.checkpoint.safetensors_file import SafetensorsFile, TensorInfo
from kvtool.errors import CapacityError, CheckFailed, FileError, UsageError

EMBEDDING, QKV = "embed.tokens.weight", "layers.0.attn.qkv.weight"


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of model.safetensors; `__` in a name is a dot."""
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    for name, tensor in changes.items():
        weights.pop(name.replace("__", "."), None)
        if tensor is not None:
            weights[name.replace("__", ".")] = tensor
    path.write_bytes(safetensors.torch.save(weights))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


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


def unread(file: SafetensorsFile) -> None:
    raise AssertionError("tensors were read before all checks had passed")


# --- against the configuration


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid checkpoint, of which no tensor may be read."""
    saved(tmp_path)
    monkeypatch.setattr(SafetensorsFile, "read", unread)
    return tmp_path


def test_missing_tensors_are_counted_and_ten_are_named(folder: Path) -> None:
    change_config(folder, n_layers=3)
    message = refusal(folder)
    assert "lacks 12 of 20 tensors (layers.1.norm1.weight, layers.1.attn.qkv.weight" in message
    assert message.count("layers.") == 10
    assert "layers.2.mlp.up.weight, ...)" not in message and message.endswith(", ...)")


def test_extra_tensors_are_named(folder: Path) -> None:
    change_weights(folder, lora__a=torch.zeros(1))
    assert "holds 1 tensors that the model of config.json does not have (lora.a)" in refusal(folder)


def test_renamed_tensors_are_shown_beside_the_missing_ones(folder: Path) -> None:
    change_weights(folder, norm__weight=None, module__norm__weight=torch.ones(4))
    message = refusal(folder)
    assert "lacks 1 of 8 tensors (norm.weight)" in message
    assert "It holds others instead: module.norm.weight." in message


def test_a_wrong_shape_is_shown_beside_the_right_one(folder: Path) -> None:
    change_weights(folder, layers__0__attn__qkv__weight=torch.zeros(4, 11))
    message = refusal(folder)
    assert f"model.safetensors: {QKV} has shape [4, 11] (expected [12, 4])" in message
    assert "transposed" not in message


def test_a_transposed_matrix_is_recognised(folder: Path) -> None:
    change_weights(folder, layers__0__attn__qkv__weight=torch.zeros(4, 12))
    message = refusal(folder)
    assert f"{QKV} has shape [4, 12] (expected [12, 4]). It looks transposed" in message


def test_an_untied_model_without_its_head_lacks_a_tensor(folder: Path) -> None:
    change_config(folder, tied=False)
    assert "lacks 1 of 9 tensors (head.weight)" in refusal(folder)


def test_a_stored_head_must_equal_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    model = saved(tmp_path)
    head = model.get_parameter("head.weight").detach().clone()
    change_weights(tmp_path, head__weight=head)
    assert same(dict(load(tmp_path).state_dict()), dict(model.state_dict()))
    assert "head.weight" not in checkpoint.load_weights(tmp_path, TINY)
    head[3, 1] += 1
    change_weights(tmp_path, head__weight=head)
    assert "head.weight differs from embed.tokens.weight" in refusal(tmp_path)
    change_weights(tmp_path, head__weight=head[:5])
    assert "head.weight has shape [5, 4] (expected [12, 4])" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 2**30}, "holds 8 tensors (expected 6442450944 or more for the 1073741824"),
        ({"n_layers": 2**62}, "too large"),
        ({"vocab_size": 2**31 - 1}, "embed.tokens.weight has shape [12, 4]"),
        ({"d_ff": 2**31 - 1}, "mlp.up.weight has shape [6, 4] (expected [2147483647, 4])"),
        ({"d_model": 2**31 - 2, "d_ff": 6}, "implies a tensor of 4611686009837453316 values"),
        ({"vocab_size": 0}, "too small"),
        ({"d_model": -1}, "too small"),
        ({"n_heads": 3}, "do not divide"),
        ({"model_type": "bert"}, "model_type 'bert' is not supported"),
        ({"tied": "no"}, "tied: 'no' is not true or false"),
        ({"bias": []}, "bias: [] is not true or false"),
        ({"positions": 5}, "--positions: 5 is not known"),
        ({"rope_theta": 10**39}, "rope_theta: 1000"),
        ({"rope_theta": 10**400}, "is a number of 401 digits"),
    ],
)
def test_a_config_bomb_costs_nothing(
    folder: Path, changes: dict[str, object], message: str
) -> None:
    change_config(folder, **changes)
    assert message in refusal(folder)


def test_a_number_of_too_many_digits_is_refused(folder: Path) -> None:
    """Python turns no text of more than 4,300 digits into a number, and says so in ValueError."""
    (folder / "config.json").write_text('{"d_ff": 1' + "0" * 5000 + "}")
    assert "config.json: is not valid JSON" in refusal(folder)


@pytest.mark.parametrize("context", [2**31 - 1, 2 * 10**7])
def test_a_context_out_of_proportion_to_the_weights_is_refused_before_its_table_is_made(
    folder: Path, context: int
) -> None:
    saved(folder, d_model=16)
    change_config(folder, context=context)
    message = refusal(folder)
    assert f"config.json: context {context} takes {context / 2**23:.3g} GiB of tables" in message
    assert "(expected 0.25 GiB or less, beside its weights)" in message


@pytest.mark.parametrize(("nbytes", "fits"), [(2**28, True), (2**28 + 1, False), (4 * 2**34, True)])
def test_a_million_positions_fit_beside_the_weights_of_a_model_that_has_them(
    nbytes: int, fits: bool
) -> None:
    weights = 2**34 if nbytes > 2**31 else 8
    source = SimpleNamespace(tensors={"a": TensorInfo(torch.float16, (weights // 2,), 0, weights)})
    with nullcontext() if fits else pytest.raises(FileError, match="beside its weights"):
        sizes.require_tables(Path("config.json"), nbytes, source)


def test_a_context_beyond_the_memory_is_refused_before_its_table_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_config(folder, context=2**23)
    monkeypatch.setattr(machine, "available_bytes", lambda device: 2**29)
    message = refusal(folder, CapacityError)
    assert "config.json: context 8388608: needs 0.75 GiB (0.5 GiB available)" in message


def test_a_configuration_is_no_gigabyte_of_holes(folder: Path) -> None:
    with open(folder / "config.json", "ab") as file:
        file.truncate(3 * 2**30)
    message = refusal(folder)
    assert "config.json: is too large for a configuration (3,221,225,472 bytes, expected" in message


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_web_page_or_a_pointer_in_place_of_a_small_file_is_recognised(
    folder: Path, name: str
) -> None:
    (folder / name).write_text("\n <!DOCTYPE html><html>")
    assert f"{name}: is an HTML page (expected a" in refusal(folder)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert f"{name}: is a Git LFS pointer" in refusal(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_what_is_no_file_is_refused_without_being_opened(folder: Path, name: str) -> None:
    (folder / name).rename(folder / name.replace(".", "s."))  # a name like it is no other
    absent = "not a checkpoint folder" if name == "config.json" else "not found"
    assert f"{name}: {absent}" in refusal(folder)
    assert "Did you mean" not in refusal(folder)
    (folder / name).mkdir()
    assert f"{name}: is a folder" in refusal(folder)
    (folder / name).rmdir()
    os.mkfifo(folder / name)  # opening it would wait for ever
    assert f"{name}: is not a regular file" in refusal(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert f"{name}: is not a regular file" in refusal(folder)
    (folder / name).unlink()
    (folder / name).write_bytes(b"")
    assert f"{name}: is empty, 0 bytes" in refusal(folder)


def test_a_missing_folder_is_named_with_its_neighbour(folder: Path) -> None:
    shutil.copytree(folder, folder / "my-model")
    assert "not found" in refusal(folder / "my-modle")
    assert f"Did you mean {folder / 'my-model'}?" in refusal(folder / "my-modle")


def test_a_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a", vocab_size=9)
    assert "tokenizer.json: has 10 tokens (expected 9 or fewer" in refusal(tmp_path / "a")
    saved(tmp_path / "b", TINY_PAIR, source_vocab_size=10)
    assert "source.json: has 11 tokens (expected 10 or fewer" in refusal(tmp_path / "b")


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


@pytest.mark.parametrize("field", ["vocab_size", "norm", "tied", "norm_eps", "model_type", "new"])
@pytest.mark.parametrize("value", [10**6 * "x", 10**5 * ["y"], {10**6 * "z": 1}], ids=type)
def test_a_value_of_a_megabyte_does_not_flood_the_message(
    folder: Path, field: str, value: object
) -> None:
    change_config(folder, **{field: value})
    assert len(refusal(folder).removeprefix(str(folder))) < 400


def test_no_error_says_more_than_fits_a_screen() -> None:
    error = FileError(10**6 * "a", 10**6 * "b")
    assert len(str(error)) < 4100 and "aaa... bbb" not in str(error)
    assert error.message.endswith("a...") and error.hint.endswith("b...")
