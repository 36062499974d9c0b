"""The layers of kvtool's own models, by their configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtool.config import OWN, ModelConfig, check_int, own_types
from kvtool.core.plan.layers import MAX_LAYERS, Layer, Shapes
from kvtool.core.plan.weights import Counted
from kvtool.errors import UsageError
from kvtool.reading import quoted

LATENT = f"{OWN}latent"
PLAIN = (f"{OWN}decoder", f"{OWN}seq2seq")


def read_own(data: Mapping[str, Any], where: str) -> tuple[Shapes, Counted | None]:
    """The shapes, and the numbers of weights where it is a plain decoder. Raises FileError or
    UsageError for fields that are wrong."""
    kind = data["model_type"]
    check_int("n_layers", data.get("n_layers", 1), 1, MAX_LAYERS)
    if "vocab_size" not in data:
        raise UsageError("vocab_size is missing")
    if kind not in own_types():
        raise UsageError(f"model_type {quoted(kind)} is not known, so nothing is planned")
    if kind not in PLAIN:
        return _general(data), None
    config = ModelConfig.from_dict(data, where)
    width = config.head_dim
    first = config.first_window_layer
    layers = tuple(
        Layer(config.n_kv_heads, width, width, config.window if i >= first else 0)
        for i in range(config.n_layers)
    )
    cross = layers if config.n_encoder_layers else ()
    counted = None if cross else _count(config)
    return Shapes(layers, config.n_layers, cross, None, config.context), counted


def _general(data: Mapping[str, Any]) -> Shapes:
    """Those with fields of their own, of which a cache is concerned with few: it keeps every token
    of every layer, whatever the layer sees."""
    usual = {"vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "head_size", "context"}
    c = ModelConfig(**{key: value for key, value in data.items() if key in usual})
    layer = Layer(c.n_kv_heads, c.head_dim, c.head_dim)
    if data["model_type"] == LATENT:
        for name in ("kv_rank", "rotary_dim"):
            check_int(name, data.get(name), 1)
        layer = Layer(1, data["kv_rank"] + data["rotary_dim"], 0)
    return Shapes((layer,) * c.n_layers, c.n_layers, context=c.context)


def _count(c: ModelConfig) -> Counted:
    norm = c.d_model * (2 if c.norm == "layernorm" else 1)
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    own = c.d_model * (2 * q + 2 * kv) + (q + 2 * kv) * c.has_bias("qkv")
    own += c.d_model * c.has_bias("out") + 2 * norm + 2 * c.head_dim * c.qk_norm
    up = (2 if c.gated else 1) * c.d_ff
    own += c.d_model * (up + c.d_ff) + (up + c.d_model) * c.has_bias("mlp")
    head = c.vocab_size * c.d_model
    read = c.n_layers * own + norm + head
    positions = c.context * c.d_model if c.positions == "learned" else 0
    return Counted(read + (0 if c.tied else head) + positions, read)
