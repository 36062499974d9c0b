"""What --model names, described from its configuration or header alone: no weight is read."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from kvtool.config import OWN
from kvtool.core.checkpoint.safetensors_header import BUFFERS, SafetensorsHeader, TensorInfo
from kvtool.core.checkpoint.weight_names import (
    CONFIG,
    INDEX,
    WEIGHTS,
    check_shard,
    refuse_lookalike,
    weight_map,
)
from kvtool.core.plan.architectures import Architecture, architectures
from kvtool.core.plan.described import CONFIGURATION, EXPERT, PART, Described, Weights
from kvtool.core.plan.fields import Fields
from kvtool.core.plan.gguf import describe_gguf
from kvtool.core.plan.layers import UNPLANNED, read_shapes
from kvtool.core.plan.own import read_own
from kvtool.core.plan.weights import Counted, count_weights
from kvtool.errors import FileError, UsageError
from kvtool.files import is_gguf, model_folder, shipped_models
from kvtool.reading import MAX_CONFIG_BYTES, quoted, read_json_object

ITEMSIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
USUAL = "bfloat16"  # of models whose files say nothing else
LOOKED_UP = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|wpe)\.weight$")
HEADS = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")

TEXT = "text_config"
# Of transformers, with a language model that only a file says; none is a misspelt other one.
SEVERAL_PARTS = (
    "aria",
    "aya_vision",
    "blip-2",
    "cohere2_vision",
    "deepseek_vl",
    "glm4v",
    "glm4v_moe",
    "granite_speech",
    "idefics2",
    "idefics3",
    "instructblip",
    "internvl",
    "janus",
    "kimi_k25",
    "lfm2_vl",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "mistral3",
    "ovis2",
    "paligemma",
    "pixtral",
    "qwen2_5_omni",
    "qwen2_5_vl",
    "qwen2_audio",
    "qwen2_vl",
    "qwen3_omni_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
    "video_llava",
    "vipllava",
    "voxtral",
)
FLAT = ("fuyu",)  # whose files may have the language model's fields without a part


class Format(NamedTuple):
    """A number format of a file."""

    name: str
    itemsize: int


STORED = {
    "F64": Format("float64", 8), "F32": Format("float32", 4), "BF16": Format("bfloat16", 2),
    "F16": Format("float16", 2), "F8_E4M3": Format("float8", 1), "F8_E5M2": Format("float8", 1),
    "I64": Format("int64", 8), "I32": Format("int32", 4), "I16": Format("int16", 2),
    "I8": Format("int8", 1), "U8": Format("uint8", 1), "BOOL": Format("bool", 1),
}  # fmt: skip


def describe(model: str, dtype: str | None) -> Described:
    """What `model` is: a folder, a config.json, a GGUF file, or a type with its defaults.

    dtype: of weights and keys; None: as they are stored. Raises FileError or UsageError, in one
    line, for what is not there, not understood, or cannot be planned.
    """
    path = Path(model) if model else None
    is_file = path is not None and path.is_file()
    if path is not None and not path.exists() and model not in shipped_models():
        if model in architectures() or model in UNPLANNED:
            return _from(model, {"model_type": model}, model, dtype, None)
        if "/" not in model:
            raise _unknown_type(model)
    if is_file and path is not None and not is_gguf(path):
        return _from_config(path, dtype, None)
    folder = model_folder(model)
    if folder.is_file():
        return describe_gguf(folder, dtype)
    _refuse_diffusion(folder)
    if not os.path.lexists(folder / CONFIG):
        raise FileError(
            f"--model {folder}: holds no {CONFIG}", "Give a folder of a model, or its config.json."
        )
    return _from_config(folder / CONFIG, dtype, folder)


def _unknown_type(model: str) -> UsageError:
    known = sorted({*architectures(), *UNPLANNED, *shipped_models()})
    return UsageError(
        f"--model {model}: not found (it is neither a folder, a file nor a known model type)",
        _near(model, known) or "Give a folder, or a type such as llama.",
    )


def _near(kind: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known: where it is a real type, not another one."""
    if kind in SEVERAL_PARTS:
        return "Give a folder or config.json whose text_config says the type of its language model."
    near = difflib.get_close_matches(kind.lower(), list(known), n=1, cutoff=0.75)
    return f"Did you mean {near[0]}?" if near else ""


def _refuse_diffusion(folder: Path) -> None:
    if os.path.lexists(folder / "model_index.json"):
        raise FileError(
            f"--model {folder}: is a pipeline of diffusers (it holds model_index.json)",
            "Diffusion models keep no keys and values from token to token.",
        )


def _from_config(path: Path, dtype: str | None, folder: Path | None) -> Described:
    refuse_lookalike(path, "a configuration")
    data = read_json_object(path, "a configuration", MAX_CONFIG_BYTES)
    name = str(folder or path)
    if "_class_name" in data and "model_type" not in data:
        raise FileError(
            f"{path}: is the configuration of a diffusion model ({quoted(data['_class_name'])})",
            "Diffusion models keep no keys and values from token to token.",
        )
    try:
        return _from(name, data, str(path), dtype, folder)
    except UsageError as error:
        raise FileError(f"{path}: {error.message}", error.hint) from error


def _from(
    name: str, data: Mapping[str, Any], where: str, dtype: str | None, folder: Path | None
) -> Described:
    kind, whole = data.get("model_type"), ""
    part: Mapping[str, Any] = {}
    if isinstance(kind, str) and kind.startswith(OWN):
        shapes, counted = read_own(data, where)
    else:
        fields, whole = _fields(data, kind)
        part = fields.data
        shapes = read_shapes(fields, whole)
        counted = None if whole and folder else count_weights(fields, shapes)
    stored = _stored(folder)
    said = dtype or (stored and stored.dtype) or _said_dtype(data) or _said_dtype(part)
    found = said or USUAL
    experts = _experts({**data, **part})
    weights, unknown = _weights(data, counted, stored, dtype, found, experts)
    if weights is not None and whole and stored is None:
        weights = replace(weights, said_by=PART)
    share = Fraction(counted.read, counted.total) if counted else experts
    return Described(name, str(kind), found, shapes, weights, unknown, not said, share)


def _said_dtype(data: Mapping[str, Any]) -> str:
    """The number format that a configuration names; "" if it names none."""
    for field in ("dtype", "torch_dtype"):
        value = data.get(field)
        if value is None or value == "auto":
            continue
        name = value.removeprefix("torch.") if isinstance(value, str) else None
        if name not in ITEMSIZES:
            raise UsageError(
                f"{field}: {quoted(value)} is not a format of keys and values "
                f"(expected {', '.join(ITEMSIZES)})",
                "Say it: --dtype bfloat16.",
            )
        return name
    return ""


def _fields(data: Mapping[str, Any], kind: Any) -> tuple[Fields, str]:
    """The fields of the language model, and the type of which it is a part, or ""."""
    if not isinstance(kind, str):
        found = "is missing" if kind is None else f"{quoted(kind)} is not a name"
        raise UsageError(f"model_type {found}", "config.json of Hugging Face says it.")
    if reason := UNPLANNED.get(kind):
        raise UsageError(f"model_type {quoted(kind)} cannot be planned: {reason}")
    known = architectures().get(kind) or _with_text_config(kind, data)
    if known is None:
        raise UsageError(
            f"model_type {quoted(kind)} is not known, so nothing is planned",
            _near(kind, architectures()),
        )
    if not known.part:
        return Fields(_without_type(data), known), ""
    part = data.get(known.part)
    if part is None:
        part = _flat(data, known)
    if not isinstance(part, Mapping):
        raise UsageError(f"{known.part}: {quoted(part)} is not an object")
    of = part.get("model_type") if part is not data else None
    inner: Architecture | None = architectures().get(of if isinstance(of, str) else known.of)
    if inner is None or inner.part:
        raise UsageError(f"{known.part}: model_type {quoted(of)} is not known")
    if part is data or not part:
        inner = replace(inner, defaults={**inner.defaults, **known.defaults})
    return Fields(_without_type(part), inner), kind


def _with_text_config(kind: str, data: Mapping[str, Any]) -> Architecture | None:
    """Of a type that is not known: its language model, if its configuration says a known one."""
    part = data.get(TEXT)
    of = part.get("model_type") if isinstance(part, Mapping) else None
    if not isinstance(of, str) or "bert" in of:  # an encoder
        return None
    if reason := UNPLANNED.get(of):
        raise UsageError(f"{TEXT}: model_type {quoted(of)} cannot be planned: {reason}")
    inner = architectures().get(of)
    return Architecture(kind, TEXT, of) if inner is not None and not inner.part else None


def _flat(data: Mapping[str, Any], known: Architecture) -> Mapping[str, Any]:
    """Of a configuration without the part: none, as transformers takes the part's defaults then."""
    if known.name in FLAT:
        return data
    if size := next((name for name in ("num_hidden_layers", "hidden_size") if name in data), ""):
        raise UsageError(f"{known.part} is missing (found {size} beside it)")
    return {}


def _without_type(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "model_type"}


# --- weights


class Stored(NamedTuple):
    """What headers say of the tensors."""

    tensors: Mapping[str, TensorInfo[Format]]
    dtype: str  # of most of them; "": none is of a format of keys


def _stored(folder: Path | None) -> Stored | None:
    """The tensors of a folder's safetensors; None if it has none."""
    if folder is None:
        return None
    tensors: dict[str, TensorInfo[Format]] = {}
    if os.path.lexists(folder / WEIGHTS):
        refuse_lookalike(folder / WEIGHTS, "weights")
        tensors = SafetensorsHeader(folder / WEIGHTS, STORED, STORED).tensors
    elif os.path.lexists(folder / INDEX):
        refuse_lookalike(folder / INDEX, "an index of weights")
        places = weight_map(folder / INDEX)
        for shard in sorted(set(places.values())):
            refuse_lookalike(folder / shard, "weights")
            found = SafetensorsHeader(folder / shard, STORED, STORED).tensors
            listed = {tensor for tensor, place in places.items() if place == shard}
            check_shard(folder / INDEX, shard, places, listed, set(found))
            tensors |= found
    tensors = {name: info for name, info in tensors.items() if not BUFFERS.search(name)}
    if not tensors:
        return None
    most: Counter[str] = Counter()
    for info in tensors.values():
        if info.dtype.name in ITEMSIZES:
            most[info.dtype.name] += math.prod(info.shape)
    return Stored(tensors, most.most_common(1)[0][0] if most else "")


def _weights(
    data: Mapping[str, Any],
    counted: Counted | None,
    stored: Stored | None,
    dtype: str | None,
    found: str,
    experts: Fraction,
) -> tuple[Weights | None, str]:
    """Bytes of the weights, or why they are not known."""
    if stored is not None:
        return _by_headers(stored, counted, dtype, experts), ""
    if data.get("quantization_config"):
        return None, "they are quantised, and only a file says how"
    if counted is None:
        kind = data.get("model_type")
        return None, f"how many {kind} has is not known from its configuration"
    size = ITEMSIZES[found]
    return Weights(size * counted.total, size * counted.read, CONFIGURATION), ""


def _by_headers(
    stored: Stored, counted: Counted | None, dtype: str | None, share: Fraction
) -> Weights:
    def nbytes(info: TensorInfo[Format]) -> int:
        floats = dtype is not None and info.dtype.name in ITEMSIZES
        size = ITEMSIZES[dtype] if floats and dtype is not None else info.dtype.itemsize
        return math.prod(info.shape) * size

    total = sum(map(nbytes, stored.tensors.values()))
    numbers = sum(math.prod(info.shape) for info in stored.tensors.values())
    if counted is not None and counted.total == numbers:
        return Weights(total, total * counted.read // numbers, "headers")
    has_head = any(HEADS.search(name) for name in stored.tensors)
    read = 0
    for name, info in stored.tensors.items():
        if has_head and LOOKED_UP.search(name):
            continue
        read += int(nbytes(info) * share) if EXPERT.search(name) else nbytes(info)
    return Weights(total, read, "headers")


def _experts(data: Mapping[str, Any]) -> Fraction:
    """Which part of all experts a token takes."""
    used = data.get("num_experts_per_tok")
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    n = next((data[name] for name in names if isinstance(data.get(name), int)), 0)
    return Fraction(used, n) if isinstance(used, int) and 0 < used <= n else Fraction(1)
