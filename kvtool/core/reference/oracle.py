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
2020 (windows); Peng et al. 2023 (YaRN); Ding et al. 2024 (LongRoPE); Gemma Team 2024 (caps, norms
on both sides); OLMo Team 2024 (norms after).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvtool.config import ModelConfig, RopeScaling
from kvtool.core.reference import oracle_latent
from kvtool.core.reference.oracle_parts import Rules, Weights, attend, bounded, turned, unit
from kvtool.core.reference.oracle_parts import rotate as rotate
from kvtool.core.reference.oracle_parts import softmax as softmax
from kvtool.errors import FileError

FAMILIES = ("decoder", "general", "latent")  # whose formulas these are


def logits(weights: Weights, config: ModelConfig, ids: Sequence[int]) -> np.ndarray:
    """Score every vocabulary entry as the successor of each token: (T,) ids -> (T, V) float64.

    Row t depends on ids[0..t] only. Names in `weights` beyond `weight_shapes(config)` are not read.

    Raises ValueError for ids that are empty, not whole numbers, outside 0..V-1, or longer than the
    context, and for an encoder-decoder config; FileError for a weight that is missing or misshapen.
    """
    shapes = weight_shapes(config)  # refuses an encoder-decoder config
    tokens = _check_ids(config, ids)
    _check_weights(weights, shapes)
    x = embed(weights, config, tokens) * _said(config, "embed_scale", 1.0)  # (T, d)
    share = _said(config, "residual_scale", 1.0)
    for i in range(config.n_layers):
        layer, rules = f"layers.{i}", layer_rules(config, i)
        y = _norm_if(weights, config, f"{layer}.norm1", x)
        attends = oracle_latent.attention if config.kind == "latent" else attention
        y = attends(weights, config, f"{layer}.attn", y, rules)
        x = x + share * _norm_if(weights, config, f"{layer}.norm1_after", y)
        y = mlp(weights, config, f"{layer}.mlp", _norm_if(weights, config, f"{layer}.norm2", x))
        x = x + share * _norm_if(weights, config, f"{layer}.norm2_after", y)
    head = "embed.tokens.weight" if config.tied else "head.weight"
    found = norm(weights, config, "norm", x) @ _float64(weights, head).T  # (T, d) @ (d, V)
    return bounded(found / _said(config, "logits_scale", 1.0), _said(config, "logits_cap", 0.0))


def layer_rules(config: ModelConfig, i: int) -> Rules:
    """How layer number i attends."""
    sees_all = i < config.first_window_layer or i in _said(config, "full_layers", ())
    window = 0 if sees_all else config.window
    turn: tuple[float, RopeScaling | None] | None = (config.rope_theta, config.rope_scaling)
    if window and _said(config, "window_theta", 0.0):
        turn = (_said(config, "window_theta", 0.0), _said(config, "window_scaling", None))
    if config.positions != "rotary" or i in _said(config, "unrotated_layers", ()):
        turn = None
    scale = _said(config, "attention_scale", 0.0) or 1.0 / math.sqrt(config.head_dim)
    if _said(config, "scale_by_depth", False):
        scale /= i + 1
    turned = _said(config, "rotary_dim", 0) or config.head_dim
    return Rules(window, turn, turned, scale, _said(config, "attention_cap", 0.0))


def _said(config: ModelConfig, name: str, default: Any) -> Any:
    """A field of the family general; of the other, what it would be there."""
    return vars(config).get(name, default)


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name every weight of a decoder-only model with its shape; matrices are (out, in), as y = W x.

    Raises ValueError for an encoder-decoder config.
    """
    if config.n_encoder_layers:
        found = config.n_encoder_layers
        raise ValueError(f"oracle: decoder-only models (found {found} encoder layers, expected 0)")
    if config.kind not in FAMILIES:
        raise ValueError(f"oracle: has the formulas of {FAMILIES} (found {config.kind})")
    d, ff, width = config.d_model, config.d_ff, config.head_dim
    n_qkv = (config.n_heads + 2 * config.n_kv_heads) * width
    n_up = 2 * ff if config.activation in GATES else ff
    shapes: dict[str, tuple[int, ...]] = {"embed.tokens.weight": (config.vocab_size, d)}
    if config.positions == "learned":
        shapes["embed.positions.weight"] = (config.context, d)
    heads = {"q": config.n_heads, "k": config.n_kv_heads}
    for i in range(config.n_layers):
        layer = f"layers.{i}"
        for name in NORMS[_said(config, "norm_place", "before")]:
            shapes |= _norm_shapes(config, f"{layer}.{name}")
        if config.kind == "latent":
            shapes |= oracle_latent.shapes(config, f"{layer}.attn")
        else:
            shapes |= _linear_shapes(config, f"{layer}.attn.qkv", n_qkv, d)
            shapes |= _linear_shapes(config, f"{layer}.attn.out", d, config.n_heads * width)
        for x, n in heads.items() if config.qk_norm else ():
            size = n * width if _said(config, "qk_norm_whole", False) else width
            shapes |= {f"{layer}.attn.{x}_norm.weight": (size,)}
        shapes |= _linear_shapes(config, f"{layer}.mlp.up", n_up, d)
        shapes |= _linear_shapes(config, f"{layer}.mlp.down", d, ff)
    shapes |= _norm_shapes(config, "norm")
    if not config.tied:
        shapes["head.weight"] = (config.vocab_size, d)
    return shapes


# The norms of a layer, by where they stand.
NORMS = {
    "before": ("norm1", "norm2"),
    "after": ("norm1_after", "norm2_after"),
    "both": ("norm1", "norm1_after", "norm2", "norm2_after"),
}

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
    weight; in Gemma's, 1 + weight.
    """
    weight = _scale(weights, config, f"{name}.weight")  # (d,)
    if config.norm == "layernorm":
        x = x - x.mean(axis=-1, keepdims=True)  # now the mean of squares is the variance
    y = unit(x, config.norm_eps) * weight
    if config.norm == "layernorm" and config.bias:
        return y + _float64(weights, f"{name}.bias")
    return y


def _norm_if(weights: Weights, config: ModelConfig, name: str, x: np.ndarray) -> np.ndarray:
    """`norm` where a layer has one of that name."""
    there = name.rpartition(".")[2] in NORMS[_said(config, "norm_place", "before")]
    return norm(weights, config, name, x) if there else x


def _scale(weights: Weights, config: ModelConfig, name: str) -> np.ndarray:
    """What a norm multiplies by."""
    return _float64(weights, name) + (1.0 if _said(config, "norm_plus_one", False) else 0.0)


def attention(
    weights: Weights, config: ModelConfig, name: str, x: np.ndarray, rules: Rules
) -> np.ndarray:
    """Let every token gather from itself and the tokens before it: (T, d) -> (T, d).

    Head by head, softmax(q k^T / sqrt(D)) v with the future masked (Vaswani et al. 2017, section
    3.2). With fewer key-value heads, H / Hkv neighbouring query heads share one (Ainslie et al.
    2023): query head h reads key-value head h // (H / Hkv). With qk_norm, each query and key is
    first brought to unit size and rescaled (Henry et al. 2020), or those of all heads together.
    """
    n_q, n_kv, width = config.n_heads, config.n_kv_heads, config.head_dim
    qkv = _linear(weights, config, f"{name}.qkv", x)  # (T, (H + 2 Hkv) D)
    parts = np.split(qkv, [n_q * width, (n_q + n_kv) * width], axis=-1)
    whole = _said(config, "qk_norm_whole", False)
    for i, which in enumerate("qk" if config.qk_norm else ""):
        heads = parts[i] if whole else parts[i].reshape(len(x), -1, width)
        scale = _scale(weights, config, f"{name}.{which}_norm.weight")
        parts[i] = (unit(heads, config.norm_eps) * scale).reshape(len(x), -1)
    q, k, v = (part.reshape(len(x), -1, width).swapaxes(0, 1) for part in parts)  # (H, T, D)
    if rules.turn is not None:
        q, k = (turned(part, rules.turned, *rules.turn) for part in (q, k))
    group = n_q // n_kv
    gathered = [attend(q[h], k[h // group], v[h // group], rules) for h in range(n_q)]  # (T, D)
    return _linear(weights, config, f"{name}.out", np.concatenate(gathered, axis=-1))


def mlp(weights: Weights, config: ModelConfig, name: str, x: np.ndarray) -> np.ndarray:
    """Transform every token by itself: (T, d) -> (T, d).

    W_down act(W_up x + b_up) + b_down; with a gate, W_up makes a gate G and a value U of width F,
    in this order, and the hidden layer is silu(G) * U or gelu(G) * U (Shazeer 2020).
    """
    hidden = _linear(weights, config, f"{name}.up", x)  # (T, F), with a gate (T, 2 F)
    if config.activation in GATES:
        gate, value = hidden[:, : config.d_ff], hidden[:, config.d_ff :]  # (T, F) each
        hidden = GATES[config.activation](gate) * value
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
GATES = {"swiglu": silu, "geglu": gelu_tanh}


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
