"""What medians hide is seen, and the tails of a right server are not taken for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvtool.core.servers.gaps import Compared, ProbeGap
from kvtool.core.servers.tails import Seen, hidden

FLOOR, FAULT, N_PROMPTS, N_ANSWERS = 0.1, 0.3, 5, 13
Times = Callable[[int, int, int], float]  # prompt, run, history -> times the noise


def seen(times: Times, floor: float = FLOOR, crowded: bool = False) -> Seen | None:
    """What is seen of five prompts with two requests each, whose gaps are so large."""
    draws, found = np.random.default_rng(0), []
    for prompt in range(N_PROMPTS):
        gaps = []
        for run in range(2):
            for history in range(70, 70 + N_ANSWERS):
                ratio = times(prompt, run, history) or float(draws.uniform(0.1, 1.3))
                gaps.append(ProbeGap(prompt, run, history, ratio * floor, floor, ratio, False))
        found.append(Compared(gaps, [FAULT / floor], FAULT))
    return hidden(found, crowded)


def test_a_right_server_has_nothing_hidden() -> None:
    assert seen(lambda *_: 0.0) is None


@pytest.mark.parametrize(("times", "said"), [
    (lambda p, r, h: 2.1 * (h % 16 == 0), "at every 16th token"),
    (lambda p, r, h: 2.1 * (h % 16 == 15), "one before every 16th token"),
    (lambda p, r, h: 2.1 * (h % 16 == 1), "one behind every 16th token"),
    (lambda p, r, h: 2.1 * (h == 70), "at the first token of each answer"),
    (lambda p, r, h: 2.1 * (h == 71), "at the second token of each answer"),
    (lambda p, r, h: 2.1 * (h in (73, 75, 77)), "at "),
    (lambda p, r, h: 2.1 * (p == 3 and r == 1), "in 1 of 10 requests"),
    (lambda p, r, h: 4.1 * (p == 3 and r == 1 and h == 75), "at 1 of 130 positions"),
])  # fmt: skip
def test_a_fault_in_few_answers_is_seen(times: Times, said: str) -> None:
    found = seen(times)
    assert found is not None and found.sure and found.said.startswith(said)
    assert 70 <= found.first < 70 + N_ANSWERS


@pytest.mark.parametrize("times", [
    lambda p, r, h: 1.5 * (h % 16 == 0), lambda p, r, h: 1.8 * (h in (73, 75, 77)),
    lambda p, r, h: 1.8 * (p == 3 and r == 1), lambda p, r, h: 3.5 * (p == 3 and h == 75),
])  # fmt: skip
def test_what_right_servers_seldom_do_cannot_be_told(times: Times) -> None:
    found = seen(times)
    assert found is not None and not found.sure


@pytest.mark.parametrize("times", [
    lambda p, r, h: 1.3 * (h % 16 == 0), lambda p, r, h: 1.5 * (p == 3 and r == 1),
    lambda p, r, h: 3.0 * (p == 3 and r == 1 and h == 75),
])  # fmt: skip
def test_the_tail_of_a_right_server_is_noise(times: Times) -> None:
    assert seen(times) is None


def test_where_others_tokens_lie_between_one_request_is_further_off() -> None:
    def one(ratio: float) -> Seen | None:
        return seen(lambda p, r, h: ratio * (p == 3 and r == 1), crowded=True)

    found = one(3.0)
    assert one(2.4) is None and found is not None and not found.sure
    assert seen(lambda p, r, h: 2.4 * (h % 16 == 0), crowded=True) is None


def test_a_gap_far_below_a_wrong_token_is_no_fault_at_few_times_the_noise() -> None:
    assert seen(lambda p, r, h: 3.0 * (h % 16 == 0), floor=0.03) is None
    found = seen(lambda p, r, h: 4.5 * (h % 16 == 0), floor=0.03)
    assert found is not None and found.sure


def test_what_a_wrong_token_dwarfs_is_noise_for_longer() -> None:
    assert seen(lambda p, r, h: 3.0 * (h % 16 == 0), floor=1e-6) is None
    assert seen(lambda p, r, h: 3.0 * (p == 3 and r == 1), floor=1e-6) is None
    found = seen(lambda p, r, h: 3e5 * (h % 16 == 0), floor=1e-6)
    assert found is not None and found.sure


def test_one_floor_that_is_too_small_by_chance_makes_no_fault() -> None:
    gaps = [ProbeGap(0, 0, 70 + i, 0.09, FLOOR, 0.9, False) for i in range(N_ANSWERS)]
    gaps[4] = ProbeGap(0, 0, 74, 0.25, 0.05, 5.0, False)
    assert hidden([Compared(gaps, [3.0], FAULT)], False) is None


@pytest.mark.parametrize("compared", [True, False])
def test_a_kernel_of_long_histories_alone_makes_no_fault_in_short_ones(compared: bool) -> None:
    """A longer request that computed the prefix rounded as only long histories do when cold."""

    def one(gap: float) -> Seen | None:
        found = []
        for prompt in range(N_PROMPTS):
            quiet = [ProbeGap(prompt, 0, 63 + i, 0.01, 0.02, 0.5, False) for i in range(8)]
            quiet[4] = ProbeGap(prompt, 0, 67, gap, 0.02, gap / 0.02, False)
            loud = [ProbeGap(prompt, 0, 71 + i, 0.05, FLOOR, 0.5, False) for i in range(5)]
            gaps = quiet + loud * compared
            found.append(Compared(gaps, [FAULT / FLOOR], FAULT, FLOOR))
        return hidden(found, False)

    doubtful, sure = one(1.6 * FLOOR), one(4.5 * FLOOR)
    assert doubtful is not None and not doubtful.sure and doubtful.ratio > 4
    assert sure is not None and sure.sure and sure.ratio == pytest.approx(4.5)


WHERE: dict[str, Times] = {
    "place": lambda p, r, h: h % 16 == 0,
    "many": lambda p, r, h: h in (73, 75, 77),
    "request": lambda p, r, h: p == 3 and r == 1,
    "position": lambda p, r, h: p == 3 and r == 1 and h == 75,
}


@pytest.mark.parametrize(("where", "crowded", "doubt", "fault"), [
    ("place", False, 1.4, 1.7), ("many", False, 1.7, 2.0), ("request", False, 1.6, 2.0),
    ("position", False, 3.2, 4.0), ("place", True, 2.5, 4.0), ("many", True, 2.5, 4.0),
    ("request", True, 2.5, 4.0), ("position", True, 4.0, 8.0),
])  # fmt: skip
def test_each_view_has_its_own_limits(
    where: str, crowded: bool, doubt: float, fault: float
) -> None:
    sure = []
    for times in (doubt - 0.01, doubt + 0.01, fault - 0.01, fault + 0.01):
        found = seen(lambda *at, times=times: times * WHERE[where](*at), 1.2 * FLOOR, crowded)
        sure.append(None if found is None else found.sure)
    assert sure == [None, False, False, True]


def made(*prompts: list[list[tuple[int, float]]], faults: tuple[float, ...] = ()) -> Seen | None:
    """What is seen of prompts' requests, as (history, times the noise)."""
    found = []
    for n, requests in enumerate(prompts):
        gaps = [
            ProbeGap(n, run, history, ratio * FLOOR, FLOOR, ratio, False)
            for run, request in enumerate(requests)
            for history, ratio in request
        ]
        found.append(Compared(gaps, [3.0], faults[n] if faults else FAULT))
    return hidden(found, False)


def flat(first: int = 70, n: int = 13, **other: float) -> list[tuple[int, float]]:
    return [(first + i, other.get(f"h{first + i}", 0.9)) for i in range(n)]


def test_a_kind_of_position_is_judged_by_three_prompts_that_have_it() -> None:
    without, have = [flat(65)], [flat(70, h80=2.1)]
    assert made(*[have] * 2, *[without] * 3) is None
    assert made(*[have] * 3, *[without] * 2) is not None


def test_a_kind_of_position_is_judged_by_medians() -> None:
    assert made(*[[flat(h80=3.0)]] * 2, *[[flat()]] * 3) is None
    assert made(*[[flat(h80=2.4), flat(h80=0.2)]] * 5) is None
    found = made(*[[flat(h80=2.4), flat(h80=1.2)]] * 5)
    assert found is not None and found.sure and found.ratio == pytest.approx(1.8)
    again = made(*[[flat(), flat(h70=2.9)]] * 5)  # the first token of each request
    assert again is not None and again.said == "at the first token of each answer"
    later = made(*[[flat(64, 17, h64=1.2, h80=2.6)]] * 5)
    assert later is not None and later.first == 80
    two = made(*[[flat(h70=2.1, h71=2.5)]] * 5)
    assert two is not None and two.said == "at the second token of each answer"


def test_a_request_of_few_answers_is_judged_as_positions_are() -> None:
    assert made([[(70 + i, 3.1) for i in range(4)], *[flat()] * 9]) is None
    found = made([[(70 + i, 3.1) for i in range(5)], *[flat()] * 9])
    assert found is not None and found.sure and found.said == "in 1 of 10 requests"


def test_a_tenth_of_all_positions_is_noise() -> None:
    def at(n: int) -> Seen | None:
        wrong = {(p, h) for h in (73, 75) for p in range(10)}
        kept = sorted(wrong, key=lambda place: place[::-1])[:n]
        prompts = [[flat(**{f"h{h}": 2.1 for q, h in kept if p == q})] for p in range(10)]
        return made(*prompts)

    assert at(13) is None
    found = at(14)
    assert found is not None and found.said == "at 14 of 130 positions" and found.first == 73


def test_the_largest_of_several_is_said_from_the_first_on() -> None:
    positions = made([flat(h75=4.1, h77=5.0), *[flat()] * 9])
    assert positions is not None and (positions.ratio, positions.first) == (5.0, 75)
    one, other = ([(first + i, ratio) for i in range(6)] for first, ratio in ((70, 2.1), (72, 2.6)))
    requests = made([one, other, *[flat()] * 18])
    assert requests is not None and (requests.ratio, requests.first) == (2.6, 70)


def test_a_single_gap_far_below_a_wrong_token_is_noise_at_any_times() -> None:
    assert seen(lambda *at: 5.0 * WHERE["request"](*at), floor=0.02) is None
    assert seen(lambda *at: 9.0 * WHERE["position"](*at), floor=0.015) is None


def test_the_size_of_a_fault_is_a_median_and_without_one_nothing_is_seen() -> None:
    wrong = [[flat(h80=2.1)]] * 5
    assert made(*wrong, faults=(0.01, 0.01, 0.5, 0.5, 0.5)) is None
    assert made(*wrong, faults=(0.3, 0.3, 0.3, 9.0, 9.0)) is not None
    gaps = [ProbeGap(0, 0, 70 + i, 9.0, FLOOR, 90.0, False) for i in range(N_ANSWERS)]
    assert hidden([Compared(gaps, [], None)], False) is None
