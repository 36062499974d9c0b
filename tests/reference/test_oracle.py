"""The NumPy oracle against facts that need none of kvtool's torch code.

Where a tolerance is not zero, its reason stands beside it; the unit is float64's 2.2e-16.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import numpy as np
import pytest

from kvtool.config import POSITIONS, ModelConfig
from kvtool.core.reference import oracle
from kvtool.errors import FileError
from oracle_cases import EVERY_CONFIG, IDS, TINY, gap, random_weights

# --- the whole model


def test_every_config_gives_finite_float64_logits_and_a_token_never_sees_a_later_one() -> None:
    for config in EVERY_CONFIG:
        weights = random_weights(config, 0)
        before = oracle.logits(weights, config, IDS)
        after = oracle.logits(weights, config, [*IDS[:5], 0, 7, 10, 8])
        assert before.shape == (len(IDS), config.vocab_size)
        assert before.dtype == np.float64
        assert np.isfinite(before).all()
        # Exactly: a masked key has weight 0.0, and the shapes of all products are the same.
        np.testing.assert_array_equal(after[:5], before[:5])
        assert (after[5:] != before[5:]).any(axis=-1).all()


def test_a_prefix_has_the_logits_that_it_has_inside_the_whole() -> None:
    """Not bit for bit: BLAS may add in another order when the number of rows changes."""
    for config in EVERY_CONFIG[::7]:
        weights = random_weights(config, 1)
        whole = oracle.logits(weights, config, IDS)
        assert gap(oracle.logits(weights, config, IDS[:4]), whole[:4]) < 1e-13


def test_one_layer_worked_by_hand() -> None:
    """d = 2, one head, eps = 0.36; every row stays (c, -c), which LayerNorm takes to (u, -u) with
    u = c / sqrt(c^2 + 0.36). The c below are chosen so that the root is rational.

    Tokens 0 and 1 are c = 0.8 and c = -0.8; as 0.8 / sqrt(0.64 + 0.36) = 0.8, u = c.
    Attention: q = n, k = r n, v = n. Token 1 scores token 0 with -1.28 r / sqrt 2 and itself with
    +1.28 r / sqrt 2; r is chosen so that the difference is ln 7, so the weights are 7/8 and 1/8.
    Gathered: 0.8 and (7/8 - 1/8) 0.8 = 0.6; times 0.8 by W_out: 0.64 and 0.48.
    Now c is 1.44 and -0.32; u = 1.44 / sqrt(2.4336) = 12/13 and -0.32 / sqrt(0.4624) = -8/17.
    MLP: the one hidden unit is relu(u) = 12/13 and 0; times -1.0725: -0.99 and 0.
    Now c is 0.45 and -0.32; u = 0.45 / sqrt(0.5625) = 3/5 and -8/17.
    Tied logits: token 0's is 0.8 u + 0.8 u = 1.6 u, token 1's is -1.6 u.
    """
    config = ModelConfig(
        vocab_size=2,
        n_layers=1,
        d_model=2,
        n_heads=1,
        d_ff=1,
        context=2,
        positions="learned",
        norm_eps=0.36,
        activation="relu",
        bias=False,
    )
    eye = np.eye(2)
    r = -math.log(7.0) * math.sqrt(2.0) / 2.56
    weights = {
        "embed.tokens.weight": np.array([[0.8, -0.8], [-0.8, 0.8]]),
        "embed.positions.weight": np.zeros((2, 2)),
        "layers.0.norm1.weight": np.ones(2),
        "layers.0.attn.qkv.weight": np.concatenate([eye, r * eye, eye]),
        "layers.0.attn.out.weight": 0.8 * eye,
        "layers.0.norm2.weight": np.ones(2),
        "layers.0.mlp.up.weight": np.array([[1.0, 0.0]]),
        "layers.0.mlp.down.weight": np.array([[-1.0725], [1.0725]]),
        "norm.weight": np.ones(2),
    }
    expected = [[1.6 * 3 / 5, -1.6 * 3 / 5], [-1.6 * 8 / 17, 1.6 * 8 / 17]]
    found = oracle.logits(weights, config, [0, 1])
    np.testing.assert_allclose(found, expected, rtol=1e-14)  # some tens of roundings


def test_sinusoidal_equals_learned_positions_that_hold_the_same_table() -> None:
    config = dataclasses.replace(TINY, tied=False)
    weights = random_weights(config, 2)
    learned = dict(weights)
    learned["embed.tokens.weight"] = weights["embed.tokens.weight"] * math.sqrt(config.d_model)
    learned["embed.positions.weight"] = oracle.sinusoids(config.context, config.d_model)
    other = dataclasses.replace(config, positions="learned")
    np.testing.assert_array_equal(
        oracle.logits(learned, other, IDS), oracle.logits(weights, config, IDS)
    )


@pytest.mark.parametrize("n_kv_heads", [1, 2])
@pytest.mark.parametrize("positions", POSITIONS)
def test_grouped_heads_equal_full_heads_with_repeated_key_value_rows(
    positions: str, n_kv_heads: int
) -> None:
    full = dataclasses.replace(TINY, positions=positions)
    grouped = dataclasses.replace(full, n_kv_heads=n_kv_heads)
    weights = random_weights(grouped, 3)
    repeated = dict(weights)
    for name in [name for name in weights if ".attn.qkv." in name]:
        heads = np.split(weights[name], 4 + 2 * n_kv_heads)  # each (D, d), or (D,) for the bias
        q, k, v = heads[:4], heads[4 : 4 + n_kv_heads], heads[4 + n_kv_heads :]
        share = [h * n_kv_heads // 4 for h in range(4)]  # 0 0 1 1, or 0 0 0 0
        repeated[name] = np.concatenate([*q, *(k[s] for s in share), *(v[s] for s in share)])
    found = oracle.logits(weights, grouped, IDS)
    # Rounding only: the wider product may add in another order.
    assert gap(found, oracle.logits(repeated, full, IDS)) < 1e-13


def test_float32_weights_are_computed_in_float64() -> None:
    weights = {name: w.astype(np.float32) for name, w in random_weights(TINY, 4).items()}
    wide = {name: w.astype(np.float64) for name, w in weights.items()}
    np.testing.assert_array_equal(oracle.logits(weights, TINY, IDS), oracle.logits(wide, TINY, IDS))


# --- its parts


def test_sinusoids_follow_the_formula() -> None:
    table = oracle.sinusoids(50, 6)
    for t in range(50):
        for i in range(3):
            angle = t / 10000 ** (2 * i / 6)
            assert table[t, 2 * i] == pytest.approx(math.sin(angle), rel=0, abs=1e-13)
            assert table[t, 2 * i + 1] == pytest.approx(math.cos(angle), rel=0, abs=1e-13)


def test_rotary_scores_depend_on_the_difference_of_positions_only() -> None:
    rng = np.random.default_rng(5)
    q, k = rng.normal(size=(2, 8))
    turned_q = oracle.rotate(np.tile(q, (40, 1)), 10_000.0)  # the same vector at 40 positions
    turned_k = oracle.rotate(np.tile(k, (40, 1)), 10_000.0)
    scores = turned_q @ turned_k.T  # (query position, key position)
    for difference in range(-39, 40):
        assert np.ptp(np.diagonal(scores, difference)) < 1e-13
    assert scores[0, 0] == pytest.approx(q @ k, rel=1e-14)
    assert abs(scores[1, 0] - scores[0, 1]) > 1e-3  # looking back is not looking ahead


def test_rotary_is_multiplication_by_a_complex_phase() -> None:
    x = np.random.default_rng(6).normal(size=(3, 7, 10))
    turned = oracle.rotate(x, 500.0)
    for t in range(7):
        for i in range(5):
            z = (x[:, t, i] + 1j * x[:, t, i + 5]) * np.exp(1j * t * 500.0 ** (-2 * i / 10))
            np.testing.assert_allclose(turned[:, t, i], z.real, atol=1e-14)
            np.testing.assert_allclose(turned[:, t, i + 5], z.imag, atol=1e-14)


def test_softmax_survives_huge_scores() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an overflow would warn
        found = oracle.softmax(np.array([[1e300, 1e300, -1e300], [-1e5, -1e5, -np.inf]]))
        apart = oracle.softmax(np.array([800.0, 800.0 - math.log(3.0)]))
    np.testing.assert_array_equal(found, [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]])
    np.testing.assert_allclose(apart, [0.75, 0.25], rtol=1e-12)  # 800's last place is 1e-13


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [  # mpmath at 40 digits, or by definition
        ("gelu", 1.0, 0.841344746068542949),
        ("gelu", -2.0, -0.0455002638963584144),
        ("gelu", -20.0, -5.50724823721246739e-88),
        ("gelu_tanh", 1.0, 0.841191990608276705),
        ("gelu_tanh", -2.0, -0.0454023059122249812),
        ("silu", 1.0, 0.731058578630004879),
        ("silu", -1000.0, 0.0),
        ("relu", -2.0, 0.0),
        ("relu", 3.0, 3.0),
    ],
)
def test_activations_have_their_known_values(name: str, x: float, expected: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = getattr(oracle, name)(np.array([x]))[0]
    # Relative: erfc rounds its argument -x / sqrt 2 first, which costs x^2 units (400 at x = -20).
    assert found == pytest.approx(expected, rel=2e-13, abs=0.0)


def test_norms_have_their_known_values() -> None:
    config = dataclasses.replace(TINY, d_model=4, norm_eps=0.25)
    weights = {"n.weight": np.array([1.0, 2.0, 1.0, 1.0]), "n.bias": np.array([0.0, 0.0, 5.0, 0.0])}
    x = np.array([[3.0, 4.0, 5.0, 8.0]])  # mean 5, variance 14 / 4 = 3.5
    root = math.sqrt(3.75)
    np.testing.assert_allclose(
        oracle.norm(weights, config, "n", x), [[-2 / root, -2 / root, 5.0, 3 / root]], rtol=1e-15
    )
    rms = dataclasses.replace(config, norm="rmsnorm")  # mean of squares 28.5
    root = math.sqrt(28.75)
    np.testing.assert_allclose(
        oracle.norm(weights, rms, "n", x), [[3 / root, 8 / root, 5 / root, 8 / root]], rtol=1e-15
    )


# --- what it refuses


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 11], r"id 11 \(expected 0 to 10\)"),
        ([0, -1], r"id -1 \(expected 0 to 10\)"),
        ([0] * 13, r"13 tokens \(expected 12 or fewer\)"),
        ([], "at least one token"),
        ([[0, 1]], r"shape \(1, 2\)"),
        ([0.0, 1.0], "expected whole numbers"),
        ([True, False], "expected whole numbers"),
    ],
)
def test_ids_that_mean_nothing_are_refused(ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        oracle.logits(random_weights(TINY, 0), TINY, ids)


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_full_context_is_accepted(positions: str) -> None:
    config = dataclasses.replace(TINY, positions=positions)
    assert oracle.logits(random_weights(config, 0), config, [10] * 12).shape == (12, 11)


def test_every_weight_is_needed_and_must_have_its_shape() -> None:
    config = dataclasses.replace(TINY, positions="learned", tied=False)
    weights = random_weights(config, 0)
    assert "layers.1.norm2.bias" in weights
    for name, weight in weights.items():
        rest = {key: value for key, value in weights.items() if key != name}
        with pytest.raises(FileError, match=f"weights: {name} is missing"):
            oracle.logits(rest, config, IDS)
        with pytest.raises(FileError, match=f"weights: {name} has the wrong shape"):
            oracle.logits({**weights, name: weight[:-1]}, config, IDS)


def test_an_encoder_decoder_config_is_refused() -> None:
    config = dataclasses.replace(TINY, n_encoder_layers=2, source_vocab_size=5)
    with pytest.raises(ValueError, match="decoder-only"):
        oracle.logits(random_weights(TINY, 0), config, IDS)
