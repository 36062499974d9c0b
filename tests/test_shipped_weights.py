"""The shipped model: what its README says is true, and independent witnesses agree with it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from kvtool import app
from kvtool.core import checkpoint, oracle, reference
from kvtool.core.witness import witness, witness_logits
from kvtool.files import DEFAULT_MODEL, sha256, weights_folder
from oracle_cases import gap

FOLDER = weights_folder() / DEFAULT_MODEL
README = (weights_folder() / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shipped() -> checkpoint.Checkpoint:
    return checkpoint.load("", torch.device("cpu"), torch.float64)


@pytest.fixture(scope="module")
def weights(shipped: checkpoint.Checkpoint) -> dict[str, np.ndarray]:
    found = checkpoint.load_weights(shipped.path, shipped.config)
    return {name: weight.double().numpy() for name, weight in found.items()}


@pytest.fixture(scope="module")
def references() -> list[reference.Reference]:
    return reference.load(FOLDER / "reference.safetensors")


def test_every_file_has_the_checksum_that_the_readme_gives() -> None:
    given = dict(re.findall(r"`([\w.]+)` \| `([0-9a-f]{64})`", README))
    files = {path.name for path in FOLDER.iterdir()}
    assert given.keys() == files
    assert {name: sha256(FOLDER / name) for name in files} == given


def test_the_weights_are_small_and_the_context_holds_a_thousand_tokens() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 12_000_000
    config = checkpoint.load("", torch.device("cpu"), torch.float32).config
    assert (config.n_layers, config.d_model, config.n_heads) == (2, 256, 8)
    assert config.context >= 1152


def test_its_tokenizer_loses_nothing(shipped: checkpoint.Checkpoint) -> None:
    text = "JULIET:\n\tO Romeo — wherefore art thou 日本 🙂?\r\n\x00"
    assert shipped.tokenizer.decode(shipped.tokenizer.encode(text)) == text


def test_the_reference_has_three_prompts_of_real_text(
    shipped: checkpoint.Checkpoint, references: list[reference.Reference]
) -> None:
    assert len(references) == 3
    for right in references:
        assert right.text is not None
        assert shipped.tokenizer.encode(right.text) == right.ids


def test_the_reference_is_what_the_numpy_oracle_computes(
    shipped: checkpoint.Checkpoint,
    weights: dict[str, np.ndarray],
    references: list[reference.Reference],
) -> None:
    for right in references:
        assert gap(oracle.logits(weights, shipped.config, right.ids), right.logits) < 1e-13


def test_gpt2_of_transformers_reproduces_the_reference(
    shipped: checkpoint.Checkpoint,
    weights: dict[str, np.ndarray],
    references: list[reference.Reference],
) -> None:
    """The same weights in a model that others wrote: scaled embeddings as wte, sinusoids as wpe."""
    pytest.importorskip("transformers")
    model = witness(weights, shipped.config)
    for right in references:
        assert gap(witness_logits(model, right.ids), right.logits) < 1e-12


def test_verify_logits_agrees_with_the_shipped_reference(capsys: pytest.CaptureFixture) -> None:
    assert app.run(["verify-logits"]) == 0
    assert "rounding only" in capsys.readouterr().out


def test_verify_cache_finds_no_bug_in_the_shipped_model(capsys: pytest.CaptureFixture) -> None:
    assert app.run(["verify-cache", "--tokens", "24"]) == 0
    assert "the planted bug was found" in capsys.readouterr().out
