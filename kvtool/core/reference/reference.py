"""Reference logits: made by the NumPy oracle, kept in a file, compared position by position.

A file holds, for prompts 0, 1 and so on, `ids.N` (T,) and `logits.N` (T,V). In a .safetensors file
the metadata has `text.N` too. `ids` and `logits` alone are prompt 0.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.core.checkpoint.weight_files import refuse_lookalike
from kvtool.core.machine import require_memory
from kvtool.core.models import Model
from kvtool.core.reference import oracle
from kvtool.core.reference.reference_file import ArrayFile, ArrayInfo, open_arrays
from kvtool.core.verify.compare import ROUNDING_64, distances, spacing
from kvtool.core.verify.judge import NOISE
from kvtool.errors import CapacityError, FileError, UsageError
from kvtool.files import write_durable
from kvtool.reading import short

FORMATS = ("float64", "float32", "float16")  # of reference logits
ARRAY = re.compile(r"(?:ids|logits)\.(0|[1-9][0-9]{0,5})")


@dataclass(frozen=True)
class Reference:
    """The right logits (T,V) after each of the tokens `ids` (T,); `text` may not be recorded."""

    ids: list[int]
    logits: np.ndarray
    text: str | None = None


@dataclass(frozen=True)
class Position:
    """How the logits after one token differ from the reference."""

    prompt: int
    position: int
    token: int
    max_difference: float
    ulps: float  # of the working format, at the position's largest logit
    gap_float64: float  # of the float64 run: max |a - b| / max |b|
    same_top1: bool
    kl: float  # nats, from the reference to the working run


class InFloat64(Mapping[str, np.ndarray]):
    """Weights as arrays in float64, each made when it is read: all at once would take twice the
    memory of a model."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights

    def __getitem__(self, name: str) -> np.ndarray:
        return self.weights[name].double().cpu().numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def _unrounded(weights: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Weights as arrays that hold the same numbers, without a copy of those in float32."""
    arrays = {
        name: (tensor.float() if tensor.dtype.itemsize < 4 else tensor).cpu().numpy()
        for name, tensor in weights.items()
    }
    embedding = "embed.tokens.weight"  # may be scaled
    return arrays | {embedding: arrays[embedding].astype(np.float64)}


def make_reference(
    weights: Mapping[str, Tensor],
    config: Any,
    prompts: Sequence[tuple[str | None, list[int]]],
    against: str = "numpy",
    folder: Path | None = None,
) -> list[Reference]:
    """What the NumPy oracle says, or with `against` "transformers" a model of theirs, in float64.

    folder: where the weights are from; if it is one of Hugging Face, their model is made of what is
    in it. Raises UsageError for an encoder-decoder, an empty prompt or a model that transformers
    has not, CapacityError for a prompt too long.
    """
    check_decoder(config)
    compute: Callable[[list[int]], np.ndarray]
    compute = partial(oracle.logits, InFloat64(weights), config)
    if against == "transformers":
        from kvtool.core.reference import witness  # it is slow to import, and may not be installed

        own = None if folder is None else witness.folder_witness(folder)
        theirs = own or witness.witness(_unrounded(weights), config)
        compute = partial(witness.witness_logits, theirs, folder=folder if own else None)
    found = []
    for text, ids in prompts:
        if not ids:
            raise UsageError("--prompt: is empty (expected 1 token or more)")
        check_length("--prompt", len(ids), config.context)
        found.append(Reference(ids, compute(ids), text))
    return found


def check_decoder(config: Any) -> None:
    """Raise UsageError for an encoder-decoder, whose logits depend on a source too, and for a
    family of models whose formulas are not those of the reference."""
    if config.n_encoder_layers:
        raise UsageError(
            "--model: is an encoder-decoder (expected a decoder-only model)",
            "Reference logits are of decoder-only models; use verify-cache.",
        )
    if config.kind not in oracle.FAMILIES:
        raise UsageError(
            f"--model: is of the family {config.kind}, for which there is no independent code",
            f"Reference logits are of the families {' and '.join(oracle.FAMILIES)}; use "
            "verify-cache.",
        )


def check_length(where: str, n_tokens: int, context: int) -> None:
    """Raise CapacityError for more tokens than the model holds."""
    if n_tokens > context:
        raise CapacityError(f"{where}: is {n_tokens} tokens long (the model holds {context})")


def save(path: Path, references: Sequence[Reference]) -> None:
    """Write a .safetensors file, durably. Raises UsageError for another suffix, FileError."""
    if path.suffix != ".safetensors":
        raise UsageError(f"--save-reference {path}: has not the suffix .safetensors")
    arrays: dict[str, np.ndarray] = {}
    texts = {}
    for i, reference in enumerate(references):
        arrays[f"ids.{i}"] = np.asarray(reference.ids, dtype=np.int64)
        arrays[f"logits.{i}"] = np.ascontiguousarray(reference.logits)
        if reference.text is not None:
            texts[f"text.{i}"] = reference.text
    write_durable(path, safetensors.numpy.save(arrays, metadata=texts))


def load(path: Path, config: Any = None) -> list[Reference]:
    """Read a .safetensors or .npz file of references, if it fits a model of `config`.

    All that its headers say is checked before any array is read. Raises FileError, and
    CapacityError as `check_fits` does or for too little memory.
    """
    refuse_lookalike(path, "reference logits")
    file = open_arrays(path)
    names = _array_names(file)
    numbers = sorted({int(match[1]) for name in names if (match := ARRAY.fullmatch(name))})
    if not numbers:
        raise FileError(f"{path}: holds no references (expected ids.0 and logits.0)")
    for n in numbers:
        shape = _checked_shape(path, names, n)
        if config is not None:
            _check_shape(n, shape, config)
    formats = {names[f"logits.{n}"][1].dtype for n in numbers}
    if len(formats) > 1:  # the coarsest would decide how exact the others have to be
        raise FileError(f"{path}: holds logits of {' and '.join(sorted(formats))} (expected one)")
    nbytes = sum(info.nbytes for _, info in names.values())
    require_memory(str(path), nbytes, torch.device("cpu"))
    arrays = file.read()
    found = {name: arrays[there] for name, (there, _) in names.items()}
    return [
        _reference(path, n, found[f"ids.{n}"], found[f"logits.{n}"], file.texts) for n in numbers
    ]


def _array_names(file: ArrayFile) -> dict[str, tuple[str, ArrayInfo]]:
    """The arrays by `ids.N` and `logits.N`, with their names in the file. Raises FileError for any
    other, and for two of one name."""
    found: dict[str, tuple[str, ArrayInfo]] = {}
    for there, info in file.arrays.items():
        name = f"{there}.0" if there in ("ids", "logits") else there
        if not ARRAY.fullmatch(name):
            expected = "expected ids.0, logits.0, ids.1 and so on"
            raise FileError(f"{file.path}: holds {short(there)!r} ({expected})")
        if name in found:
            both = " and ".join(sorted((there, found[name][0])))
            raise FileError(f"{file.path}: holds {both}, which are one (expected one of them)")
        found[name] = there, info
    return found


def _checked_shape(
    path: Path, names: Mapping[str, tuple[str, ArrayInfo]], n: int
) -> tuple[int, int]:
    """How many tokens reference `n` has, and over how many its logits are. Raises FileError."""
    absent = [name for name in (f"ids.{n}", f"logits.{n}") if name not in names]
    if absent:
        there = f"logits.{n}" if absent[0].startswith("ids") else f"ids.{n}"
        raise FileError(f"{path}: {absent[0]} is missing, and {there} is there")
    ids, logits = names[f"ids.{n}"][1], names[f"logits.{n}"][1]
    if len(ids.shape) != 1 or "int" not in ids.dtype or not ids.shape[0]:
        raise FileError(f"{path}: ids.{n} is {ids} (expected whole numbers [T])")
    length = ids.shape[0]
    if len(logits.shape) != 2 or logits.shape[0] != length or logits.dtype not in FORMATS:
        expected = f"expected {', '.join(FORMATS)} [{length}, V]"
        raise FileError(f"{path}: logits.{n} is {logits} ({expected})")
    return length, logits.shape[1]


def _reference(
    path: Path, n: int, ids: np.ndarray, logits: np.ndarray, texts: Mapping[str, str]
) -> Reference:
    if not np.isfinite(logits).all():
        raise FileError(f"{path}: logits.{n} holds NaN or infinities")
    return Reference([int(i) for i in ids], logits, texts.get(f"text.{n}"))


def check_fits(references: Sequence[Reference], config: Any) -> None:
    """Raise FileError where a reference is of another vocabulary, CapacityError where it is longer
    than the context."""
    for n, reference in enumerate(references):
        _check_shape(n, reference.logits.shape, config)
        last = config.vocab_size - 1
        if min(reference.ids) < 0 or max(reference.ids) > last:
            raise FileError(f"--reference: ids.{n} are not all within 0 to {last}")


def _check_shape(n: int, shape: tuple[int, ...], config: Any) -> None:
    """Raise unless a reference of that many tokens and logits is one of a model's."""
    length, vocab = shape
    if vocab != config.vocab_size:
        raise FileError(
            f"--reference: logits.{n} are over {vocab} tokens (the model has {config.vocab_size})",
            "Take the reference that was made for this model.",
        )
    check_length(f"--reference: ids.{n}", length, config.context)


@torch.inference_mode()
def compare(model: Model, precise: Model, references: Sequence[Reference]) -> list[Position]:
    """Every position of every reference; `precise` is the same model in float64."""
    device = next(model.parameters()).device
    found = []
    for n, reference in enumerate(references):
        ids = torch.tensor([reference.ids], device=device)
        right = torch.from_numpy(reference.logits.astype(np.float64))
        working, exact = model(ids)[0].cpu(), precise(ids)[0].cpu()
        for position, token in enumerate(reference.ids):
            found.append(
                _position(n, position, token, working[position], exact[position], right[position])
            )
    return found


@torch.inference_mode()
def allowance(
    precise: Model, references: Sequence[Reference], stored: Model | None = None
) -> float:
    """How far a float64 run may be from right references, over the largest logit.

    Only rounding may lie between it and float64 references. Those of a lower format may have been
    computed in it: then NOISE times as far as the model's own run in that format, or one unit.
    stored: the model of which `precise` widens the weights, if it does.
    """
    name = references[0].logits.dtype.name
    if name == "float64":
        return ROUNDING_64
    dtype = getattr(torch, name)
    lower = copy.deepcopy(stored or precise).to(dtype)
    device = next(precise.parameters()).device
    noise = torch.finfo(dtype).eps
    for reference in references:
        ids = torch.tensor([reference.ids], device=device)
        noise = max(noise, *distances([lower(ids)], [precise(ids)]))
    return NOISE * noise


def _position(
    n: int, position: int, token: int, working: Tensor, exact: Tensor, right: Tensor
) -> Position:
    """One position: working and float64 logits (V,) against the right ones (V,)."""
    scale = float(right.abs().max()) or 1.0
    difference = _largest(working.double() - right)
    kl = F.kl_div(working.double().log_softmax(-1), right.softmax(-1), reduction="sum")
    return Position(
        prompt=n,
        position=position,
        token=token,
        max_difference=difference,
        ulps=difference / spacing(scale, working.dtype),
        gap_float64=_largest(exact - right) / scale,
        same_top1=bool(working.argmax() == right.argmax()),
        kl=max(float(kl), 0.0),  # rounding may leave -1e-17
    )


def _largest(difference: Tensor) -> float:
    """max |difference|, where NaN counts as infinite."""
    return float(difference.abs().nan_to_num(nan=math.inf, posinf=math.inf).max())
