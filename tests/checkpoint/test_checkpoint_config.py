"""Weights and the configuration beside them: where they do not agree, it is said how."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checkpoint_cases import (
    QKV,
    TINY,
    TINY_PAIR,
    change_config,
    change_weights,
    load,
    refusal,
    same,
    saved,
    unread,
)
from kvtool.core import machine
from kvtool.core.checkpoint import checkpoint, sizes
from kvtool.core.checkpoint.safetensors_file import SafetensorsFile, TensorInfo
from kvtool.errors import CapacityError, FileError


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


@pytest.mark.parametrize("field", ["vocab_size", "norm", "tied", "norm_eps", "model_type", "new"])
@pytest.mark.parametrize("value", [10**6 * "x", 10**5 * ["y"], {10**6 * "z": 1}], ids=type)
def test_a_value_of_a_megabyte_does_not_flood_the_message(
    folder: Path, field: str, value: object
) -> None:
    change_config(folder, **{field: value})
    assert len(refusal(folder).removeprefix(str(folder))) < 400
