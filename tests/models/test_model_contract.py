"""What kvtool relies on in a model, over every registered family; model_checks.py has the checks,
and here are models that break them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import model_checks as checks
from kvtool import registry
from kvtool.core.models.decoder import Decoder


@pytest.mark.parametrize("family", registry.MODELS)
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
def test_promise_of_models(check: Callable[[str], None], family: str) -> None:
    check(family)


class Remembers(Decoder):
    """A planted bug: the longest sequence so far is kept in the model."""

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.longest = tokens
        return super().forward(tokens, *args, **kwargs)


class SeesAll(Decoder):
    """A planted bug: a token knows what follows."""

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logits = super().forward(tokens, *args, **kwargs)
        return logits + logits.mean(1, keepdim=True)


class OnItsOwn(Decoder):
    """A planted bug: positions are counted in the step, not taken from it."""

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        numbers = torch.arange(tokens.shape[1], dtype=self.head.weight.dtype)
        return super().forward(tokens, *args, **kwargs) * (1 + numbers[:, None])


class PastRows(Decoder):
    """A planted bug: the head is not applied by the step's kernels, but by others, which round
    differently for several tokens. Those of PyTorch do so on some processors alone."""

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        head, self.head = self.head, torch.nn.Identity()
        try:
            x = super().forward(tokens, *args, **kwargs)
        finally:
            self.head = head
        wide = torch.float64 if tokens.shape[1] > 1 else x.dtype
        return torch.nn.functional.linear(x.to(wide), head.weight.to(wide)).to(x.dtype)


class Doubles(Decoder):
    """A planted bug: the last token is not asked for alone."""

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(tokens, *args[:3], **{**kwargs, "last": False})


class Forgets(Decoder):
    """A planted bug: a weight that is no parameter is in no checkpoint."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scale = float(torch.rand(()))

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(tokens, *args, **kwargs) * self.scale


class SeesFar(Decoder):
    """A planted bug: the window of the configuration is not looked at."""

    def __init__(self, config: Any) -> None:
        super().__init__(dataclasses.replace(config, window=0))


class DropsNothing(Decoder):
    """A planted bug: the dropout of the configuration is not looked at."""

    def __init__(self, config: Any) -> None:
        super().__init__(dataclasses.replace(config, dropout=0.0))


def one_cache_gives_its_logits(family: str) -> None:
    """The last check, as far as a broken model needs it: each bug that it finds is located."""
    checks.check_every_cache_gives_its_logits(family, caches=["static"], scenarios=["decode"])


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (Doubles, checks.check_logits_have_their_shape_and_format),
        (SeesAll, checks.check_a_later_token_changes_no_earlier_logit),
        (OnItsOwn, checks.check_any_split_gives_the_logits_of_one_pass),
        (OnItsOwn, one_cache_gives_its_logits),
        (Remembers, checks.check_nothing_is_kept_between_calls),
        (PastRows, checks.check_exact_kernels_give_the_same_bits_with_a_cache),
        (Forgets, checks.check_a_checkpoint_is_the_same_model),
        (SeesFar, checks.check_no_field_is_ignored),
        (DropsNothing, checks.check_no_field_is_ignored),
    ],
)
def test_a_broken_promise_is_caught(
    broken: type, check: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.MODELS, "broken", f"{__name__}:{broken.__name__}")
    with pytest.raises(AssertionError):
        check("broken")
