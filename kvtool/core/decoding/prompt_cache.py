"""A prompt's keys and values in a file, so that a long prompt is prefilled only once.

The format is safetensors: `k.N` and `v.N` (Hkv,S,D) for each layer N. The metadata has the prompt's
ids and the Origin, on which the keys and values depend. Only caches that store everything the model
computed can be saved, and only these can be filled from a file.

Keys and values cannot be checked without computing them again. So a file from an untrusted source
can make the model say anything, as untrusted weights can.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from kvtool.core.cache import Cache, CacheSpec
from kvtool.core.checkpoint.safetensors_file import SafetensorsFile
from kvtool.core.facts import changes, flat
from kvtool.core.machine import dtype_name, require_memory
from kvtool.errors import CacheOpUnsupported, FileError
from kvtool.files import write_durable
from kvtool.reading import parse_json, short

if TYPE_CHECKING:
    from kvtool.core.checkpoint.checkpoint import Checkpoint

FORMAT = "kvtool.cache/2"
OLDER = ("kvtool.cache/1",)  # did not record the configuration
AGAIN = "Save it again with --save-cache and this --model."


@dataclass(frozen=True)
class Origin:
    """What keys and values depend on besides the ids and the dtype."""

    sha256: str  # of the weights
    config: dict[str, Any]  # ModelConfig.to_dict()
    tokenizer: str  # its fingerprint

    @classmethod
    def of(cls, loaded: Checkpoint) -> Origin:
        """The origin of the keys and values that a checkpoint computes."""
        return cls(loaded.sha256, loaded.config.to_dict(), loaded.tokenizer.fingerprint)


@dataclass(frozen=True)
class SavedCache:
    """The keys and values of a prompt's `ids`."""

    ids: list[int]
    layers: list[tuple[Tensor, Tensor]]  # k, v (Hkv,S,D)

    def fill(self, cache: Cache, n: int) -> None:
        """Write the first `n` tokens into an empty cache of one row.

        Raises CacheOpUnsupported for a kind that does not store everything the model computed.
        """
        require_whole(cache, "be filled from a file")
        if not n:
            return
        step = cache.begin(n)
        for layer, kv in enumerate(self.layers):
            k, v = (t[None, :, :n].to(cache.spec.device) for t in kv)
            cache.write(layer, k, v, step)
        cache.commit(n)


def save_cache(path: Path, cache: Cache, ids: list[int], origin: Origin) -> None:
    """Write the keys and values of a cache of one row to a file, with those of `ids` that it holds.

    Raises CacheOpUnsupported for a kind that does not store everything, and FileError if the file
    cannot be written.
    """
    require_whole(cache, "be saved")
    tensors = {}
    for layer in range(cache.spec.n_layers):
        k, v, _ = cache.snapshot(layer)
        for name, tensor in (("k", k), ("v", v)):
            tensors[f"{name}.{layer}"] = tensor[0].cpu().contiguous()
    metadata = {
        "format": FORMAT,
        "sha256": origin.sha256,
        "config": json.dumps(origin.config, sort_keys=True),
        "tokenizer": origin.tokenizer,
        "ids": json.dumps(ids[: cache.length]),
    }
    write_durable(path, safetensors.torch.save(tensors, metadata))


def load_cache(path: Path, spec: CacheSpec, origin: Origin) -> SavedCache:
    """Read a file of `save_cache` for a model of that origin and a cache of that spec.

    Raises FileError if the file is damaged, or has another origin, dtype or shape; the message
    names what differs. Raises CapacityError if it does not fit into memory.
    """
    file = SafetensorsFile(path)
    _check_origin(file, origin)
    ids = _read_ids(file, origin.config)
    _check_tensors(file, spec, len(ids))
    require_memory(str(path), len(ids) * spec.token_nbytes, torch.device("cpu"))
    tensors, _ = file.read()
    bad = next((name for name in tensors if not bool(torch.isfinite(tensors[name]).all())), None)
    if bad is not None:
        raise FileError(f"{path}: tensor {bad} holds NaN or infinite values")
    return SavedCache(ids, [(tensors[f"k.{i}"], tensors[f"v.{i}"]) for i in range(spec.n_layers)])


def _check_origin(file: SafetensorsFile, origin: Origin) -> None:
    """Raise FileError unless weights, configuration and tokenizer are the same."""
    found = file.metadata
    if found.get("format") in OLDER:
        raise FileError(
            f"{file.path}: is of an older kvtool, and does not say of what configuration", AGAIN
        )
    if found.get("format") != FORMAT:
        raise FileError(
            f"{file.path}: is not a saved cache (expected one of generate --save-cache)"
        )
    for name, what, expected in (
        ("sha256", "weights", origin.sha256),
        ("tokenizer", "rules of the tokenizer", origin.tokenizer),
    ):
        there = found.get(name, "none")
        if there != expected:
            hashes = f"SHA-256 {there[:12]}..., expected {expected[:12]}..."
            raise FileError(f"{file.path}: was computed with other {what} ({hashes})", AGAIN)
    config = _parsed(file, "config", dict, "configuration is no object")
    if differences := changes(flat(config), flat(parse_json(json.dumps(origin.config)))):
        raise FileError(
            f"{file.path}: was computed with another configuration: {short(differences[0])}"
            + (f", and {len(differences) - 1} more" if differences[1:] else ""),
            AGAIN,
        )


def _parsed(file: SafetensorsFile, name: str, kind: type, damage: str) -> Any:
    try:
        value = parse_json(file.metadata.get(name, ""))
    except ValueError:
        value = None
    if not isinstance(value, kind):
        raise FileError(f"{file.path}: is damaged (its {damage})")
    return value


def _read_ids(file: SafetensorsFile, config: Mapping[str, Any]) -> list[int]:
    damage = "tokens are no list of whole numbers"
    ids: list[int] = _parsed(file, "ids", list, damage)
    if not ids or not all(type(i) is int for i in ids):
        raise FileError(f"{file.path}: is damaged (its {damage})")
    if len(ids) > config["context"]:
        raise FileError(
            f"{file.path}: holds {len(ids):,} tokens (the model holds {config['context']:,})"
        )
    if min(ids) < 0 or max(ids) >= config["vocab_size"]:
        most = config["vocab_size"] - 1
        raise FileError(f"{file.path}: is damaged (its tokens are not all within 0 to {most})")
    return ids


def _check_tensors(file: SafetensorsFile, spec: CacheSpec, n: int) -> None:
    """Raise FileError unless the header lists keys and values of `n` tokens, and nothing else."""
    names = {f"{name}.{layer}" for layer in range(spec.n_layers) for name in "kv"}
    shape = (spec.n_kv_heads, n, spec.head_dim)
    for name in sorted(names | file.tensors.keys()):
        info = file.tensors.get(name)
        if info is None or name not in names:
            what = "is missing" if info is None else "is unknown"
            raise FileError(f"{file.path}: tensor {short(name)} {what}")
        if info.shape != shape:
            raise FileError(
                f"{file.path}: tensor {name} has the shape {list(info.shape)} "
                f"(expected {list(shape)})"
            )
        if info.dtype is not spec.dtype:
            found, expected = dtype_name(info.dtype), dtype_name(spec.dtype)
            raise FileError(
                f"{file.path}: holds {found} (expected {expected})", f"Give --dtype {found}."
            )


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two prompts share at their beginning."""
    pairs = zip(a, b, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def require_whole(cache: Cache, op: str) -> None:
    """Raise CacheOpUnsupported for a kind that does not store everything the model computed.

    op: what was asked of the cache, as the message says it.
    """
    if cache.loses or cache.recompute:
        why = "it does not store all that the model computed"
        raise CacheOpUnsupported(cache.kind, op, why, "Use --cache dynamic, static or paged.")
