"""The decoder-only Transformer in plain NumPy float64: what the mathematics says.

Written from the formulas and not from kvtool's torch code, so that the two can check each other. It
has no cache, no batch and no tricks: one sequence goes in whole, the logits of every position come
out. Where this file and the torch model differ by more than rounding, one of them is wrong.

Letters behind the shapes: T tokens, V vocabulary, d model width, F MLP width, H query heads,
Hkv key-value heads, D head width (d / H unless the configuration says otherwise).

Sources: Vaswani et al. 2017 (attention, sinusoids); Xiong et al. 2020 (pre-norm blocks);
Ba et al. 2016 (LayerNorm); Zhang and Sennrich 2019 (RMSNorm); Hendrycks and Gimpel 2016 (GELU);
Shazeer 2020 (SwiGLU); Su et al. 2021 (rotary positions); Ainslie et al. 2023 (grouped queries);
Press and Wolf 2017 (tied embeddings); Henry et al. 2020 (norms of queries and keys); Beltagy et al.
2020 (windows); Peng et al. 2023 (YaRN).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from kvtool.config import ModelConfig, RopeScaling
from kvtool.errors import FileError

Weights = Mapping[str, np.ndarray]


def logits(weights: Weights, config: ModelConfig, ids: Sequence[int]) -> np.ndarray:
    """Score every vocabulary entry as the successor of each token: (T,) ids -> (T, V) float64.

    Row t depends on ids[0..t] only. Names in `weights` beyond `weight_shapes(config)` are not read.

    Raises ValueError for ids that are empty, not whole numbers, outside 0..V-1, or longer than the
    context, and for an encoder-decoder config; FileError for a weight that is missing or misshapen.
    """
    shapes = weight_shapes(config)  # refuses an encoder-decoder config
    tokens = _check_ids(config, ids)
    _check_weights(weights, shapes)
    x = embed(weights, config, tokens)  # (T, d)
    for i in range(config.n_layers):
        layer = f"layers.{i}"
        window = config.window if i >= config.first_window_layer else 0
        normal = norm(weights, config, f"{layer}.norm1", x)
        x = x + attention(weights, config, f"{layer}.attn", normal, window)
        x = x + mlp(weights, config, f"{layer}.mlp", norm(weights, config, f"{layer}.norm2", x))
    head = "embed.tokens.weight" if config.tied else "head.weight"
    return norm(weights, config, "norm", x) @ _float64(weights, head).T  # (T, d) @ (d, V)


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name every weight of a decoder-only model with its shape; matrices are (out, in), as y = W x.

    Raises ValueError for an encoder-decoder config.
    """
    if config.n_encoder_layers:
        found = config.n_encoder_layers
        raise ValueError(f"oracle: decoder-only models (found {found} encoder layers, expected 0)")
    if config.kind != "decoder":
        raise ValueError(f"oracle: has the formulas of the family decoder (found {config.kind})")
    d, ff, width = config.d_model, config.d_ff, config.head_dim
    n_qkv = (config.n_heads + 2 * config.n_kv_heads) * width
    n_up = 2 * ff if config.activation == "swiglu" else ff
    shapes: dict[str, tuple[int, ...]] = {"embed.tokens.weight": (config.vocab_size, d)}
    if config.positions == "learned":
        shapes["embed.positions.weight"] = (config.context, d)
    for i in range(config.n_layers):
        layer = f"layers.{i}"
        shapes |= _norm_shapes(config, f"{layer}.norm1")
        shapes |= _linear_shapes(config, f"{layer}.attn.qkv", n_qkv, d)
        if config.qk_norm:
            shapes |= {f"{layer}.attn.{x}_norm.weight": (width,) for x in "qk"}
        shapes |= _linear_shapes(config, f"{layer}.attn.out", d, config.n_heads * width)
        shapes |= _norm_shapes(config, f"{layer}.norm2")
        shapes |= _linear_shapes(config, f"{layer}.mlp.up", n_up, d)
        shapes |= _linear_shapes(config, f"{layer}.mlp.down", d, ff)
    shapes |= _norm_shapes(config, "norm")
    if not config.tied:
        shapes["head.weight"] = (config.vocab_size, d)
    return shapes


# --- the parts of the model, in the order in which a token meets them


def embed(weights: Weights, config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Turn tokens into vectors that know their place: x_t = s E[id_t] + p_t, (T,) -> (T, d).

    The factor s = sqrt(d) goes with sinusoidal positions only (Vaswani et al. 2017, section 3.4).
    Rotary positions add nothing here: they act inside attention.
    """
    x = _float64(weights, "embed.tokens.weight")[tokens]  # (T, d)
    if config.positions == "sinusoidal":
        return math.sqrt(config.d_model) * x + sinusoids(len(tokens), config.d_model)
    if config.positions == "learned":
        return x + _float64(weights, "embed.positions.weight")[: len(tokens)]
    return x


def sinusoids(length: int, width: int) -> np.ndarray:
    """Tabulate Vaswani et al. 2017, section 3.5, interleaved: (length, width).

    p_t[2i] = sin(t / 10000^(2i/d)) and p_t[2i+1] = cos of the same angle.
    """
    even = np.arange(0, width, 2)  # 2i, (d/2,)
    angle = np.arange(length)[:, None] / 10_000.0 ** (even / width)  # (T, d/2)
    table = np.empty((length, width))
    table[:, 0::2] = np.sin(angle)
    table[:, 1::2] = np.cos(angle)
    return table


def norm(weights: Weights, config: ModelConfig, name: str, x: np.ndarray) -> np.ndarray:
    """Bring every row to unit size, then rescale each coordinate: (T, d) -> (T, d).

    LayerNorm (Ba et al. 2016): (x - mean) / sqrt(variance + eps) * weight + bias, where the
    variance divides by d. RMSNorm (Zhang and Sennrich 2019): x / sqrt(mean of squares + eps) *
    weight.
    """
    weight = _float64(weights, f"{name}.weight")  # (d,)
    if config.norm == "layernorm":
        x = x - x.mean(axis=-1, keepdims=True)  # now the mean of squares is the variance
    y = unit(x, config.norm_eps) * weight
    if config.norm == "layernorm" and config.bias:
        return y + _float64(weights, f"{name}.bias")
    return y


def unit(x: np.ndarray, eps: float) -> np.ndarray:
    """Divide each row by the root of its mean square: (..., n) -> (..., n)."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def attention(
    weights: Weights, config: ModelConfig, name: str, x: np.ndarray, window: int = 0
) -> np.ndarray:
    """Let every token gather from itself and the tokens before it: (T, d) -> (T, d).

    Head by head, softmax(q k^T / sqrt(D)) v with the future masked (Vaswani et al. 2017, section
    3.2). With fewer key-value heads, H / Hkv neighbouring query heads share one (Ainslie et al.
    2023): query head h reads key-value head h // (H / Hkv). With qk_norm, each query and key is
    first brought to unit size and rescaled (Henry et al. 2020).
    """
    n_q, n_kv, width = config.n_heads, config.n_kv_heads, config.head_dim
    qkv = _linear(weights, config, f"{name}.qkv", x)  # (T, (H + 2 Hkv) D)
    heads = qkv.reshape(len(x), n_q + 2 * n_kv, width).swapaxes(0, 1)  # (H + 2 Hkv, T, D)
    q, k, v = heads[:n_q], heads[n_q : n_q + n_kv], heads[n_q + n_kv :]  # (H or Hkv, T, D)
    if config.qk_norm:
        q = unit(q, config.norm_eps) * _float64(weights, f"{name}.q_norm.weight")
        k = unit(k, config.norm_eps) * _float64(weights, f"{name}.k_norm.weight")
    if config.positions == "rotary":
        turn = (config.rope_theta, config.rope_scaling)
        q, k = rotate(q, *turn), rotate(k, *turn)
    group = n_q // n_kv
    gathered = [attend(q[h], k[h // group], v[h // group], window) for h in range(n_q)]  # (T, D)
    return _linear(weights, config, f"{name}.out", np.concatenate(gathered, axis=-1))


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int = 0) -> np.ndarray:
    """Attend causally in one head, to the last `window` tokens if it is not 0: (T, D) -> (T, D)."""
    scores = q @ k.T / math.sqrt(q.shape[-1])  # (T, T): row = query, column = key
    distance = np.arange(len(q))[:, None] - np.arange(len(k))  # in tokens, to the past
    hidden = (distance < 0) | (distance >= window if window else False)
    return softmax(np.where(hidden, -np.inf, scores)) @ v


def rotate(x: np.ndarray, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Turn each vector by its position: (..., T, D) -> (..., T, D) (Su et al. 2021).

    Coordinates i and i + D/2 form a plane (the half-split order of GPT-NeoX and Llama), and the
    vector at position t turns in it by t theta^(-2i/D). A dot product of two turned vectors then
    depends on their positions only through the difference. Scaling slows the turning down, and with
    YaRN makes the vector longer.
    """
    length, width = x.shape[-2:]
    speed = theta ** (-np.arange(0, width, 2) / width)  # radians per position, (D/2,)
    if scaling is not None:
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


def mlp(weights: Weights, config: ModelConfig, name: str, x: np.ndarray) -> np.ndarray:
    """Transform every token by itself: (T, d) -> (T, d).

    W_down act(W_up x + b_up) + b_down; with swiglu, W_up makes a gate G and a value U of width F,
    in this order, and the hidden layer is silu(G) * U (Shazeer 2020).
    """
    hidden = _linear(weights, config, f"{name}.up", x)  # (T, F), swiglu: (T, 2 F)
    if config.activation == "swiglu":
        gate, value = hidden[:, : config.d_ff], hidden[:, config.d_ff :]  # (T, F) each
        hidden = silu(gate) * value
    else:
        hidden = ACTIVATIONS[config.activation](hidden)
    return _linear(weights, config, f"{name}.down", hidden)


# --- activations, elementwise

_erfc = np.vectorize(math.erfc, otypes=[np.float64])  # NumPy has none


def gelu(x: np.ndarray) -> np.ndarray:
    """Compute x Phi(x), Phi the normal distribution function (Hendrycks and Gimpel 2016).

    Phi(x) = (1 + erf(x / sqrt 2)) / 2 = erfc(-x / sqrt 2) / 2; the second form does not cancel for
    x far below 0.
    """
    return 0.5 * x * _erfc(-x / math.sqrt(2.0))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """Compute GELU's tanh approximation, as in GPT-2 (Hendrycks and Gimpel 2016, section 2)."""
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def relu(x: np.ndarray) -> np.ndarray:
    """Compute max(x, 0)."""
    return np.maximum(x, 0.0)


def silu(x: np.ndarray) -> np.ndarray:
    """Compute x sigmoid(x) = x / (1 + e^-x)."""
    with np.errstate(over="ignore"):  # e^-x = inf below x = -709, and x / inf = -0.0 is right
        return x / (1.0 + np.exp(-x))


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}


# --- weights and checks


def _float64(weights: Weights, name: str) -> np.ndarray:
    return np.asarray(weights[name], dtype=np.float64)


def _linear(weights: Weights, config: ModelConfig, name: str, x: np.ndarray) -> np.ndarray:
    """Apply y = W x + b to every row: (T, in) -> (T, out)."""
    y = x @ _float64(weights, f"{name}.weight").T
    return y + _float64(weights, f"{name}.bias") if _has_bias(config, name) else y


def _has_bias(config: ModelConfig, name: str) -> bool:
    part = name.rpartition(".")[2]
    return config.has_bias({"up": "mlp", "down": "mlp"}.get(part, part))


def _linear_shapes(
    config: ModelConfig, name: str, n_out: int, n_in: int
) -> dict[str, tuple[int, ...]]:
    weight: dict[str, tuple[int, ...]] = {f"{name}.weight": (n_out, n_in)}
    return weight | ({f"{name}.bias": (n_out,)} if _has_bias(config, name) else {})


def _norm_shapes(config: ModelConfig, name: str) -> dict[str, tuple[int, ...]]:
    biased = config.bias and config.norm == "layernorm"
    parts = ("weight", "bias") if biased else ("weight",)
    return {f"{name}.{part}": (config.d_model,) for part in parts}


def _check_ids(config: ModelConfig, ids: Sequence[int]) -> np.ndarray:
    tokens = np.asarray(ids)
    if tokens.ndim != 1 or not tokens.size:
        raise ValueError(f"ids: shape {tokens.shape} (expected one sequence of at least one token)")
    if tokens.dtype.kind not in "iu":
        raise ValueError(f"ids: {tokens.dtype} values (expected whole numbers)")
    if len(tokens) > config.context:
        raise ValueError(f"ids: {len(tokens)} tokens (expected {config.context} or fewer)")
    outside = tokens[(tokens < 0) | (tokens >= config.vocab_size)]  # -1 would read the last row
    if outside.size:
        raise ValueError(f"ids: id {outside[0]} (expected 0 to {config.vocab_size - 1})")
    return tokens


def _check_weights(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if name not in weights:
            raise FileError(f"weights: {name} is missing (expected shape {shape})")
        found = np.shape(weights[name])
        if found != shape:
            raise FileError(
                f"weights: {name} has the wrong shape (found {found}, expected {shape})"
            )
