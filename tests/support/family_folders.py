"""Folders of Hugging Face to change, one of each family, and changes to their configuration."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from family_cases import CASES, build, save

Change = Callable[[dict[str, Any]], object]
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind that the tests change copies of."""
    cases = (
        "gpt2",
        "llama",
        "llama, tied head",
        "llama, yarn",
        "mistral, window",
        "qwen2",
        "qwen3",
        "granite",
        "smollm3",
        "phi3",
        "olmo2",
        "gemma2",
        "gemma3",
        "deepseek_v3",
    )
    return {c: save(build(CASES[c]), tmp_path_factory.mktemp("family")) for c in cases}


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda case: Path(shutil.copytree(originals[case], tmp_path / "model"))


def set_to(**fields: Any) -> Change:
    return lambda data: data.update(fields)


def turn_to(**fields: Any) -> Change:
    return lambda data: data["rope_parameters"].update(fields)
