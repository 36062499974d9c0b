"""Every document names the model that it is of, its weights and the format they were run in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_cases
import family_cases
from cli_probe import Ran
from kvtool import files
from kvtool.core.cache import settings_of
from kvtool.core.verify.hf.folder import read_folder
from kvtool.registry import CACHE_SETTINGS
from small_models import answer, save_decoder

small_array = bench_cases.small_array
COMMANDS = {
    "generate": ["--prompt", "To be", "--max-tokens", "2"],
    "verify-logits": ["--against", "numpy", "--prompt", "To"],
    "verify-cache": ["--caches", "static", "--tokens", "3", "--scenarios", "decode"],
    "bench": ["--lengths", "2", "--caches", "int8", "--repeats", "1", "--prompt-length", "4"],
}
WITHOUT_TOKENIZER = {**COMMANDS, "verify-logits": ["--against", "numpy"]}
del WITHOUT_TOKENIZER["generate"]  # it needs one


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"), n_layers=1)


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Hugging Face that stores bfloat16."""
    model = family_cases.build(family_cases.CASES["llama"])
    return family_cases.save(model.to(torch.bfloat16), tmp_path_factory.mktemp("stored"))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_default_model_is_named_with_its_path_and_checksum(
    kv: Callable[..., Ran],
    decoder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: str,
) -> None:
    (tmp_path / files.DEFAULT_MODEL).symlink_to(decoder)
    monkeypatch.setattr(files, "weights_folder", lambda: tmp_path)
    found = answer(kv(*COMMANDS[command], "--threads", "1", "--json", command=command))
    sha256 = hashlib.sha256((decoder / "model.safetensors").read_bytes()).hexdigest()
    assert found["settings"]["run"]["model"] == ""
    assert found["resolved"]["model"] == str(tmp_path / files.DEFAULT_MODEL)
    assert found["resolved"]["sha256"] == found["measured_on"]["sha256"] == sha256
    assert found["measured_on"]["model"] == files.DEFAULT_MODEL
    assert (found["measured_on"]["dtype"], found["measured_on"]["threads"]) == ("float32", 1)
    assert found["conclusion"]


@pytest.mark.parametrize("command", WITHOUT_TOKENIZER)
def test_a_bfloat16_folder_that_is_run_in_float32_is_said_so_once(
    kv: Callable[..., Ran], bfloat16: Path, command: str
) -> None:
    words = ["--model", str(bfloat16), *WITHOUT_TOKENIZER[command], "--threads", "1"]
    ran = kv(*words, command=command)
    assert ran.code == 0, ran.err
    said = "stored in bfloat16, run in float32 (--dtype bfloat16 runs it as stored)"
    assert ran.err.count(said) == 1
    assert " float32 (stored in bfloat16), 1 thread" in " ".join(ran.out.split())
    ran = kv(*words, "--json", "--dtype", "bfloat16", command=command)
    assert "stored in" not in ran.err
    assert answer(ran)["resolved"]["stored_dtype"] == "bfloat16"


def test_what_transformers_runs_is_named_too(kv: Callable[..., Ran], bfloat16: Path) -> None:
    words = ["--impl", "transformers", "--model", str(bfloat16), "--caches", "dynamic"]
    words += ["--tokens", "4", "--scenarios", "decode", "--json"]
    ran = kv(*words, command="verify-cache")
    found = answer(ran)
    sha256 = hashlib.sha256((bfloat16 / "model.safetensors").read_bytes()).hexdigest()
    assert (found["resolved"]["model"], found["resolved"]["sha256"]) == (str(bfloat16), sha256)
    assert found["environment"]["transformers"] == found["resolved"]["transformers"]
    assert "stored in bfloat16, run in float32" in ran.err


def test_a_target_is_named_with_the_checksum_of_its_file(kv: Callable[..., Ran]) -> None:
    target = Path(__file__).parents[2] / "docs" / "my_decoder.py"
    words = ["--target", f"{target}:build", "--scenarios", "decode", "--tokens", "4", "--json"]
    ran = kv(*words, command="verify-cache")
    found: dict[str, Any] = json.loads(ran.out)
    assert found["measured_on"]["model"] == "my_decoder.py:build"
    assert found["resolved"]["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()


def test_random_weights_are_not_taken_for_those_of_the_file(
    kv: Callable[..., Ran], decoder: Path
) -> None:
    words = ["--model", str(decoder), *COMMANDS["bench"], "--n-kv-heads", "1", "--json"]
    found = answer(kv(*words, command="bench"))
    name = found["measured_on"]["model"]
    assert name == f"{decoder.name} with 1 key-value heads and random weights"


@pytest.mark.parametrize("kind", CACHE_SETTINGS)
def test_every_setting_of_a_cache_is_named_whether_it_was_given_or_not(kind: str) -> None:
    names = CACHE_SETTINGS[kind]
    assert tuple(settings_of(kind)) == names
    assert settings_of(f"{kind}:{names[0]}=8")[names[0]] == 8
    assert settings_of(kind, small=True) != settings_of(kind)
    assert settings_of(f"{kind}:{names[0]}=8", small=True)[names[0]] == 8


def test_shards_have_one_checksum_as_the_loader_has_it(tmp_path: Path) -> None:
    model = family_cases.build(family_cases.CASES["llama"]).float()
    folder = family_cases.save(model, tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert read_folder(folder).sha256 == family_cases.load(folder).sha256
