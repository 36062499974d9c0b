"""The NumPy oracle against independent models: kvtool's own in torch, and two of transformers.

All compute in float64, so that rounding is all that may stand between them.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvtool.config import POSITIONS, ModelConfig
from kvtool.core.models import build_model
from kvtool.core.reference import oracle
from kvtool.core.reference.witness import witness, witness_logits
from kvtool.errors import UsageError
from oracle_cases import EVERY_CONFIG, IDS, TINY, gap, random_weights

# --- kvtool's torch model


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_torch_decoder_agrees_in_every_config(positions: str) -> None:
    """1e-12: rounding through two layers."""
    torch.manual_seed(9)
    for config in EVERY_CONFIG:
        if config.positions != positions:
            continue
        model = build_model(config).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # else biases are 0 and norm weights 1
                parameter += 0.1 * torch.randn_like(parameter)
        weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
        # A tied head is in torch's state too, under its own name.
        assert oracle.weight_shapes(config).keys() | {"head.weight"} == weights.keys()
        with torch.no_grad():
            found = model(torch.tensor([IDS]))[0].numpy()
        assert gap(found, oracle.logits(weights, config, IDS)) < 1e-12, config


# --- models of transformers


def witness_gap(config: ModelConfig) -> float:
    weights = random_weights(config, 8)
    model = witness(weights, config)
    return gap(oracle.logits(weights, config, IDS), witness_logits(model, IDS))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu"])
def test_gpt2_of_transformers_agrees(
    activation: str, positions: str, tied: bool, bias: bool
) -> None:
    """1e-12: rounding through two layers."""
    pytest.importorskip("transformers")
    config = replace(TINY, positions=positions, activation=activation, tied=tied, bias=bias)
    assert witness_gap(config) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu"])
def test_gpt_neox_of_transformers_agrees(activation: str, tied: bool, bias: bool) -> None:
    """1e-12: as for Llama."""
    pytest.importorskip("transformers")
    rotary = replace(TINY, positions="rotary", rope_theta=700.0)
    assert witness_gap(replace(rotary, activation=activation, tied=tied, bias=bias)) < 1e-12


LLAMA = replace(
    TINY,
    positions="rotary",
    norm="rmsnorm",
    activation="swiglu",
    n_kv_heads=2,
    bias=False,
    tied=False,
    rope_theta=700.0,
)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_llama_of_transformers_agrees(n_kv_heads: int, bias: bool, tied: bool) -> None:
    """1e-12: with every cast to float32 turned into one to float64, only rounding is left."""
    pytest.importorskip("transformers")
    assert witness_gap(replace(LLAMA, n_kv_heads=n_kv_heads, bias=bias, tied=tied)) < 1e-12


def test_llama_of_transformers_computes_some_of_it_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even in float64: the casts that are lifted above are there, and cost 6e-8 each time."""
    pytest.importorskip("transformers")
    monkeypatch.setattr("kvtool.core.reference.witness.Promote", contextlib.nullcontext)
    assert 1e-9 < witness_gap(LLAMA) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "rotary", "activation": "swiglu"},
        {"norm": "rmsnorm"},
        {"activation": "swiglu"},
        {"n_kv_heads": 2},
    ],
    ids=str,
)
def test_a_mixture_that_transformers_has_not_is_refused(changes: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    config = replace(TINY, **changes)
    with pytest.raises(UsageError, match="neither GPT-2's nor GPT-NeoX's nor Llama's"):
        witness(random_weights(config, 8), config)
