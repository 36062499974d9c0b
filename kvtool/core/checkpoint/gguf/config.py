"""The fields of a GGUF file as a ModelConfig, and where its tensors are.

The families are those of `families`, under the names of llama.cpp. Keys begin with the
architecture's name. A key that no architecture reads is refused, since it might change the model.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvtool.config import ModelConfig, RopeScaling
from kvtool.core.checkpoint.families import FAMILIES
from kvtool.core.checkpoint.families.fields import Fields
from kvtool.core.checkpoint.families.rope import THETA
from kvtool.core.checkpoint.families.weights import NameMap, Stored
from kvtool.core.checkpoint.gguf.header import GGUFHeader
from kvtool.errors import FileError, UsageError
from kvtool.reading import quoted

HEAD = "output.weight"
EMBEDDING = "token_embd.weight"
FACTORS = "rope_freqs.weight"  # the divisor of each rate, of llama3's scaling
# Keys that change no logit, and those with the one value that does not.
HARMLESS = frozenset(("tensor_data_layout", "vocab_size", "rope.scaling.finetuned"))
NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.yarn_ext_factor": 1.0,
}


@dataclass(frozen=True)
class GGUFFamily:
    """How to read one architecture."""

    read: Callable[[GGUFFields], ModelConfig]
    kin: str  # its family in `families`; the tensors have other names
    permuted: bool = False  # rows of queries and keys stand in pairs that rotate together


class GGUFFields(Fields):
    """The fields of one architecture, without its name in front, and the tensors' shapes."""

    def __init__(self, header: GGUFHeader) -> None:
        start = f"{header.architecture}."
        found = {
            name.removeprefix(start): header.get(name)
            for name in header.fields
            if name.startswith(start)
        }
        super().__init__(found)
        self.header = header

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises UsageError if it is absent."""
        if name not in self.header.tensors:
            raise UsageError(f"{name} is missing")
        return self.header.tensors[name].shape

    def has(self, name: str) -> bool:
        """Whether the file has the tensor."""
        return name in self.header.tensors

    def same_for_all(self, name: str, default: int | None = None) -> int:
        """A size, or the one value of a list with an entry for each block. Raises UsageError if
        they differ."""
        found = self.data.get(name)
        if isinstance(found, list):
            if len(set(found)) != 1:
                raise UsageError(f"{name}: {quoted(found)} differs from block to block")
            self.data[name] = found[0]
        return self.size(name, default)


def family_of(header: GGUFHeader) -> GGUFFamily:
    """The architecture of a file. Raises FileError for one that kvtool does not have."""
    found = GGUF_FAMILIES.get(header.architecture)
    if found is None:
        raise FileError(
            f"{header.where}: architecture {quoted(header.architecture)} is not supported "
            f"(expected one of {', '.join(GGUF_FAMILIES)})",
            "verify-cache --server judges a server that runs it.",
        )
    return found


def read_config(header: GGUFHeader, factors: list[float] | None) -> ModelConfig:
    """The model's configuration. Raises FileError for a field that is missing or invalid, or
    unknown, since it might change the model.

    factors: the values of rope_freqs.weight, if it is in the file.
    """
    family = family_of(header)
    fields = GGUFFields(header)
    try:
        config = family.read(fields)
        config = _with_factors(config, factors)
        fields.finish(HARMLESS, NEUTRAL)
    except UsageError as error:
        where = f"{header.where}: {header.architecture}"
        raise FileError(f"{where}: {error.message}", error.hint) from error
    return config


def _sizes(f: GGUFFields) -> dict[str, Any]:
    """The sizes that every architecture has."""
    shape = f.shape(EMBEDDING)
    if len(shape) != 2 or shape[1] != f.size("embedding_length"):
        expected = f"expected [V, {f.size('embedding_length')}]"
        raise UsageError(f"{EMBEDDING} has shape {list(shape)} ({expected})")
    return {
        "vocab_size": shape[0],
        "n_layers": f.size("block_count"),
        "d_model": shape[1],
        "n_heads": f.same_for_all("attention.head_count"),
        "d_ff": f.same_for_all("feed_forward_length"),
        "context": f.size("context_length"),
        "tied": not f.has(HEAD),
    }


def _read_gpt2(f: GGUFFields) -> ModelConfig:
    found = _sizes(f)
    n_heads = found["n_heads"]
    if f.same_for_all("attention.head_count_kv", n_heads) != n_heads:
        raise UsageError(f"attention.head_count_kv: expected {n_heads}, as head_count")
    return ModelConfig(
        **found,
        positions="learned",
        norm="layernorm",
        norm_eps=f.number("attention.layer_norm_epsilon"),
        activation="gelu_tanh",  # the only GELU that llama.cpp has for it
        bias=True,
    )


def _read_llama(f: GGUFFields) -> ModelConfig:
    return _read_rotary(f)


def _read_qwen2(f: GGUFFields) -> ModelConfig:
    return _read_rotary(f, qkv_bias=True)


def _read_qwen3(f: GGUFFields) -> ModelConfig:
    return _read_rotary(f, qk_norm=True)


def _read_rotary(f: GGUFFields, qkv_bias: bool = False, qk_norm: bool = False) -> ModelConfig:
    """Llama and related models. Biases are where the first block has them."""
    found = _sizes(f)
    d_model, n_heads = found["d_model"], found["n_heads"]
    n_kv_heads = f.same_for_all("attention.head_count_kv", n_heads)
    if n_heads % n_kv_heads:
        raise UsageError(f"attention.head_count_kv: {n_kv_heads} do not divide {n_heads} heads")
    if "attention.key_length" not in f.data and d_model % n_heads:
        raise UsageError(f"attention.head_count: {n_heads} do not divide {d_model}")
    head_dim = f.size("attention.key_length", d_model // n_heads)
    if f.size("attention.value_length", head_dim) != head_dim:
        raise UsageError(f"attention.value_length: expected {head_dim}, as key_length")
    turned = f.size("rope.dimension_count", head_dim)
    if turned != head_dim or head_dim % 2:
        raise UsageError(f"rope.dimension_count: {turned} is not supported (expected {head_dim})")
    theta, scaling = _rotation(f, found["context"])
    windowed = f.take("attention.sliding_window", 0)
    if windowed and not windowed >= found["context"]:
        raise UsageError(f"attention.sliding_window: {quoted(windowed)} is not supported")
    return ModelConfig(
        **found,
        n_kv_heads=n_kv_heads,
        head_size=0 if head_dim * n_heads == d_model else head_dim,
        positions="rotary",
        norm="rmsnorm",
        norm_eps=f.number("attention.layer_norm_rms_epsilon"),
        activation="swiglu",
        bias=False,
        qkv_bias=qkv_bias or f.has("blk.0.attn_q.bias") or None,  # None: as `bias`
        out_bias=f.has("blk.0.attn_output.bias") or None,
        mlp_bias=f.has("blk.0.ffn_gate.bias") or None,
        qk_norm=qk_norm,
        rope_theta=theta,
        rope_scaling=scaling,
    )


def _rotation(f: GGUFFields, context: int) -> tuple[float, RopeScaling | None]:
    """theta, and the scaling of the angles."""
    theta = f.number("rope.freq_base", THETA)
    old = f.number("rope.scale_linear", 1.0)
    kind = f.take("rope.scaling.type", "linear" if old != 1 else "none")
    factor = f.number("rope.scaling.factor", old) if f.data.get("rope.scaling.factor") else old
    f.take("rope.scaling.factor")
    first = f.size("rope.scaling.original_context_length", context)
    if kind not in ("none", "linear", "yarn"):
        raise UsageError(f"rope.scaling.type: {quoted(kind)} is not supported")
    if kind == "yarn":
        times = f.number(
            "rope.scaling.attn_factor", f.data.get("rope.scaling.yarn_attn_factor", 1.0)
        )
        f.take("rope.scaling.yarn_attn_factor")
        scaling = RopeScaling(
            kind,
            factor,
            first,
            beta_slow=f.number("rope.scaling.yarn_beta_slow", 1.0),
            beta_fast=f.number("rope.scaling.yarn_beta_fast", 32.0),
            attention_factor=times * (1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0),
        )
        return theta, scaling
    if kind == "linear" and factor != 1:
        return theta, RopeScaling("linear", factor)
    return theta, None


# The scalings of released models with such factors: Llama 3.1 and later.
LLAMA3 = [(factor, 8192, 1.0, 4.0) for factor in (8.0, 32.0, 16.0, 4.0, 2.0)]
CLOSE = 1e-5  # relative; the factors are float32


def _with_factors(config: ModelConfig, factors: list[float] | None) -> ModelConfig:
    """A configuration whose rates are divided by `factors`, if they are those of llama3.

    The file holds each factor, rounded to float32, and not the settings behind them.
    """
    if factors is None or all(factor == 1 for factor in factors):
        return config
    if config.rope_scaling is not None or config.positions != "rotary":
        raise UsageError(f"{FACTORS}: contradicts the other settings of rotary positions")
    firsts = dict.fromkeys((8192, config.context, round(config.context / max(factors))))
    tried = [*LLAMA3, *((max(factors), first, 1.0, 4.0) for first in firsts if first)]
    for factor, first, low, high in tried:
        scaling = RopeScaling("llama3", factor, first, low=low, high=high)
        if _close(factors, _llama3_factors(config, scaling)):
            return dataclasses.replace(config, rope_scaling=scaling)
    raise UsageError(
        f"{FACTORS}: holds other factors than those of llama3 (found up to {max(factors):g})",
        "kvtool has llama3's, linear and yarn.",
    )


def _llama3_factors(config: ModelConfig, s: RopeScaling) -> list[float]:
    """The divisor of each rate, as `models.rope_scaling` computes it."""
    found = []
    for i in range(0, config.head_dim, 2):
        turns = s.original_context * config.rope_theta ** (-i / config.head_dim) / (2 * math.pi)
        kept = min(max((turns - s.low) / (s.high - s.low), 0.0), 1.0)
        found.append(1 / ((1 - kept) / s.factor + kept))
    return found


def _close(a: list[float], b: list[float]) -> bool:
    return len(a) == len(b) and all(abs(x - y) <= CLOSE * y for x, y in zip(a, b, strict=True))


# --- where our tensors are

# llama.cpp's word for each part of a name. Blocks are numbered alike.
RENAMED = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm",
    "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
THEIRS = re.compile(r"(?:(?:layers|h)\.(\d+)\.)?(.+)\.(weight|bias)")


def _renamed(name: str) -> str:
    """llama.cpp's name for a tensor of Hugging Face.

    >>> _renamed("layers.3.self_attn.q_proj.weight")
    'blk.3.attn_q.weight'
    """
    found = THEIRS.fullmatch(name)
    assert found is not None
    block = "" if found[1] is None else f"blk.{found[1]}."
    return f"{block}{RENAMED[found[2]]}.{found[3]}"


def names(config: ModelConfig, family: GGUFFamily) -> NameMap:
    """Maps each tensor of kvtool to the file's. No matrix is stored transposed."""
    return {
        ours: Stored(tuple(
            (_renamed(name), shape[::-1] if stored.transposed else shape)
            for name, shape in stored.parts
        ))
        for ours, stored in FAMILIES[family.kin].names(config).items()
    }  # fmt: skip


GGUF_FAMILIES: Mapping[str, GGUFFamily] = {
    "gpt2": GGUFFamily(_read_gpt2, "gpt2"),
    "llama": GGUFFamily(_read_llama, "llama", permuted=True),
    "qwen2": GGUFFamily(_read_qwen2, "qwen2"),
    "qwen3": GGUFFamily(_read_qwen3, "qwen3"),
}
