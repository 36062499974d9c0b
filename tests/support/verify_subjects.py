"""Small subjects that the tests of the check share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvtool.core.cache import cache_class
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.verify.diagnosis.doctor import examine
from kvtool.core.verify.judge import Case, Finding, Judge
from kvtool.core.verify.model_subject import Make, ModelSession, ModelSubject
from kvtool.core.verify.scenarios import SCENARIOS
from kvtool.registry import CACHES
from small_models import random_model

MODELS: dict[str, dict[str, Any]] = {
    "sinusoidal": {},
    "learned, untied": {"positions": "learned", "tied": False, "bias": False},
    "rotary, two heads share": {"positions": "rotary", "n_kv_heads": 2, "norm": "rmsnorm"},
    "rotary, all heads share": {"positions": "rotary", "n_kv_heads": 1, "activation": "swiglu"},
    "seq2seq": {"n_encoder_layers": 1, "source_vocab_size": 23},
    "seq2seq, rotary": {
        "n_encoder_layers": 1,
        "source_vocab_size": 23,
        "positions": "rotary",
        "n_kv_heads": 2,
    },
}
ROTARY = MODELS["rotary, two heads share"]
# They have all that a cache sees: heads that share keys, and a source.
TELLING = ("rotary, two heads share", "seq2seq, rotary")
STORING = [kind for kind in CACHES if not cache_class(kind).recompute]


def subject(
    make: Make = DynamicCache,
    dtype: torch.dtype = torch.float32,
    session: Callable[..., Any] = ModelSession,
    **changes: Any,
) -> ModelSubject:
    """A tiny random model with a cache; `changes` are of its configuration."""
    model = random_model(dtype=dtype, **{"context": 256, **changes})
    return ModelSubject(model, make, "under test", session=session)


def judged(
    make: Make = DynamicCache, scenario: str = "decode", thorough: bool = False, **changes: Any
) -> Finding:
    """What is found for a cache in one scenario."""
    judge = Judge(subject(make, **changes), examine)
    return judge.judge(Case(SCENARIOS[scenario]), thorough)
