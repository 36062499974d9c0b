"""Reference logits: made by the NumPy oracle, kept in a file, compared position by position.

A file holds, for prompts 0, 1 and so on, `ids.N` (T,) and `logits.N` (T,V). In a .safetensors file
the metadata has `text.N` too. `ids` and `logits` alone are prompt 0.
"""

from __future__ import annotations

import copy
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.core import oracle
from kvtool.core.models import Model
from kvtool.core.verify.compare import distances, spacing
from kvtool.core.verify.judge import NOISE, ROUNDING_64
from kvtool.core.weight_files import refuse_lookalike
from kvtool.errors import CapacityError, FileError, UsageError, pass_on_shortage
from kvtool.files import write_durable

FORMATS = ("float64", "float32", "float16")  # of reference logits
ARRAY = re.compile(r"(?:ids|logits)\.(0|[1-9][0-9]*)")


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
        from kvtool.core import witness  # it is slow to import, and may not be installed

        own = None if folder is None else witness.folder_witness(folder)
        theirs = own or witness.witness(_unrounded(weights), config)
        compute = partial(witness.witness_logits, theirs)
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
    if config.kind != "decoder":
        raise UsageError(
            f"--model: is of the family {config.kind}, for which there is no independent code",
            "Reference logits are of the family decoder; use verify-cache.",
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


def load(path: Path) -> list[Reference]:
    """Read a .safetensors or .npz file of references. Raises FileError."""
    refuse_lookalike(path, "reference logits")
    if path.suffix == ".npz":
        arrays, texts = _load_npz(path)
    elif path.suffix == ".safetensors":
        arrays, texts = _load_safetensors(path)
    else:
        found = path.suffix or "no suffix"
        raise FileError(f"--reference {path}: {found} (expected .safetensors or .npz)")
    arrays = {f"{name}.0" if name in ("ids", "logits") else name: a for name, a in arrays.items()}
    numbers = sorted({int(match[1]) for name in arrays if (match := ARRAY.fullmatch(name))})
    if not numbers:
        raise FileError(f"{path}: holds no references (expected ids.0 and logits.0)")
    references = [_reference(path, arrays, texts, n) for n in numbers]
    formats = {reference.logits.dtype.name for reference in references}
    if len(formats) > 1:  # the coarsest would decide how exact the others have to be
        raise FileError(f"{path}: holds logits of {' and '.join(sorted(formats))} (expected one)")
    return references


def _load_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    if not zipfile.is_zipfile(path):
        raise FileError(f"{path}: is not an .npz file")
    try:
        with np.load(path, allow_pickle=False) as file:  # a pickle could run code
            return {name: file[name] for name in file.files}, {}
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds between them
        pass_on_shortage(error)
        raise FileError(f"{path}: is not an .npz file of plain arrays ({error})") from error


def _load_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (safetensors.SafetensorError, OSError, TypeError, AttributeError) as error:
        # The last two are about formats that NumPy does not have, such as bfloat16.
        raise FileError(f"{path}: is not a safetensors file ({error})") from error


def _reference(
    path: Path, arrays: Mapping[str, np.ndarray], texts: Mapping[str, str], n: int
) -> Reference:
    ids, logits = arrays.get(f"ids.{n}"), arrays.get(f"logits.{n}")
    if ids is None or logits is None:
        missing, there = ("ids", "logits") if ids is None else ("logits", "ids")
        raise FileError(f"{path}: {missing}.{n} is missing, and {there}.{n} is there")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or not len(ids):
        raise FileError(
            f"{path}: ids.{n} is {ids.dtype} {list(ids.shape)} (expected whole numbers [T])"
        )
    if logits.ndim != 2 or logits.shape[0] != len(ids) or logits.dtype.name not in FORMATS:
        raise FileError(
            f"{path}: logits.{n} is {logits.dtype} {list(logits.shape)} "
            f"(expected {', '.join(FORMATS)} [{len(ids)}, V])"
        )
    if not np.isfinite(logits).all():
        raise FileError(f"{path}: logits.{n} holds NaN or infinities")
    return Reference([int(i) for i in ids], logits, texts.get(f"text.{n}"))


def check_fits(references: Sequence[Reference], config: Any) -> None:
    """Raise FileError where a reference is of another vocabulary, CapacityError where it is longer
    than the context."""
    for n, reference in enumerate(references):
        vocab = reference.logits.shape[1]
        if vocab != config.vocab_size:
            raise FileError(
                f"--reference: logits.{n} are over {vocab} tokens "
                f"(the model has {config.vocab_size})",
                "Take the reference that was made for this model.",
            )
        if min(reference.ids) < 0 or max(reference.ids) >= vocab:
            raise FileError(f"--reference: ids.{n} are not all within 0 to {vocab - 1}")
        check_length(f"--reference: ids.{n}", len(reference.ids), config.context)


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
def allowance(precise: Model, references: Sequence[Reference]) -> float:
    """How far a float64 run may be from right references, over the largest logit.

    Only rounding may lie between it and float64 references. Those of a lower format may have been
    computed in it: then NOISE times as far as the model's own run in that format, or one unit.
    """
    name = references[0].logits.dtype.name
    if name == "float64":
        return ROUNDING_64
    dtype = getattr(torch, name)
    lower = copy.deepcopy(precise).to(dtype)
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
