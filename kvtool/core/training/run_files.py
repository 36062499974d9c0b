"""Checks of the log and the states of a run, since they may come from an untrusted source."""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtool import ending
from kvtool.core.checkpoint.pickle_walk import UnsafePickle
from kvtool.core.checkpoint.pickled_file import check_zip
from kvtool.errors import pass_on_shortage
from kvtool.reading import parse_json

MAX_STEPS = 2**53  # up to here a float64 can count
FIGURE_LIMIT = 2.0**128  # above every float32; all figures are float32
MAX_TOKENS = 2**31  # per step
MAX_SECONDS = 2**31  # per run: 68 years
EXACT = 2**24  # up to here a float32 can count, as AdamW does its steps
SHA256 = re.compile("[0-9a-f]{64}")
PARTS = ("valid", "averaged")  # the parts of an evaluation


def log_line(text: str) -> dict[str, Any] | None:
    """The fields of a line of log.jsonl: a step, and figures, directly or in PARTS.

    None for any other line, such as one that a crash cut short.
    """
    with contextlib.suppress(ValueError):
        fields = parse_json(text)
        if isinstance(fields, dict) and _is_count(fields.get("step")):
            parts = [fields.get(part, {}) for part in PARTS]
            alone = {name: value for name, value in fields.items() if name not in PARTS}
            if all(isinstance(part, dict) and _is_figures(part) for part in (alone, *parts)):
                return fields
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_STEPS


def _is_index(value: Any, items: Sequence[Any]) -> bool:
    return type(value) is int and 0 <= value < len(items)


def _is_figures(part: Mapping[str, Any]) -> bool:
    return all(type(x) in (int, float) and abs(x) < FIGURE_LIMIT for x in part.values())


class Strange(ValueError):
    """A state has contents that its run would not have written."""


def unpickled(data: bytes) -> Any:
    """Load data of torch.save that has only tensors, numbers, texts and containers.

    Raises Strange for any other data.
    """
    try:
        # torch.save never compresses, and compressed data could unpack to any size.
        check_zip(io.BytesIO(data), len(data), Path("state"), compressed=False)
        with warnings.catch_warnings(), ending.signals_at_default():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged data raises almost anything
        pass_on_shortage(error)
        # PyTorch's message is left out: it suggests weights_only=False, which runs the file's code.
        if isinstance(error, (UnsafePickle, pickle.UnpicklingError)):
            raise Strange("holds code objects, which kvtool never runs") from error
        raise Strange(f"is no state of a run ({type(error).__name__})") from error


def checked(
    state: Any, step: int, weights: Mapping[str, Tensor], parameters: Sequence[Tensor], average: int
) -> dict[str, Any]:
    """Check that a state has the types, names, shapes and values that a run writes at `step`.

    weights: of the model. parameters: of the optimizer, in its order. average: how many recent
    weights the run averages; states from before --average have none. -> the state, with "recent".
    Raises Strange if anything differs.
    """
    if not isinstance(state, dict):
        raise Strange(f"is a {type(state).__name__}")
    found = {"recent": [], **state}
    for part in ("model", "optimizer", "position"):
        if not isinstance(found.get(part), dict):
            raise Strange(f"has no {part}")
    _check_tensors("model", found["model"], weights)
    recent = found["recent"]
    if not isinstance(recent, list) or len(recent) > average:
        raise Strange("has other weights to average than its run keeps")
    for before in recent:
        _check_tensors("recent weights", before, weights)
    _check_position(found["position"], step)
    _check_moments(found["optimizer"].get("state"), parameters, step)
    return found


def _check_moments(found: Any, parameters: Sequence[Tensor], step: int) -> None:
    """Raise Strange unless the moments of AdamW fit; parameters that no step used have none."""
    if not isinstance(found, dict) or not all(_is_index(n, parameters) for n in found):
        raise Strange("has an optimizer of other parameters")
    for number, moments in found.items():
        like = dict.fromkeys(("exp_avg", "exp_avg_sq"), parameters[number])
        _check_tensors(f"optimizer, {number}", moments, {"step": torch.tensor(0.0), **like})
        if bool((moments["exp_avg_sq"] < 0).any()):
            raise Strange(f"has a mean of squares below zero (optimizer, {number})")
    steps = [float(moments["step"]) for moments in found.values()]
    if max(steps, default=0) != min(step, EXACT) or not all(n >= 1 and n % 1 == 0 for n in steps):
        raise Strange(f"has an optimizer that did not make its {step:,} steps")


def _check_position(found: Mapping[str, Any], step: int) -> None:
    counts = ("step", "epoch", "batch", "tokens", "best_step", "stale")
    score = found.get("best_score")
    seconds = found.get("seconds", -1.0)
    right = (
        found.keys() == {*counts, "seconds", "best_score", "best_sha256"}
        and all(_is_count(found[name]) for name in counts)
        and (score is None or _is_figures({"best_score": score}))
        and _is_figures({"seconds": seconds})
        and 0 <= seconds <= MAX_SECONDS
        and found["epoch"] + found["batch"] <= found["step"]
        and found["tokens"] <= found["step"] * MAX_TOKENS
        and max(found["best_step"], found["stale"]) <= found["step"]
        and isinstance(found["best_sha256"], str)
        and (SHA256.fullmatch(found["best_sha256"]) is None) == (score is None)
        and (found["best_step"] == 0) == (score is None)
    )
    if not right:
        raise Strange("stands at no place of a run")
    if found["step"] != step:
        raise Strange(f"is of step {found['step']:,}, and by its name of {step:,}")


def _check_tensors(what: str, found: Any, like: Mapping[str, Tensor]) -> None:
    if not isinstance(found, dict) or found.keys() != like.keys():
        raise Strange(f"has other tensors than its model ({what})")
    for name, tensor in like.items():
        _check_tensor(f"{what}, {name}", found[name], tensor)


def _check_tensor(what: str, found: Any, like: Tensor) -> None:
    if not isinstance(found, Tensor) or not _is_dense(found):
        raise Strange(f"has no dense tensor where one should be ({what})")
    if found.shape != like.shape or found.dtype != like.dtype:
        raise Strange(
            f"has a tensor of shape {list(found.shape)} in {_kind(found)}, expected "
            f"{list(like.shape)} in {_kind(like)} ({what})"
        )
    if not bool(found.isfinite().all()):
        raise Strange(f"has numbers that are not finite ({what})")


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.is_contiguous() and tensor.device.type == "cpu"


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
