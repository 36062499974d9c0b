"""The verdict on quantized caches: compared with a pass that rounds the same way, and only that."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from kvtool.core.cache import cache_class
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.cache.quantized import Int4Cache, Int8Cache, Packed
from kvtool.core.kernels.exact import EXACT
from kvtool.core.verify.check import small
from kvtool.core.verify.float64 import Float64
from kvtool.core.verify.judge import Case, Judge
from kvtool.core.verify.mutants.mutant import SIZES
from kvtool.core.verify.scenarios import SCENARIOS
from verify_subjects import MODELS, ROTARY, judged, subject

KINDS = ("int8", "int4")
BEYOND = ("window", "right-padded", "saved", "two-sources")  # what these kinds have no ability for
FORMATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_kernels_leave_no_difference_in_any_format(kind: str, dtype: torch.dtype) -> None:
    for name in ("rotary, two heads share", "seq2seq"):
        exact = subject(small(kind), dtype, **MODELS[name]).with_kernels(EXACT)
        for scenario in ("decode", "chunks", "crop", "fork", "reset"):
            found = Judge(exact).judge(Case(SCENARIOS[scenario]))
            assert found.verdict == "identical", (name, scenario, found)


@pytest.mark.parametrize("kind", KINDS)
def test_every_scenario_meets_quantized_tokens(kind: str) -> None:
    """With the sizes of a short check; what it may refuse, a crop too far, it need not here."""
    for scenario in SCENARIOS:
        found = judged(small(kind), scenario, **ROTARY)
        assert found.verdict in ("rounding", "unsupported"), found
        assert (found.verdict == "unsupported") == (scenario in BEYOND)
    assert judged(small(kind), "two-sources", **MODELS["seq2seq"]).verdict == "rounding"


@pytest.mark.parametrize("kind", KINDS)
def test_beside_a_pass_that_rounds_nothing_it_would_be_a_bug(kind: str) -> None:
    plain = subject(small(kind), torch.float64, **ROTARY)
    plain.quantization = None
    assert Judge(plain).judge(Case(SCENARIOS["decode"])).verdict == "bug"


def test_a_plain_cache_beside_a_pass_that_rounds_would_be_one_too() -> None:
    plain = subject(DynamicCache, torch.float64, **ROTARY)
    plain.quantization = subject(small("int8"), **ROTARY).quantization
    assert Judge(plain).judge(Case(SCENARIOS["decode"])).verdict == "bug"


class OtherCode(Packed):
    """Below float64 one code is the next one, as where a value lies in the middle of the two."""

    def write(self, start: int, x: Tensor, padding: Tensor | None = None) -> None:
        super().write(start, x, padding)
        if start == 0 and x.dtype != torch.float64:
            self.codes[0, 0, 4, 1] ^= 1


class Flips(Int8Cache):
    def _allocate(self, batch: int, columns: int) -> None:
        super()._allocate(batch, columns)
        for keys, _ in self._packed:
            keys.__class__ = OtherCode


class Zeroes(Int8Cache):
    """Has a bug below float64 alone."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: object) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k, v, step)  # type: ignore[arg-type]
        return keys * (k.dtype == torch.float64), values


def test_rounding_that_chooses_another_code_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    found = judged(partial(Flips, group=4, residual=0), **ROTARY)
    assert found.verdict == "rounding", found
    assert found.working is not None and found.working.relative > 1e-5  # far beyond float32's own
    monkeypatch.setattr(Float64, "within_codes", lambda *_: 0.0)
    assert judged(partial(Flips, group=4, residual=0), **ROTARY).verdict == "bug"


def test_what_is_wrong_below_float64_by_more_than_all_codes_is_a_bug() -> None:
    found = judged(partial(Zeroes, group=4, residual=0), **ROTARY)
    assert found.verdict == "bug" and "alone" in found.evidence


def test_residuals_longer_than_the_check_make_it_vacuous() -> None:
    assert judged(cache_class("int4"), **ROTARY).verdict == "vacuous"


def test_a_head_that_groups_do_not_divide_is_judged_too() -> None:
    odd = {**ROTARY, "d_model": 24}  # heads of 6, groups of 4
    assert odd["d_model"] // SIZES["n_heads"] % 4
    for scenario in ("decode", "padded", "permuted"):
        found = judged(partial(Int4Cache, group=4, residual=1), scenario, **odd)
        assert found.verdict == "rounding", found
