"""How many numbers the weights of a model are, by the shapes that its configuration implies.

`BUILDS` says of each type how its layers are built, where it is known; of others only a file says
how large they are. Every line is compared with models that transformers builds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from kvtool.core.plan.fields import Fields
from kvtool.core.plan.layers import LATENT, Shapes, value_width
from kvtool.errors import UsageError

Flag = bool | str  # a string names the field that says it


class Counted(NamedTuple):
    """Numbers of all weights, and of those that a step of decoding reads at least."""

    total: int
    read: int


@dataclass(frozen=True)
class Experts:
    """A mixture: `n` experts of which a token takes `used`, of `width`, fields all; `shared` of the
    width of one, or one of the width `shared_width`. The first layers may be dense."""

    n: str = "num_experts"
    used: str = "num_experts_per_tok"
    width: str = "moe_intermediate_size"
    shared: str = ""
    shared_width: str = ""
    shared_gate: bool = False
    router_bias: bool = False
    correction: bool = False  # a number for each expert that its choice is corrected by
    bias: bool = False
    dense: int | str = 0  # how many of the first layers have none, or the field that says it


@dataclass(frozen=True)
class Build:
    """How a decoder's layers differ from llama's."""

    qkv_bias: Flag = False
    out_bias: Flag = False
    mlp_bias: Flag = False
    gated: bool = True
    norms: int = 2
    norm: int = 1  # numbers of a norm for each channel: 2 with a bias, 0 with neither
    final: bool = True
    qk_norm: str = ""  # "head", or "whole" over all heads at once
    head_bias: bool = False
    ff: str = "intermediate_size"  # a field; where its type has no default, 4 * the width
    positions: int = -1  # learned ones: rows beyond max_position_embeddings; -1: none
    embedding_norm: bool = False
    experts: Experts | None = None
    extra: Callable[[Fields], int] | None = None  # more of a layer, or less
    other: Callable[[Fields], bool] | None = None  # whether a configuration is built in another way


def count_weights(f: Fields, shapes: Shapes) -> Counted | None:
    """The numbers of all weights; None where it is not known how the type is built.

    Raises UsageError for fields that are missing or unsound.
    """
    build = BUILDS.get(f.architecture.name)
    if build is None or shapes.cross or (build.experts and not _are_known(f, build.experts)):
        return None
    if build.other is not None and build.other(f):
        return None
    d, vocabulary = f.size("hidden_size"), f.size("vocab_size")
    attention = _latent(f, d) if f.architecture.name in LATENT else 0
    total = read = 0
    for i, layer in enumerate(shapes.layers):
        own = attention or _attention(f, build, d, layer.n_heads, layer.key_dim)
        own += build.norms * build.norm * d + (build.extra(f) if build.extra else 0)
        whole, used = _mlp(f, build, d, i)
        total, read = total + own + whole, read + own + used
    once = build.norm * d * (build.final + build.embedding_norm)
    head = vocabulary * (d + build.head_bias)
    looked_up = 0 if f.flag("tie_word_embeddings") else vocabulary * d
    if build.positions >= 0:
        looked_up += (f.size("max_position_embeddings") + build.positions) * d
    return Counted(total + once + head + looked_up, read + once + head)


def _is(f: Fields, flag: Flag) -> int:
    return int(f.flag(flag) if isinstance(flag, str) else flag)


def _attention(f: Fields, build: Build, d: int, n_kv_heads: int, width: int) -> int:
    """One layer's queries, keys, values and output."""
    n_heads = f.size("num_attention_heads")
    qkv, out = (n_heads + 2 * n_kv_heads) * width, n_heads * width
    norms = {"": 0, "head": 2 * width, "whole": (n_heads + n_kv_heads) * width}
    biases = qkv * _is(f, build.qkv_bias) + d * _is(f, build.out_bias)
    return d * (qkv + out) + biases + max(build.norm, 1) * norms[build.qk_norm]


def _latent(f: Fields, d: int) -> int:
    """One layer's latent attention."""
    n_heads, rank, q_rank = (
        f.size("num_attention_heads"),
        f.size("kv_lora_rank"),
        f.maybe("q_lora_rank"),
    )
    turning, still = f.size("qk_rope_head_dim"), f.size("qk_nope_head_dim")
    value = value_width(f)
    query = n_heads * (still + turning)
    queries = q_rank * (d + 1 + query) if q_rank else d * query
    down = d * (rank + turning) + rank  # and its norm
    biases = (q_rank + rank + turning + d) * f.flag("attention_bias")
    return queries + down + rank * n_heads * (still + value) + n_heads * value * d + biases


def _mlp(f: Fields, build: Build, d: int, layer: int) -> tuple[int, int]:
    """One layer's feed-forward network: all of it, and what a token reads."""
    experts = build.experts
    if experts is None or _is_dense(f, experts, layer):
        width = f.size(build.ff, None if build.ff in f.architecture.defaults else 4 * d)
        found = (3 if build.gated else 2) * d * width
        found += _is(f, build.mlp_bias) * ((2 if build.gated else 1) * width + d)
        return found, found
    n, used, width = (f.size(name) for name in (experts.n, experts.used, experts.width))
    if used > n:
        raise UsageError(f"{f.name(experts.used)}: {used} of {n} experts")
    one = 3 * d * width + experts.bias * (2 * width + d)
    rest = n * (d + experts.router_bias + experts.correction)
    rest += experts.shared_gate * d
    if experts.shared_width:
        rest += 3 * d * f.maybe(experts.shared_width)
    elif experts.shared:
        shared = width * f.maybe(experts.shared)
        rest += 3 * d * shared + _is(f, build.mlp_bias) * (2 * shared + d)
    return n * one + rest, used * one + rest


def _is_dense(f: Fields, experts: Experts, layer: int) -> bool:
    kinds = f.by_layer("mlp_layer_types", f.size("num_hidden_layers"))
    if kinds is not None:
        return bool(kinds[layer] == "dense")
    return layer < (f.maybe(experts.dense) if isinstance(experts.dense, str) else experts.dense)


def _are_known(f: Fields, experts: Experts) -> bool:
    """Whether fields say how many experts there are, and put them where the table does."""
    steps = (f.get(name) for name in ("decoder_sparse_step", "moe_layer_freq"))
    if f.get("mlp_only_layers") or any(step not in (None, 1) for step in steps):
        return False
    return all(f.get(name) is not None for name in (experts.n, experts.used, experts.width))


def _width(f: Fields) -> int:
    return f.size("head_dim", f.size("hidden_size") // f.size("num_attention_heads"))


def _sinks(f: Fields) -> int:
    return f.size("num_attention_heads")


def _norms_of_heads(f: Fields, flag: str) -> int:
    """A norm of its own for each head's queries and keys, where a field says so."""
    n_heads = f.size("num_attention_heads")
    n_kv_heads = f.size("num_key_value_heads", n_heads)
    return (n_heads + n_kv_heads) * _width(f) * f.flag(flag)


def _bitnet_norms(f: Fields) -> int:
    return f.size("hidden_size") + f.size("intermediate_size")


def _glm_norms(f: Fields) -> int:
    return 2 * _width(f) * f.flag("use_qk_norm")


def _stablelm(f: Fields) -> int:
    """Norms of heads; without a norm of its own for an MLP beside attention."""
    less = 2 * f.size("hidden_size") * f.flag("use_parallel_residual")
    return _norms_of_heads(f, "qk_layernorm") - less


def _falcon(f: Fields) -> int:
    """The second norm of a layer, where there is one; less where a cache has more heads of keys
    and values than the layer computes."""
    d, n_heads = f.size("hidden_size"), f.size("num_attention_heads")
    if not f.flag("new_decoder_architecture"):
        return 2 * d * (not f.flag("parallel_attn", True))
    spread = n_heads - f.size("num_kv_heads", n_heads)
    norm = 2 * d * (f.get("num_ln_in_parallel_attn") != 1)
    return norm - 2 * spread * _width(f) * (d + f.flag("bias"))


def _is_other_opt(f: Fields) -> bool:
    """Embeddings of another width, norms behind their blocks or without weights."""
    return (
        f.get("word_embed_proj_dim") not in (None, f.size("hidden_size"))
        or not f.flag("do_layer_norm_before", True)
        or not f.flag("layer_norm_elementwise_affine", True)
        or f.flag("_remove_final_layer_norm")
        or not f.flag("enable_bias", True)
    )


LLAMA = Build("attention_bias", "attention_bias", "mlp_bias")
GPT2 = Build(True, True, True, gated=False, norm=2, ff="n_inner", positions=0)
GPTJ = Build(False, False, True, gated=False, norms=1, norm=2, ff="n_inner", head_bias=True)
_MIXTRAL = Experts("num_local_experts", width="intermediate_size")
_DEEPSEEK = Experts("n_routed_experts", shared="n_shared_experts", dense="first_k_dense_replace")
_CORRECTED = Experts(
    "n_routed_experts", shared="n_shared_experts", dense="first_k_dense_replace", correction=True
)
QKV = Build("attention_bias", "attention_bias")
BUILDS: dict[str, Build] = {
    "llama": LLAMA, "granite": LLAMA, "smollm3": LLAMA, "iquestcoder": LLAMA,
    "gemma": QKV, "cwm": Build("attention_bias", "attention_bias", "mlp_bias"),
    "mistral": Build(), "ministral": Build(), "ministral3": Build(),
    "ernie4_5": Build("use_bias", "use_bias", "use_bias"),
    "internlm3": Build("qkv_bias", "bias", "bias"),
    "phi3": Build(), "glm": Build("attention_bias"), "glm4": Build("attention_bias", norms=4),
    "qwen2": Build(True), "qwen3": Build("attention_bias", "attention_bias", qk_norm="head"),
    "seed_oss": Build("attention_bias", "attention_out_bias", "mlp_bias"),
    "hunyuan_v1_dense": Build("attention_bias", "attention_bias", qk_norm="head"),
    "olmo": Build("attention_bias", "attention_bias", norm=0),
    "olmo2": Build("attention_bias", "attention_bias", qk_norm="whole"),
    "olmo3": Build("attention_bias", "attention_bias", qk_norm="whole"),
    "exaone4": Build(qk_norm="head"),
    "cohere": Build("attention_bias", "attention_bias", norms=1,
                    extra=lambda f: _norms_of_heads(f, "use_qk_norm")),
    "cohere2": Build("attention_bias", "attention_bias", norms=1),
    "gemma2": Build("attention_bias", "attention_bias", norms=4),
    "gemma3_text": Build("attention_bias", "attention_bias", norms=4, qk_norm="head"),
    "vaultgemma": QKV,
    "arcee": Build("attention_bias", "attention_bias", "mlp_bias", gated=False),
    "nemotron": Build("attention_bias", "attention_bias", "mlp_bias", gated=False, norm=2),
    "starcoder2": Build("use_bias", "use_bias", "use_bias", gated=False, norm=2),
    "phi": Build(True, True, True, gated=False, norms=1, norm=2, head_bias=True),
    "jais2": Build("attention_bias", "attention_bias", "mlp_bias", gated=False, norm=2),
    "bitnet": Build("attention_bias", "attention_bias", extra=_bitnet_norms),
    "diffllama": Build("attention_bias", "attention_bias", extra=lambda f: 4 * _width(f)),
    "granite_swa": Build("attention_bias", "attention_bias", "mlp_bias", extra=_sinks),
    "hyperclovax": Build("attention_bias", "attention_bias", "mlp_bias", norms=4),
    "gpt2": GPT2, "gpt-sw3": GPT2, "gpt_bigcode": GPT2,
    "gpt_neo": Build(False, True, True, gated=False, norm=2, positions=0),
    "gpt_neox": Build("attention_bias", "attention_bias", True, gated=False, norm=2),
    "gptj": GPTJ, "codegen": GPTJ,
    "bloom": Build(True, True, True, gated=False, norm=2, ff="n_inner", embedding_norm=True),
    "mpt": Build(gated=False, ff="n_inner"),
    "xglm": Build(True, True, True, gated=False, norm=2, ff="ffn_dim"),
    "biogpt": Build(True, True, True, gated=False, norm=2, positions=2),
    "persimmon": Build(True, True, True, gated=False, norm=2, qk_norm="head"),
    "helium": Build("attention_bias", mlp_bias="mlp_bias"),
    "stablelm": Build("use_qkv_bias", norm=2, extra=_stablelm),
    "opt": Build(
        True, True, True, gated=False, norm=2, ff="ffn_dim", positions=2, other=_is_other_opt
    ),
    "falcon": Build("bias", "bias", "bias", gated=False, norms=1, norm=2, ff="ffn_hidden_size",
                    extra=_falcon),
    "apertus": Build("attention_bias", "attention_bias", gated=False, qk_norm="head",
                     extra=lambda f: 4),  # of the activation
    "nanochat": Build("attention_bias", "attention_bias", gated=False, norms=0, final=False),
    # Mixtures of experts
    "mixtral": Build(experts=_MIXTRAL),
    "qwen2_moe": Build("qkv_bias", experts=Experts(
        shared_width="shared_expert_intermediate_size", shared_gate=True)),
    "qwen3_moe": Build("attention_bias", "attention_bias", qk_norm="head", experts=Experts()),
    "olmoe": Build("attention_bias", "attention_bias", qk_norm="whole",
                   experts=Experts(width="intermediate_size")),
    "granitemoe": Build("attention_bias", "attention_bias", experts=_MIXTRAL),
    "granitemoeshared": Build("attention_bias", "attention_bias", experts=Experts(
        "num_local_experts", width="intermediate_size", shared_width="shared_intermediate_size")),
    "phimoe": Build("attention_bias", "attention_bias", norm=2, head_bias=False,
                    experts=_MIXTRAL),
    "gpt_oss": Build("attention_bias", "attention_bias", extra=_sinks, experts=Experts(
        "num_local_experts", width="intermediate_size", router_bias=True, bias=True)),
    "deepseek_v2": Build(mlp_bias="mlp_bias", experts=_DEEPSEEK),
    "deepseek_v3": Build(experts=_CORRECTED),
    "glm4_moe_lite": Build(experts=replace(_CORRECTED, dense=1)),
    "minicpm3": Build(mlp_bias="mlp_bias"), "youtu": Build(),
    "glm4_moe": Build("attention_bias", experts=_CORRECTED, extra=_glm_norms),
    "dots1": Build("attention_bias", "attention_bias", qk_norm="head", experts=_CORRECTED),
    "minimax_m2": Build(qk_norm="whole", experts=Experts(
        "num_local_experts", width="intermediate_size", correction=True)),
    "solar_open": Build("attention_bias", experts=_CORRECTED),
    "aria_text": Build("attention_bias", "attention_bias", "mlp_bias", experts=Experts(
        "moe_num_experts", "moe_topk", "intermediate_size", shared="moe_num_shared_experts")),
}  # fmt: skip
