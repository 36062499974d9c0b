"""Tiny random models of any architecture that transformers knows: a verdict needs no download."""

from __future__ import annotations

import difflib
import math
import re
from typing import Any, NamedTuple

import torch
from torch import nn

from kvtool.core.verify.hf.library import (
    CAUSAL,
    SEQ2SEQ,
    known_types,
    quiet_transformers,
    use_eager_experts,
)
from kvtool.core.verify.hf.shrink import shrunk
from kvtool.errors import UsageError, pass_on_shortage
from kvtool.files import shipped_models

NOISE = 0.1  # std of what is drawn for vectors of zeros
KEPT_PARAMETERS = re.compile(r".*(A_log|time_decay|time_first|time_mix.*|norm.*)")


class Tiny(NamedTuple):
    """A random model, and in words what is special about how it was built."""

    model: Any  # a PreTrainedModel
    note: str


def tiny_model(model_type: str, seed: int = 0, decoder: bool = True, kind: str = CAUSAL) -> Tiny:
    """A small random model of a type; `decoder` sets is_decoder where a causal one has it.

    Raises UsageError for a type that is not known, or that cannot be built.
    """
    if model_type not in known_types(kind):
        names = sorted({*known_types(), *known_types(SEQ2SEQ)})
        near = difflib.get_close_matches(model_type.lower(), names, n=1)
        hint = f"Did you mean {near[0]}?" if near else "Give a folder, or a type such as llama."
        if model_type in shipped_models():
            hint = "It comes with kvtool: leave out --impl transformers."
        what = "is neither a folder nor a model type that transformers knows"
        raise UsageError(f"--model {model_type}: {what}", hint)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            config, note = tiny_config(model_type, decoder, kind)
            model = _classes(model_type, kind)[1]._from_config(config)
        except (Exception, SystemExit) as error:
            pass_on_shortage(error)
            said = " ".join(str(error).split())[:200]
            raise UsageError(
                f"{model_type}: could not build ({type(error).__name__}: {said})"
            ) from error
        randomize(model)
        use_eager_experts(model)
    return Tiny(model.eval().requires_grad_(False), note)


def tiny_config(model_type: str, decoder: bool = True, kind: str = CAUSAL) -> tuple[Any, str]:
    """The default configuration of a type, shrunk, and what is special about it.

    Raises what transformers raises for one that it cannot build.
    """
    config_class, model_class = _classes(model_type, kind)
    fields, note = shrunk(_default_fields(config_class)), ""
    if decoder and kind == CAUSAL and fields.get("is_decoder") is False:
        fields["is_decoder"], note = True, "built with is_decoder=True"
    return _part_for(model_class.config_class, config_class(**fields)), note


def _default_fields(config_class: Any) -> dict[str, Any]:
    try:
        return dict(config_class().to_dict())
    except Exception:  # a default that its own validation refuses: the class says less, but enough
        held = vars(config_class)
        return {k: v for k, v in held.items() if isinstance(v, (int, float, dict, list))}


def _part_for(expected: Any, config: Any) -> Any:
    """The configuration that a model's class expects: it may be a part of its type's."""
    if expected is None or isinstance(config, expected):
        return config
    parts = (part for part in vars(config).values() if isinstance(part, expected))
    return next(parts, config)


def _classes(model_type: str, kind: str = CAUSAL) -> tuple[Any, Any]:
    """The classes of a type's configuration and of its model."""
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    config_class: Any = CONFIG_MAPPING[model_type]
    mappings = {
        CAUSAL: MODEL_FOR_CAUSAL_LM_MAPPING,
        SEQ2SEQ: MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    }
    return config_class, mappings[kind][config_class]


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Draw all weights anew at std 1/sqrt(fan in): at the usual 0.02 a bug moves no logit.

    Vectors stay as they are (norms, decays) but for a little noise in those that are 0 (biases,
    gates): a choice of the largest has no answer where all are alike.
    """
    drawn: set[int] = set()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in drawn or not weight.is_floating_point() or not weight.numel():
                continue
            drawn.add(id(weight))
            if weight.numel() == max(weight.shape, default=1):
                if not weight.any():
                    weight.normal_(0.0, NOISE)
                continue
            if KEPT_PARAMETERS.fullmatch(name):
                continue
            weight.normal_(0.0, 1.0 / math.sqrt(fan_in(module, weight)))


def fan_in(module: nn.Module, weight: torch.Tensor) -> int:
    """How many numbers a weight sums over; 1 for the rows of a table."""
    if isinstance(module, nn.Embedding):
        return 1
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return math.prod(weight.shape[1:])
    transposed = type(module).__name__ == "Conv1D"  # of transformers: (in, out)
    return weight.shape[0] if transposed else weight.shape[-1]
