"""What each layer of a model keeps of a token, read from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kvtool.config import check_int
from kvtool.core.plan.architectures import CHUNKED, FULL, SLIDING, Architecture
from kvtool.core.plan.fields import Fields, divided
from kvtool.errors import UsageError
from kvtool.reading import quoted, short

MAX_LAYERS = 10_000  # the deepest models have a few hundred


def layer_count(f: Fields, known: str = "num_hidden_layers") -> int:
    """How many layers there are. Raises UsageError for more than any model has."""
    n = f.size(known)
    check_int(f.name(known), n, 1, MAX_LAYERS)
    return n


@dataclass(frozen=True)
class Layer:
    """One layer: key-value heads, and channels of a key and of a value in each.

    value_dim 0: values are the keys once more. window: positions that a token sees; 0: all.
    """

    n_heads: int
    key_dim: int
    value_dim: int
    window: int = 0


@dataclass(frozen=True)
class Shapes:
    """The layers that keep keys and values, and those of a source that decoding reads.

    n_layers: of all layers; those beyond `layers` use the keys of others. expanded: numbers of a
    token in a layer, if latents were kept as the keys and values of all heads.
    """

    layers: tuple[Layer, ...]
    n_layers: int
    cross: tuple[Layer, ...] = ()
    source_tokens: int | None = None  # None: as many as are planned for
    context: int | None = None
    expanded: int = 0

    @property
    def windows(self) -> set[int]:
        """The windows of layers that have one."""
        return {layer.window for layer in self.layers if layer.window}


def read_shapes(f: Fields, whole: str = "") -> Shapes:
    """The layers of a configuration; `whole`: the type of which it is a part. Raises UsageError for
    fields that are missing or unsound."""
    found = READERS.get(f.architecture.name, _read)(f)
    if whole in PAIRS:
        found = replace(found, cross=tuple(replace(x, window=0) for x in found.layers))
    return found


def _read(f: Fields) -> Shapes:
    n_layers, n_heads = layer_count(f), f.size("num_attention_heads")
    n_kv_heads = f.size("num_key_value_heads", n_heads)
    if n_heads % n_kv_heads:
        of = f.name("num_key_value_heads")
        raise UsageError(f"{of}: {n_kv_heads} key-value heads do not divide {n_heads} heads")
    head_dim = f.get("head_dim")
    head_dim = divided(f, "hidden_size", "num_attention_heads") if head_dim is None else head_dim
    kinds = layer_kinds(f, n_layers)
    others = f.get("per_layer_config") or {}
    layers = []
    for i, window in enumerate(_windows(f, kinds)):
        own = _overrides(others, i)
        heads = own.size("num_key_value_heads", n_kv_heads)
        width = own.size("head_dim", f.size("head_dim", head_dim))
        layers.append(Layer(heads, width, width, window))
    n_own = n_layers - f.maybe("num_kv_shared_layers")
    if n_own < 1:
        raise UsageError(f"num_kv_shared_layers: leaves none of {n_layers} layers keys of its own")
    return Shapes(
        tuple(layers[:n_own]), n_layers, context=f.maybe("max_position_embeddings") or None
    )


def _overrides(others: Any, i: int) -> Fields:
    """What a layer has otherwise than the rest."""
    found = others.get(str(i), {}) if isinstance(others, dict) else others
    if not isinstance(found, dict):
        raise UsageError(f"per_layer_config: {short(str(found))} is not an object")
    return Fields(found, Architecture("per_layer_config"))


# --- layers with a window


def layer_kinds(f: Fields, n_layers: int) -> list[str]:
    """What layer_types says, or what the type's configuration makes of its other fields."""
    given = f.by_layer("layer_types", n_layers)
    rule = KINDS.get(f.architecture.name)
    if given is not None and rule is not _all_alike:
        if unknown := [kind for kind in given if kind not in (FULL, SLIDING, CHUNKED)]:
            raise UsageError(
                f"layer_types: {quoted(unknown[0])} layers keep other things than keys and values "
                "of each token"
            )
        return given
    if rule is not None:
        return rule(f, n_layers)
    default = f.architecture.layer_types
    if default and not f.data:
        return list(default)
    if default:
        raise UsageError("layer_types is missing: which layers have a window is not known")
    return _all_alike(f, n_layers)


def _windows(f: Fields, kinds: list[str]) -> list[int]:
    size = f.maybe("sliding_window")
    chunk = f.maybe("attention_chunk_size")
    found = {FULL: 0, SLIDING: size, CHUNKED: chunk}
    for kind, name in ((SLIDING, "sliding_window"), (CHUNKED, "attention_chunk_size")):
        if kind in kinds and not found[kind]:
            raise UsageError(f"layer_types: names {kind}, but {name} is not set")
    return [found[kind] for kind in kinds]


def _all_alike(f: Fields, n_layers: int) -> list[str]:
    """All have the window, if there is one, and nothing that the type reads says otherwise."""
    reads = "use_sliding_window" in f.architecture.defaults
    used = f.flag("use_sliding_window", not reads) or not reads
    windowed = f.maybe("sliding_window") and used
    return [
        SLIDING if windowed else CHUNKED if f.maybe("attention_chunk_size") else FULL
    ] * n_layers


def _all_full(f: Fields, n_layers: int) -> list[str]:
    """None has a window but where layer_types says so."""
    return [FULL] * n_layers


def _early(f: Fields, n_layers: int) -> list[str]:
    """Every other one of the first max_window_layers, if use_sliding_window says so."""
    first = f.size("max_window_layers", n_layers, low=0)
    used = f.flag("use_sliding_window") and f.maybe("sliding_window")
    return [SLIDING if used and i < first and i % 2 == 0 else FULL for i in range(n_layers)]


def _every(n: int, field: str = "sliding_window_pattern") -> Callable[[Fields, int], list[str]]:
    """Each nth sees all, counted from 1."""

    def rule(f: Fields, n_layers: int) -> list[str]:
        if not f.maybe("sliding_window"):
            return [FULL] * n_layers
        every = f.get(field)
        if isinstance(every, str) and every.strip("LG") == "" and every.count("G") == 1:
            every = len(every) if every.endswith("G") else every  # "LLLG"
        every = f.size(field, n) if not isinstance(every, int) else f.size(field)
        return [FULL if (i + 1) % every == 0 else SLIDING for i in range(n_layers)]

    return rule


def _late(f: Fields, n_layers: int) -> list[str]:
    """Those from max_window_layers on, if use_sliding_window says so."""
    first = f.size("max_window_layers", n_layers, low=0)
    used = f.flag("use_sliding_window", True) and f.maybe("sliding_window")
    return [SLIDING if used and i >= first else FULL for i in range(n_layers)]


def _turning(f: Fields, n_layers: int) -> list[bool]:
    """Whether each layer has rotary positions."""
    said = f.by_layer("no_rope_layers", n_layers) or []
    every = f.size("no_rope_layer_interval", 4)
    return [bool(x) for x in said] or [bool((i + 1) % every) for i in range(n_layers)]


def _without_rope(f: Fields, n_layers: int) -> list[str]:
    used = f.flag("use_sliding_window") and f.maybe("sliding_window")
    return [SLIDING if used and not turns else FULL for turns in _turning(f, n_layers)]


def _first_of(f: Fields, n_layers: int) -> list[str]:
    """The first of so many sees all."""
    every = f.size("global_attn_every_n_layers", 3)
    return [SLIDING if i % every else FULL for i in range(n_layers)]


def _in_chunks(f: Fields, n_layers: int) -> list[str]:
    return [CHUNKED if turns else FULL for turns in _turning(f, n_layers)]


KINDS: dict[str, Callable[[Fields, int], list[str]]] = {
    **dict.fromkeys(("gemma2", "gpt_oss", "vaultgemma", "t5gemma"), _every(2, "")),
    **dict.fromkeys(("gemma3_text", "gemma4_text"), _every(6)),
    **dict.fromkeys(("cohere2", "exaone4", "olmo3"), _every(4)),
    "gemma3n_text": _every(5, ""),
    "afmoe": _every(4, "global_attn_every_n_layers"),
    **dict.fromkeys(("qwen2", "qwen3", "dots1"), _late),
    **dict.fromkeys(("mistral", "ministral3", "mixtral", "phi3", "phimoe", "qwen3_moe", "ministral",
                     "starcoder2", "phi4_multimodal"), _all_alike),
    **dict.fromkeys(("laguna", "mellum"), _all_full),
    "qwen2_moe": _early,
    "smollm3": _without_rope,
    "modernbert-decoder": _first_of,
    "llama4_text": _in_chunks,
}  # fmt: skip


# --- types of their own


def _read_latent(f: Fields) -> Shapes:
    """Latent attention: a small vector that all heads share, and the channels that turn."""
    n_layers, n_heads = layer_count(f), f.size("num_attention_heads")
    rank, turning = f.size("kv_lora_rank"), f.size("qk_rope_head_dim")
    per_head = f.size("qk_nope_head_dim") + turning + value_width(f)
    windows = _windows(f, layer_kinds(f, n_layers))
    layers = tuple(Layer(1, rank + turning, 0, window) for window in windows)
    context = f.maybe("max_position_embeddings") or None
    return Shapes(layers, n_layers, context=context, expanded=n_heads * per_head)


def value_width(f: Fields) -> int:
    """Of a head's values, where keys are latents."""
    return f.size("v_head_dim", f.size("hidden_size") // f.size("num_attention_heads"))


def _read_twice(f: Fields) -> Shapes:
    """LongCat: two attentions a layer."""
    name = "num_layers" if f.get("num_layers") is not None else "num_hidden_layers"
    found = _read_latent(_renamed(f, num_hidden_layers=f.size(name)))
    layers = found.layers * 2
    return Shapes(layers, len(layers), context=found.context, expanded=found.expanded)


def _renamed(f: Fields, **values: Any) -> Fields:
    return Fields({**f.data, **values}, f.architecture)


def _with_heads(f: Fields, n_kv_heads: int) -> Shapes:
    return _read(_renamed(f, num_key_value_heads=n_kv_heads))


def _read_falcon(f: Fields) -> Shapes:
    """One head where `multi_query` says so; in the new form transformers keeps each head's copy."""
    one = f.flag("multi_query", True) and not f.flag("new_decoder_architecture")
    return _with_heads(f, 1 if one else f.size("num_attention_heads"))


def _read_bigcode(f: Fields) -> Shapes:
    return _with_heads(f, 1 if f.flag("multi_query", True) else f.size("num_attention_heads"))


def _read_dbrx(f: Fields) -> Shapes:
    return _with_heads(f, f.within("attn_config").size("kv_n_heads", 1))


def _read_jetmoe(f: Fields) -> Shapes:
    n_kv_heads, width = f.size("num_key_value_heads"), f.size("head_dim")
    layers = (Layer(n_kv_heads, width, width),) * layer_count(f)
    return Shapes(layers, len(layers), context=f.maybe("max_position_embeddings") or None)


def _read_in_cycles(f: Fields) -> Shapes:
    """HRM: both stacks run again and again, and each run keeps keys of its own. A file that says
    num_layers_per_stack has multiplied num_hidden_layers already."""
    n_layers = layer_count(f)
    if f.get("num_layers_per_stack") is None:
        n_layers *= f.size("H_cycles") * (f.size("L_cycles") + 1)
    return _read(_renamed(f, num_hidden_layers=n_layers))


def _read_glm4_moe(f: Fields) -> Shapes:
    """Its heads need not divide its width."""
    width = f.maybe("head_dim") or f.size("hidden_size") // f.size("num_attention_heads")
    return _read(_renamed(f, head_dim=width))


def _read_gemma4(f: Fields) -> Shapes:
    """Full layers have heads of another width; the last layer is one of them."""
    n_layers = layer_count(f)
    kinds = layer_kinds(f, n_layers)
    kinds[-1] = FULL
    own: dict[str, int] = {"head_dim": f.size("global_head_dim", 512)}
    heads = f.get("num_global_key_value_heads")
    if f.flag("attention_k_eq_v") and heads is not None:
        own["num_key_value_heads"] = heads
    others = f.get("per_layer_config")
    if others is None:
        others = {str(i): own for i, kind in enumerate(kinds) if kind == FULL}
    return _read(_renamed(f, layer_types=kinds, per_layer_config=others))


def _read_modernbert(f: Fields) -> Shapes:
    """Its window, if nothing says it, is half of an encoder's."""
    window = f.maybe("sliding_window") or f.size("local_attention") // 2
    return _read(_renamed(f, sliding_window=window))


def _read_bart(f: Fields) -> Shapes:
    """An encoder and a decoder, each with its own layers; the decoder reads the source's keys."""
    n_layers, n_heads = layer_count(f, "decoder_layers"), f.size("decoder_attention_heads")
    width = divided(f, "hidden_size", "decoder_attention_heads")
    layers = (Layer(n_heads, width, width),) * n_layers
    context = f.maybe("max_position_embeddings") or f.maybe("max_target_positions") or None
    cross = layers if f.flag("is_encoder_decoder", True) else ()
    return Shapes(layers, n_layers, cross, None, context)


def _read_whisper(f: Fields) -> Shapes:
    """Its source is always as long."""
    found = _read_bart(f)
    return replace(found, source_tokens=f.size("max_source_positions") if found.cross else None)


def _read_prophetnet(f: Fields) -> Shapes:
    n_layers, n_heads = f.size("num_decoder_layers"), f.size("num_decoder_attention_heads")
    return _read_bart(_renamed(f, decoder_layers=n_layers, decoder_attention_heads=n_heads))


def _read_t5(f: Fields) -> Shapes:
    decoder = f.get("num_decoder_layers") is not None
    n_layers = layer_count(f, "num_decoder_layers" if decoder else "num_hidden_layers")
    width = f.size("d_kv")
    layers = (Layer(f.size("num_attention_heads"), width, width),) * n_layers
    return Shapes(layers, n_layers, layers)


LATENT = (
    "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu", "axk1",
)  # fmt: skip
BART = (
    "bart", "mbart", "marian", "pegasus", "pegasus_x", "bigbird_pegasus", "blenderbot",
    "blenderbot-small", "plbart", "mvp", "m2m_100", "nllb-moe", "trocr", "led", "fsmt",
)  # fmt: skip
T5 = ("t5", "mt5", "umt5", "longt5", "switch_transformers")

READERS: dict[str, Callable[[Fields], Shapes]] = {
    **dict.fromkeys(LATENT, _read_latent),
    **dict.fromkeys(BART, _read_bart),
    **dict.fromkeys(T5, _read_t5),
    "whisper": _read_whisper,
    "prophetnet": _read_prophetnet,
    "longcat_flash": _read_twice,
    "falcon": _read_falcon,
    "gpt_bigcode": _read_bigcode,
    "dbrx": _read_dbrx,
    "glm4_moe": _read_glm4_moe,
    "hrm_text": _read_in_cycles,
    "jetmoe": _read_jetmoe,
    "gemma4_text": _read_gemma4,
    "modernbert-decoder": _read_modernbert,
}

PAIRS = ("encoder-decoder", "t5gemma", "t5gemma2")  # of which the decoder is a part

STATE = "its layers keep a state, or a state beside keys and values"
NO_CACHE = "it keeps no keys and values from token to token"
INDEXER = "its layers keep an indexer's keys beside their own"
NOT_COMPARED = "what it keeps could not be compared with a cache that transformers made"
UNPLANNED: dict[str, str] = {
    **dict.fromkeys((
        "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "inkling2_text",
        "inkling_text", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "lfm3", "mamba", "mamba2",
        "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text",
        "qwen3_5_text", "qwen3_next", "qwen4_exp", "qwen4_exp_text", "recurrent_gemma", "rwkv",
        "xlstm", "zamba", "zamba2", "zaya",
    ), STATE),
    **dict.fromkeys(("openai-gpt", "reformer", "xlm", "xlnet"), NO_CACHE),
    **dict.fromkeys((
        "axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4",
    ), INDEXER),
    **dict.fromkeys((
        "cpmant", "gemma4_assistant", "gemma4_unified_assistant", "seamless_m4t", "seamless_m4t_v2",
    ), NOT_COMPARED),
    "mimo_v2_flash": "its layers with a window have more heads than its configuration says",
    "deepseek_v4": "its layers keep compressed blocks of several tokens",
    "cohere_compass_text": "transformers 5.23 cannot run it",
    "mllama": "what its cross-attention keeps depends on the images",
    "blt": "it is several models, each with a cache",
}  # fmt: skip
