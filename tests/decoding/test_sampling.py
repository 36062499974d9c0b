"""Choosing tokens: what each setting leaves to choose from, and that draws can be repeated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvtool.core.decoding.sampling import Sampler, require_finite
from kvtool.errors import CheckFailed

PROBS = torch.tensor([[0.5, 0.25, 0.15, 0.1]])
LOGITS = PROBS.log()


def left(sampler: Sampler, logits: Tensor = LOGITS) -> list[float]:
    return [round(p, 4) for p in sampler.distribution(logits)[0].tolist()]


def test_temperature_0_takes_the_likeliest_token() -> None:
    logits = torch.tensor([[0.1, 3.0, 2.9], [5.0, -1.0, 0.0]])
    assert Sampler()(logits).tolist() == [1, 0]
    assert Sampler(top_k=2, top_p=0.1, seed=9)(logits).tolist() == [1, 0]


def test_temperature_is_a_power_of_the_probabilities() -> None:
    assert left(Sampler(temperature=1.0)) == [0.5, 0.25, 0.15, 0.1]
    squares = PROBS.square() / PROBS.square().sum()
    assert left(Sampler(temperature=0.5)) == [round(p, 4) for p in squares[0].tolist()]
    assert left(Sampler(temperature=1e30)) == [0.25] * 4


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 1e-50, 1e-320])
def test_a_temperature_near_0_takes_the_likeliest_token(temperature: float) -> None:
    logits = torch.tensor([[80.0, -3.0, 81.0], [-1e4, -1e5, -1e6]])
    sampler = Sampler(temperature)
    assert sampler.distribution(logits).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert sampler(logits).tolist() == [2, 0]


def test_top_k_leaves_the_k_likeliest() -> None:
    assert left(Sampler(1.0, top_k=2)) == [0.6667, 0.3333, 0.0, 0.0]
    assert left(Sampler(1.0, top_k=4)) == left(Sampler(1.0)) == left(Sampler(1.0, top_k=9))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_leaves_no_more_than_k_where_logits_are_equal(k: int) -> None:
    found = left(Sampler(1.0, top_k=k), torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]))
    assert sorted(found, reverse=True)[:k] == [round(1 / k, 4)] * k
    assert sum(p > 0 for p in found) == k


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-50, 1), (0.01, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.91, 4), (1.0, 4)],
)
def test_top_p_leaves_the_smallest_set_that_reaches_it(top_p: float, kept: int) -> None:
    expected = PROBS[0, :kept] / PROBS[0, :kept].sum()
    found = left(Sampler(1.0, top_p=top_p))
    assert found == [round(p, 4) for p in expected.tolist()] + [0.0] * (4 - kept)


def test_top_p_finds_its_tokens_wherever_they_stand() -> None:
    assert left(Sampler(1.0, top_p=0.6), LOGITS[:, [3, 1, 0, 2]]) == [0.0, 0.3333, 0.6667, 0.0]


def test_top_p_counts_among_what_top_k_has_left() -> None:
    """Of 0.5, 0.25, 0.15 rescaled to 0.556, 0.278, 0.167, two reach 0.8; of all four, three."""
    assert left(Sampler(1.0, top_k=3, top_p=0.8)) == [0.6667, 0.3333, 0.0, 0.0]


def test_each_row_is_cut_by_itself() -> None:
    both = torch.cat([LOGITS, LOGITS.flip(1)])
    assert Sampler(1.0, top_k=1).distribution(both).argmax(1).tolist() == [0, 3]
    found = Sampler(1.0, top_p=0.6).distribution(both)
    assert found[1].equal(found[0].flip(0))


def test_one_seed_gives_the_same_draws_and_another_does_not() -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler(1.0, seed=seed)
        return [int(sampler(LOGITS, i)) for i in range(40)]

    first = draws(1)
    torch.manual_seed(123)  # somebody else's generator is neither asked nor moved
    state = torch.random.get_rng_state()
    assert draws(1) == first != draws(2)
    assert torch.random.get_rng_state().equal(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_draws_come_as_often_as_their_probability_says(dtype: torch.dtype) -> None:
    drawn = Sampler(1.0, seed=0)(LOGITS.to(dtype).expand(20_000, 4))
    frequencies = torch.bincount(drawn, minlength=4) / 20_000
    # Four standard deviations of a frequency near 1/2 are 0.014; bfloat16 rounds by up to 0.002.
    assert float((frequencies - PROBS[0]).abs().max()) < 0.015


def test_what_was_cut_is_never_drawn() -> None:
    for sampler in (Sampler(2.0, top_k=2), Sampler(1.0, top_p=0.6)):
        assert set(sampler(LOGITS.expand(2000, 4)).tolist()) == {0, 1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused_with_the_step(
    bad: float, temperature: float
) -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 2] = bad
    with pytest.raises(CheckFailed, match="step 7: the logits are not finite") as caught:
        Sampler(temperature)(logits, 7)
    assert caught.value.exit_code == 1


def test_a_row_without_a_possible_token_is_refused() -> None:
    with pytest.raises(CheckFailed, match="step 0"):
        Sampler()(torch.full((1, 4), float("-inf")))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_may_be_ruled_out(temperature: float) -> None:
    logits = torch.tensor([[float("-inf"), 3.0, float("-inf")]])
    assert Sampler(temperature)(logits).tolist() == [1]


def test_a_large_batch_of_half_precision_logits_is_finite() -> None:
    """The sum of 256 logits of 300 is not, in float16."""
    logits = torch.full((256, 3), 300.0, dtype=torch.float16)
    assert Sampler()(logits).tolist() == [0] * 256


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_numbers_of_a_format_are_finite(dtype: torch.dtype, sign: int) -> None:
    logits = torch.full((3, 4), sign * torch.finfo(dtype).max, dtype=dtype)
    assert Sampler()(logits).tolist() == [0, 0, 0]
    require_finite(logits, 0)
    logits[1, 2] = float("nan")
    with pytest.raises(CheckFailed, match="step 7"):
        Sampler()(logits, 7)
    with pytest.raises(CheckFailed, match="step 7"):
        require_finite(logits, 7)
