"""Decoders that others wrote are judged rightly, where their libraries are installed.

The versions with which docs/foreign.md was made: litgpt 0.5.13, x-transformers 2.31.10,
transformer-lens 2.16.1, torchtune 0.6.1, curated-transformers 2.0.1, llms-from-scratch 1.0.19,
keras-hub 0.32.0. `pip install --no-deps` them, and what they ask for; run one as

    python -m pytest tests/foreign -k litgpt
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

import foreign_libraries as libraries
import kvtool

RIGHT, BUG, ERROR = "right", "bug", "error"


@pytest.mark.parametrize(
    ("build", "package", "wanted"),
    [
        (libraries.litgpt_llama, "litgpt", RIGHT),
        (libraries.x_transformers_rotary, "x_transformers", RIGHT),
        (libraries.TransformerLens, "transformer_lens", RIGHT),
        (libraries.torchtune_llama3, "torchtune", RIGHT),
        # A step of one token sees the first keys, and not itself, once it is beyond the window.
        (libraries.torchtune_gemma2, "torchtune", BUG),
        (libraries.curated_llama, "curated_transformers", RIGHT),
        # A step of one token behind a prompt raises: its mask is cut to the wrong columns.
        (libraries.from_scratch_gpt2, "llms_from_scratch", ERROR),
        (libraries.from_scratch_qwen3, "llms_from_scratch", RIGHT),
        (libraries.keras_gpt2, "keras_hub", RIGHT),
        (libraries.keras_mistral, "keras_hub", RIGHT),
        (libraries.keras_gemma, "keras_hub", RIGHT),
    ],
    ids=lambda given: getattr(given, "__name__", str(given)),
)
@pytest.mark.filterwarnings("ignore")
def test_a_decoder_of_a_library_is_judged_rightly(
    build: Callable[[], Any], package: str, wanted: str
) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    found = kvtool.verify(build(), scenarios=["decode", "chunks", "rows", "prompts"], tokens=24)
    verdicts = {checked.finding.verdict for checked in found.wrong}
    assert found.ok is (wanted == RIGHT) and (wanted == RIGHT or wanted in verdicts), str(found)
