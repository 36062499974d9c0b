"""A model of transformers that accelerate spreads over devices."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cli_probe import Ran
from kvtool.core.verify.hf import subject
from kvtool.core.verify.hf.folder import read_folder, require_all
from kvtool.errors import CapacityError

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
WORDS = "--impl transformers --caches dynamic --scenarios crop --threads 1 --device cpu"
ARGS = WORDS.split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spread")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(path)
    return path


def test_without_accelerate_it_is_asked_for_in_one_line(
    folder: Path, kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *p: None if n == "accelerate" else find(n, *p)
    )
    ran = kv("--model", str(folder), *ARGS, "--device-map", "auto", command="verify-cache")
    assert ran.code == 2 and ran.err.count("\n") == 1 and "pip install accelerate" in ran.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--device-map", "every"], "--device-map: 'every' is none (expected auto, balanced"),
        (["--device-map", "auto", "--model", "llama"], "--device-map: llama is a type"),
    ],
)
def test_what_is_no_map_and_what_cannot_be_spread_is_refused(
    folder: Path, kv: Callable[..., Ran], args: list[str], message: str
) -> None:
    given = args if "--model" in args else [*args, "--model", str(folder)]
    ran = kv(*given, *ARGS, command="verify-cache")
    assert ran.code == 2 and message in ran.err


def test_a_model_on_all_devices_is_judged_as_on_one(
    folder: Path, kv: Callable[..., Ran], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    reports: list[Any] = []
    for n, more in enumerate(([], ["--device-map", "auto"])):
        path = tmp_path / f"{n}.json"
        given = ["--model", str(folder), *ARGS, "--output", str(path)]
        assert kv(*given, *more, command="verify-cache").code == 0
        reports.append(json.loads(path.read_text()))
    assert reports[0]["checks"] == reports[1]["checks"]
    assert reports[1]["resolved"]["device_map"] == "auto"


@pytest.mark.parametrize("widens", [False, True])
def test_float64_is_spread_as_the_model_is(
    folder: Path, widens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one device here: that accelerate is asked is all that can be seen."""
    places, asked = {"model": 0, "lm_head": 1}, list[Any]()

    def dispatch_model(model: Any, device_map: Any) -> Any:
        asked.append(device_map)
        return model

    monkeypatch.setitem(sys.modules, "accelerate", SimpleNamespace(dispatch_model=dispatch_model))
    monkeypatch.setattr(subject, "copy_crowds", lambda model: widens)
    model = read_folder(folder).model
    model.hf_device_map = places
    other = subject.converted(model, torch.float64)
    assert asked == [places]
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        gap = (other(ids).logits - model(ids).logits).abs().max()
    assert gap.dtype == torch.float64 and 0 < gap < 1e-6


def test_weights_that_do_not_fit_the_devices_are_not_judged(folder: Path) -> None:
    model = read_folder(folder).model
    require_all(model)
    model.lm_head.to("meta")  # as accelerate leaves what it brings back for each use
    with pytest.raises(CapacityError, match=r"lm_head.weight and 0 other weights do not fit"):
        require_all(model)
