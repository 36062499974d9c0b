"""The shipped model: what its README says is true, and independent witnesses agree with it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from kvtool import app
from kvtool.core.checkpoint import checkpoint
from kvtool.core.reference import oracle, reference
from kvtool.core.reference.witness import witness, witness_logits
from kvtool.files import DEFAULT_MODEL, shipped_models, weights_folder
from kvtool.reading import sha256
from oracle_cases import gap

FOLDER = weights_folder() / DEFAULT_MODEL
G2P = "g2p-1x1"
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


@pytest.mark.parametrize("name", shipped_models())
def test_every_file_has_the_checksum_that_the_readme_gives(name: str) -> None:
    section = README.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    given = dict(re.findall(r"`([\w.]+)` \| `([0-9a-f]{64})`", section))
    folder = weights_folder() / name
    files = {path.name for path in folder.iterdir()}
    assert given.keys() == files
    assert {name: sha256(folder / name) for name in files} == given


def test_two_models_are_shipped() -> None:
    assert shipped_models() == [G2P, DEFAULT_MODEL]


def test_the_weights_are_small_and_the_context_holds_a_thousand_tokens() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 12_000_000
    config = checkpoint.load("", torch.device("cpu"), torch.float32).config
    assert (config.n_layers, config.d_model, config.n_heads) == (2, 256, 8)
    assert config.context >= 1152
    assert (weights_folder() / G2P / "model.safetensors").stat().st_size <= 8_000_000


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


def test_gpt_neox_of_transformers_reproduces_the_reference(
    shipped: checkpoint.Checkpoint,
    weights: dict[str, np.ndarray],
    references: list[reference.Reference],
) -> None:
    """The same weights in a model that others wrote."""
    pytest.importorskip("transformers")
    model = witness(weights, shipped.config)
    for right in references:
        assert gap(witness_logits(model, right.ids), right.logits) < 1e-12


def test_verify_logits_agrees_with_the_shipped_reference(capsys: pytest.CaptureFixture) -> None:
    assert app.run(["verify-logits"]) == 0
    assert "rounding only" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["--scenarios decode", "--caches dynamic"])
def test_verify_cache_finds_no_bug_in_the_shipped_model(
    capsys: pytest.CaptureFixture, part: str
) -> None:
    """Every kind, and every scenario."""
    assert app.run(["verify-cache", "--tokens", "24", *part.split()]) == 0
    assert "the planted bug was found" in capsys.readouterr().out


def test_the_shipped_encoder_decoder_pronounces(capsys: pytest.CaptureFixture) -> None:
    words = {"transformer": "T R AE N S F AO R M ER", "cache": "K AE SH", "bench": "B EH N CH"}
    for word, phones in words.items():
        assert app.run(["generate", "--model", G2P, "--prompt", word, "-q"]) == 0
        assert capsys.readouterr().out == phones + "\n"


def test_verify_cache_finds_no_bug_in_the_shipped_encoder_decoder(
    capsys: pytest.CaptureFixture,
) -> None:
    words = [
        "--model",
        G2P,
        "--tokens",
        "8",
        "--caches",
        "static",
        "--scenarios",
        "decode",
        "chunks",
    ]
    assert app.run(["verify-cache", *words]) == 0
    assert "bit for bit; the planted bug was found" in capsys.readouterr().out
