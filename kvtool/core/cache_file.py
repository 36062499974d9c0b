"""A prompt's keys and values in a file, so that a long prompt is computed once.

A safetensors file: `k.N` and `v.N` (Hkv,S,D) of each layer N, and in its metadata the tokens that
they are of and the SHA-256 of the model's weights. Only kinds that store what the model computed
are saved, and any of them can be filled from the file.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from kvtool.core.cache import Cache, CacheSpec
from kvtool.core.machine import dtype_name
from kvtool.core.safetensors_file import SafetensorsFile
from kvtool.errors import CacheOpUnsupported, FileError
from kvtool.files import write_durable
from kvtool.reading import short

FORMAT = "kvtool.cache/1"


@dataclass(frozen=True)
class SavedCache:
    """Keys and values of `ids`."""

    ids: list[int]
    layers: list[tuple[Tensor, Tensor]]  # k, v (Hkv,S,D)

    def fill(self, cache: Cache, n: int) -> None:
        """Put the first `n` tokens into an empty cache of one row. Raises CacheOpUnsupported."""
        require_whole(cache, "be filled from a file")
        if not n:
            return
        step = cache.begin(n)
        for layer, kv in enumerate(self.layers):
            k, v = (t[None, :, :n].to(cache.spec.device) for t in kv)
            cache.write(layer, k, v, step)
        cache.commit(n)


def save_cache(path: Path, cache: Cache, ids: list[int], sha256: str) -> None:
    """Write what a cache of one row holds of `ids`. Raises CacheOpUnsupported and FileError."""
    require_whole(cache, "be saved")
    tensors = {}
    for layer in range(cache.spec.n_layers):
        k, v, _ = cache.snapshot(layer)
        for name, tensor in (("k", k), ("v", v)):
            tensors[f"{name}.{layer}"] = tensor[0].cpu().contiguous()
    metadata = {"format": FORMAT, "sha256": sha256, "ids": json.dumps(ids[: cache.length])}
    write_durable(path, safetensors.torch.save(tensors, metadata))


def load_cache(path: Path, spec: CacheSpec, sha256: str) -> SavedCache:
    """Read a file for a model with those weights. Raises FileError for one of another model or
    number format than those of `spec`, or that is damaged."""
    file = SafetensorsFile(path)
    if file.metadata.get("format") != FORMAT:
        raise FileError(f"{path}: is not a saved cache (expected one of generate --save-cache)")
    if file.metadata.get("sha256") != sha256:
        found = file.metadata.get("sha256", "none")
        raise FileError(
            f"{path}: is of another model (SHA-256 {found[:12]}..., expected {sha256[:12]}...)",
            "Save it again with this --model.",
        )
    ids = _read_ids(file)
    _check_tensors(file, spec, len(ids))
    tensors, _ = file.read()
    bad = next((name for name in tensors if not bool(torch.isfinite(tensors[name]).all())), None)
    if bad is not None:
        raise FileError(f"{path}: tensor {bad} holds NaN or infinite values")
    return SavedCache(ids, [(tensors[f"k.{i}"], tensors[f"v.{i}"]) for i in range(spec.n_layers)])


def _read_ids(file: SafetensorsFile) -> list[int]:
    try:
        ids = json.loads(file.metadata.get("ids", ""))
    except ValueError:
        ids = None
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise FileError(f"{file.path}: is damaged (its tokens are no list of whole numbers)")
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
    """How many tokens two texts share from the start on."""
    pairs = zip(a, b, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def require_whole(cache: Cache, op: str) -> None:
    """Raise CacheOpUnsupported for a kind that does not store all that the model computed."""
    if cache.loses or cache.recompute:
        why = "it does not store all that the model computed"
        raise CacheOpUnsupported(cache.kind, op, why, "Use --cache dynamic, static or paged.")
