"""The parts of attention in plain NumPy float64, for oracle.py and oracle_latent.py.

Letters and sources as there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from kvtool.config import RopeScaling

Weights = Mapping[str, np.ndarray]


class Rules(NamedTuple):
    """How one layer attends."""

    window: int  # tokens that one sees, its own included; 0: all before it
    turn: tuple[float, RopeScaling | None] | None  # theta and scaling of its rotation
    turned: int  # channels of a head that turn
    scale: float  # of scores
    cap: float  # of scores; 0: none


def unit(x: np.ndarray, eps: float) -> np.ndarray:
    """Divide each row by the root of its mean square: (..., n) -> (..., n)."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, rules: Rules) -> np.ndarray:
    """Attend causally in one head, to the last `window` tokens if it is not 0: (T, D) -> (T, D)."""
    scores = bounded(q @ k.T * rules.scale, rules.cap)  # (T, T): row = query, column = key
    distance = np.arange(len(q))[:, None] - np.arange(len(k))  # in tokens, to the past
    hidden = (distance < 0) | (distance >= rules.window if rules.window else False)
    return softmax(np.where(hidden, -np.inf, scores)) @ v


def bounded(x: np.ndarray, cap: float) -> np.ndarray:
    """Bring every number between -cap and cap, near 0 as it was (Gemma Team 2024); 0: no cap."""
    return cap * np.tanh(x / cap) if cap else x


def turned(x: np.ndarray, n: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """`rotate` the first n channels of each vector: (..., T, D) -> (..., T, D)."""
    return np.concatenate([rotate(x[..., :n], theta, scaling), x[..., n:]], axis=-1)


def rotate(x: np.ndarray, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Turn each vector by its position: (..., T, D) -> (..., T, D) (Su et al. 2021).

    Coordinates i and i + D/2 form a plane (the half-split order of GPT-NeoX and Llama), and the
    vector at position t turns in it by t theta^(-2i/D). A dot product of two turned vectors then
    depends on their positions only through the difference. Scaling slows the turning down, and with
    YaRN makes the vector longer; LongRoPE has a factor for each plane.
    """
    length, width = x.shape[-2:]
    speed = theta ** (-np.arange(0, width, 2) / width)  # radians per position, (D/2,)
    if scaling is not None:
        if scaling.kind == "longrope":
            speed = speed / np.asarray(scaling.factors)
        else:
            kept = share_kept(scaling, theta, speed)
            speed = speed * (kept + (1.0 - kept) / scaling.factor)
        x = x * scaling.attention_factor
    angle = np.arange(length)[:, None] * speed  # (T, D/2)
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = x[..., : width // 2], x[..., width // 2 :]  # (..., T, D/2)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def share_kept(scaling: RopeScaling, theta: float, speed: np.ndarray) -> np.ndarray:
    """How much of each plane's speed is kept, from 0 (divided by the factor) to 1: (D/2,) -> same.

    A plane that turns r times in the original context L keeps, with llama3, (r - low) / (high -
    low). With YaRN the share falls linearly with the plane's number i, from 1 at the plane that
    turns beta_fast times to 0 at the one that turns beta_slow times, where turning r times means
    theta^(-2i/D) L = 2 pi r (Peng et al. 2023, section 3.2).
    """
    length, n_planes = scaling.original_context, len(speed)
    if scaling.kind == "linear":
        return np.zeros(n_planes)
    if scaling.kind == "llama3":
        turns = speed * length / (2 * math.pi)
        return np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    ends = [
        n_planes * math.log(length / (2 * math.pi * turns), theta)
        for turns in (scaling.beta_fast, scaling.beta_slow)
    ]
    if scaling.truncate:  # outwards, to whole planes
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], 2 * n_planes - 1)  # as in YaRN's own code
    if first == last:
        last += 0.001  # a step
    return 1.0 - np.clip((np.arange(n_planes) - first) / (last - first), 0.0, 1.0)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Turn each row into weights e^s / sum e^s; subtracting the row's maximum keeps e^s finite."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
