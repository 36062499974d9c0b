"""Latent attention in plain NumPy float64, with the keys and values of every head written out.

kvtool's torch code never makes them (models/latent.py), so the two check each other. Letters as in
oracle.py; R is the width of a token's latent, N channels of a head that do not turn, P those that
do, and V the width of a value. Source: DeepSeek-AI 2024 (DeepSeek-V2), section 2.1 and appendix C.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvtool.core.reference.oracle_parts import Rules, Weights, attend, rotate, unit

EPS = 1e-6  # of the norms of latents


def shapes(config: Any, name: str) -> dict[str, tuple[int, ...]]:
    """Name every weight of one layer's attention with its shape."""
    c, d = config, config.d_model
    made = c.n_heads * (c.still_dim + c.rotary_dim)
    linears = {
        "kv_down": (c.kv_rank + c.rotary_dim, d),
        "kv": (c.n_heads * (c.still_dim + c.value_dim), c.kv_rank),
        "q": (made, c.q_rank or d),
        "out": (d, c.n_heads * c.value_dim),
    }
    norms = {"kv_norm": c.kv_rank}
    if c.q_rank:
        linears["q_down"], norms["q_norm"] = (c.q_rank, d), c.q_rank
    found: dict[str, tuple[int, ...]] = {
        f"{name}.{part}.weight": shape for part, shape in linears.items()
    }
    found |= {f"{name}.{part}.weight": (width,) for part, width in norms.items()}
    biased = {"kv_down": "qkv", "q_down": "qkv", "out": "out"}
    for part, switch in biased.items():
        if part in linears and c.has_bias(switch):
            found[f"{name}.{part}.bias"] = linears[part][:1]
    return found


def attention(weights: Weights, config: Any, name: str, x: np.ndarray, rules: Rules) -> np.ndarray:
    """Let every token gather from itself and the tokens before it: (T, d) -> (T, d).

    q = W_q n(W_dq x) and c = n(W_dkv x), n being RMSNorm; k and v of each head are W_uk c and
    W_uv c, and the P turning channels of a key, the same for all heads, come from x.
    """
    c, n_tokens = config, len(x)

    def linear(part: str, y: np.ndarray) -> np.ndarray:
        made = y @ np.asarray(weights[f"{name}.{part}.weight"], np.float64).T
        bias = weights[f"{name}.{part}.bias"] if f"{name}.{part}.bias" in biased else 0.0
        return made + np.asarray(bias, np.float64)

    def normed(part: str, y: np.ndarray) -> np.ndarray:
        scale = np.asarray(weights[f"{name}.{part}.weight"], np.float64)
        return unit(y, EPS) * scale

    def heads(y: np.ndarray) -> np.ndarray:
        return y.reshape(n_tokens, c.n_heads, -1).swapaxes(0, 1)  # (H, T, ...)

    biased = shapes(c, name)
    q = heads(linear("q", normed("q_norm", linear("q_down", x)) if c.q_rank else x))
    down = linear("kv_down", x)
    made = heads(linear("kv", normed("kv_norm", down[:, : c.kv_rank])))  # (H, T, N + V)
    shared = _turned(down[:, c.kv_rank :], c.interleaved, rules)  # (T, P)
    gathered = []
    for h in range(c.n_heads):
        turning = _turned(q[h, :, c.still_dim :], c.interleaved, rules)
        query = np.concatenate([q[h, :, : c.still_dim], turning], axis=-1)
        key = np.concatenate([made[h, :, : c.still_dim], shared], axis=-1)
        gathered.append(attend(query, key, made[h, :, c.still_dim :], rules))
    return linear("out", np.concatenate(gathered, axis=-1))


def _turned(x: np.ndarray, interleaved: bool, rules: Rules) -> np.ndarray:
    """Turn all channels (T, P), of which 2i and 2i + 1 form a plane if they are interleaved."""
    if rules.turn is None:
        return x
    if not interleaved:
        return rotate(x, *rules.turn)
    halves = np.concatenate([x[:, 0::2], x[:, 1::2]], axis=-1)
    return rotate(halves, *rules.turn)
