"""How far apart two runs are, and runs in which nothing is below float64."""

from __future__ import annotations

import math

import pytest
import torch

from kvtool.core.verify.compare import compare, distances, spacing
from kvtool.core.verify.precision import Promote


def test_ulps_count_the_spacing_at_the_largest_logit_of_the_step() -> None:
    expected = [torch.tensor([[4.0, 1.0]]), torch.tensor([[1.0, 0.5]])]
    found = [torch.tensor([[4.0, 1.0]]), torch.tensor([[1.0, 0.5 + 2.0**-20]])]
    gap = compare(found, expected)
    assert (gap.steps, gap.identical, gap.first) == (2, 1, 1)
    assert distances(found, expected) == [0.0, gap.relative] == [0.0, 2.0**-22]
    assert gap.ulps == 2.0**-20 / 2.0**-23


def test_equal_runs_have_no_first_difference() -> None:
    logits = [torch.ones(1, 3), torch.zeros(1, 3)]
    assert compare(logits, logits) == (2, 2, None, 0.0, 0.0, (0.0, 0.0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_infinitely_far(value: float) -> None:
    assert distances([torch.tensor([value])], [torch.tensor([1.0])]) == [math.inf]


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (1.0, torch.float32, 2.0**-23),
        (1.99, torch.float32, 2.0**-23),
        (2.0, torch.float32, 2.0**-22),
        (0.0, torch.float32, 2.0**-149),
        (1.0, torch.bfloat16, 2.0**-7),
        (3.0, torch.float64, 2.0**-51),
    ],
)
def test_the_spacing_is_the_distance_to_the_next_number(
    value: float, dtype: torch.dtype, expected: float
) -> None:
    assert spacing(value, dtype) == expected


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_promoted_casts_lose_nothing(low: torch.dtype) -> None:
    third = torch.full((4,), 1 / 3, dtype=torch.float64)
    assert not torch.equal(third.to(low).double(), third)
    with Promote():
        assert torch.equal(third.to(low).double(), third)
        assert torch.equal(torch.softmax(third, 0, dtype=low), torch.softmax(third, 0))
        assert torch.zeros(2).dtype == torch.zeros(2, dtype=low).dtype == torch.float64
        assert third.long().dtype == torch.int64
        by_position = torch.ops.prims.convert_element_type.default(third, low)
        assert torch.equal(by_position, third)
    assert third.to(low).dtype == low


def test_a_mask_of_whole_numbers_is_not_promoted_to_float32_alone() -> None:
    least = torch.finfo(torch.float64).min
    mask = torch.tensor([1, 0])
    with Promote():
        assert ((1.0 - mask) * least).tolist() == [0.0, least]
    assert ((1.0 - mask) * least).isnan().any()  # as it was before: 0 times infinity
    with pytest.raises(ZeroDivisionError), Promote():
        raise ZeroDivisionError
    assert torch.zeros(1).dtype == torch.float32
