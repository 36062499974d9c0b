"""Tiny models, weights and the measure of agreement that the tests of the oracle share."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from kvtool.config import ACTIVATIONS, NORMS, POSITIONS, ModelConfig
from kvtool.core.reference import oracle

TINY = ModelConfig(vocab_size=11, n_layers=2, d_model=16, n_heads=4, d_ff=24, context=12)
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5]

EVERY_CONFIG = [
    dataclasses.replace(
        TINY,
        positions=positions,
        norm=norm,
        activation=activation,
        n_kv_heads=n_kv_heads,
        bias=bias,
        tied=tied,
    )
    for positions, norm, activation, n_kv_heads, bias, tied in itertools.product(
        POSITIONS, NORMS, ACTIVATIONS, (4, 2, 1), (True, False), (True, False)
    )
]


def random_weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Draw every weight: deviation 1/sqrt(d), and norm weights around 1."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in oracle.weight_shapes(config).items():
        weights[name] = rng.normal(0.0, config.d_model**-0.5, shape)
        if "norm" in name and name.endswith(".weight"):
            weights[name] += 1.0
    return weights


def gap(found: np.ndarray, expected: np.ndarray) -> float:
    """Measure max|found - expected| / max|expected|."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
