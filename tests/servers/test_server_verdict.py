"""The rule by which a cached answer is judged, on answers that are made up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvtool.core.servers.engine import Completion, number
from kvtool.core.servers.gaps import (
    Compared,
    ProbeGap,
    Scale,
    distance,
    pooled_floor,
    scale_of,
)  # fmt: skip
from kvtool.core.servers.texts import Answer, Cold, Measured, vector
from kvtool.core.servers.verdict import (
    BEYOND,
    BLIND,
    BUG,
    CONTRARY,
    CROWDED,
    HIDDEN,
    IDENTICAL,
    KERNELS,
    LIMIT,
    LOSSY,
    NO_NOISE,
    NOT_REACHED,
    NOT_REUSED,
    NOT_SHARED,
    ROUNDING,
    SLIGHTLY,
    TOO_NOISY,
    UNSUPPORTED,
    UNTOLD,
    VACUOUS,
    WITHIN,
    ArmVerdict,
    judge_arm,
    with_promoted,
)

SIZE, END, N_PROMPTS = 40, 20, 5
RIGHT = np.linspace(-1, -9, SIZE)


def answer(draws: np.random.Generator, by: float) -> Answer:
    return dict(enumerate(RIGHT + by * draws.normal(size=SIZE)))


def measured(
    prompt: int, gap: float, floor: float = 0.1, fault: float = 1.0, reused: int | None = 9,
    variants: int = 6, requests: int = 2,
) -> Measured:  # fmt: skip
    """One prompt with two requests, whose answers are so far off."""
    draws = np.random.default_rng(prompt)
    cold = Cold(list(range(END)), {END: [answer(draws, floor) for _ in range(variants)]})
    cold.controls = [answer(draws, fault) for _ in range(2)]
    found = Measured("prefix", prompt, cold)
    for _ in range(requests):
        found.add([(END, answer(draws, gap))], reused)
    return found


def judged(gap: float, grown: float = 1.0, **given: float | None) -> ArmVerdict:
    prompts = [measured(n, gap, **given) for n in range(N_PROMPTS)]  # type: ignore[arg-type]
    return judge_arm(prompts, pooled_floor([m.cold for m in prompts]), grown)


@pytest.mark.parametrize(("gap", "verdict"), [(0.1, WITHIN), (0.3, BEYOND), (1.0, BEYOND)])
def test_a_gap_is_measured_by_the_noise(gap: float, verdict: str) -> None:
    found = judged(gap)
    assert found.verdict == verdict
    assert found.first_beyond == (END if verdict == BEYOND else None)
    assert found.prompts == N_PROMPTS and len(found.gaps) == 2 * N_PROMPTS


def test_a_gap_that_the_limit_allows_is_not_where_a_fault_begins() -> None:
    prompts = [measured(n, 1.0) for n in range(N_PROMPTS)]
    for prompt in prompts:  # a shorter history, whose answer is a little above the noise
        draws = np.random.default_rng(prompt.prompt)
        prompt.cold.answers[END - 1] = [answer(draws, 0.1) for _ in range(6)]
        prompt.add([(END - 1, answer(draws, 0.135))], 9)
    found = judge_arm(prompts)
    early = [gap.ratio for gap in found.gaps if gap.history == END - 1]
    assert 1 < max(early) < found.limit == LIMIT
    assert (found.verdict, found.first_beyond) == (BEYOND, END)


def test_a_verdict_has_the_limit_by_which_it_was_judged() -> None:
    assert ArmVerdict("prefix", WITHIN).limit == judged(0.1).limit == LIMIT
    crowded = judge_arm([replace(measured(n, 0.1), arm="slot") for n in range(N_PROMPTS)])
    assert crowded.limit == CROWDED


def test_up_to_twice_the_noise_cannot_be_told_where_others_tokens_lie_between() -> None:
    for gap, low, high, crowded in ((0.19, 1.5, 2.0, HIDDEN), (0.3, 2.0, 9.0, BEYOND)):
        prompts = [measured(n, gap) for n in range(N_PROMPTS)]
        plain = judge_arm(prompts)
        assert plain.verdict == BEYOND and plain.ratio is not None and low < plain.ratio < high
        assert judge_arm([replace(each, arm="slot") for each in prompts]).verdict == crowded


def test_the_distance_of_answers_is_relative_and_infinite_where_one_is_no_number() -> None:
    scale = scale_of([dict(enumerate(RIGHT))] * 3)
    assert scale is not None
    near = dict(enumerate(RIGHT * 1.01))
    assert distance(near, scale) == pytest.approx(0.01)
    assert distance(near, scale, near) == 0
    assert distance(dict(enumerate(RIGHT * 1.02)), scale, near) == pytest.approx(0.01 / 1.01)
    assert distance({0: float("nan")}, scale) == float("inf")


def test_noise_as_large_as_a_fault_tells_nothing() -> None:
    found = judged(0.1, fault=0.08)
    assert (found.verdict, found.evidence) == (HIDDEN, TOO_NOISY)


@pytest.mark.parametrize(("gap", "fault", "verdict"), [
    (0.03, 1.0, WITHIN), (0.03, 0.4, BEYOND), (0.2, 9.0, BEYOND),
])  # fmt: skip
def test_a_few_times_the_noise_is_noise_while_a_wrong_token_dwarfs_it(
    gap: float, fault: float, verdict: str
) -> None:
    found = judged(gap, floor=0.01, fault=fault)
    assert found.ratio is not None and found.ratio > 1.5
    assert found.verdict == verdict


@pytest.mark.parametrize(("arm", "verdict"), [
    ("prefix", BEYOND), ("fork", BEYOND), ("between", WITHIN), ("slot", WITHIN), ("evicted", WITHIN)
])  # fmt: skip
def test_more_is_noise_where_the_tokens_of_others_lie_between(arm: str, verdict: str) -> None:
    prompts = [replace(measured(n, 0.16), arm=arm) for n in range(N_PROMPTS)]
    found = judge_arm(prompts)
    assert found.ratio is not None and LIMIT < found.ratio < 1.5
    assert found.verdict == verdict
    assert judge_arm([replace(measured(n, 0.3), arm=arm) for n in range(N_PROMPTS)]).verdict == (
        BEYOND
    )


def test_a_ratio_a_little_above_the_noise_accuses_nobody() -> None:
    found = judged(0.13)
    assert found.ratio is not None and 1 < found.ratio < LIMIT
    assert (found.verdict, found.limit) == (WITHIN, LIMIT)


def test_answers_that_no_wrong_token_changes_tell_nothing() -> None:
    prompts = [measured(n, 0.0, floor=0.0) for n in range(N_PROMPTS)]
    for prompt in prompts:
        prompt.cold.controls = [dict(enumerate(RIGHT))] * 2
    found = judge_arm(prompts)
    assert (found.verdict, found.evidence) == (HIDDEN, BLIND)


def test_noise_that_grew_is_noise() -> None:
    assert judged(0.3).verdict == BEYOND
    assert judged(0.3, grown=4.0).verdict in (WITHIN, HIDDEN)


@pytest.mark.parametrize(("given", "verdict", "evidence"), [
    ({"reused": 0}, VACUOUS, "took nothing"),
    ({"reused": None}, VACUOUS, "does not report"),
    ({"variants": 2}, VACUOUS, NOT_SHARED),
])  # fmt: skip
def test_what_proves_nothing_is_vacuous(
    given: dict[str, int | None], verdict: str, evidence: str
) -> None:
    found = judged(0.1, **given)
    assert found.verdict == verdict and evidence in found.evidence


def test_a_fault_is_seen_though_the_server_does_not_say_what_it_reused() -> None:
    assert judged(1.0, reused=None).verdict == BEYOND


def test_a_fault_is_seen_though_the_server_says_that_it_reused_nothing() -> None:
    found = judged(1.0, reused=0)
    assert (found.verdict, found.evidence) == (BEYOND, UNTOLD)
    prompts = [measured(n, 0.1, reused=0) for n in range(N_PROMPTS)]  # one request has no median
    prompts[3].add([(END, answer(np.random.default_rng(99), 1.0))], 0)
    assert (judge_arm(prompts).verdict, judge_arm(prompts).evidence) == (VACUOUS, NOT_REUSED)


@pytest.mark.parametrize(("nats", "verdict"), [(0.05, HIDDEN), (1.0, CONTRARY)])
def test_a_token_chosen_in_another_pass_contradicts_nothing_by_less_than_the_noise(
    nats: float, verdict: str
) -> None:
    prompts = [measured(n, 0.1) for n in range(N_PROMPTS)]
    prompts[2].tally.count(Completion((7,), ({7: -1.0 - nats, 8: -1.0},), 9))
    prompts[2].tally.count(Completion((8,), ({7: -2.0, 8: -1.0},), 9))
    found = judge_arm(prompts)
    assert found.verdict == verdict
    assert found.evidence.endswith(SLIGHTLY) == (verdict == HIDDEN)
    assert found.evidence.startswith("1 of 2 tokens is not the likeliest by its own logprobs")


def test_one_request_that_is_as_wrong_as_a_fault_is_not_averaged_away() -> None:
    prompts = [measured(n, 0.1, requests=3) for n in range(N_PROMPTS)]
    prompts[3].add([(END, answer(np.random.default_rng(99), 1.0))], 9)
    found = judge_arm(prompts, 0.0)
    assert found.ratio is not None and found.ratio < 1
    assert (found.verdict, found.evidence) == (BEYOND, "in 1 of 16 requests")


def test_one_request_that_is_large_noise_is_no_fault() -> None:
    prompts = [measured(n, 0.1, requests=3) for n in range(N_PROMPTS)]
    prompts[3].add([(END, answer(np.random.default_rng(99), 0.25))], 9)
    assert judge_arm(prompts, 0.0).verdict == WITHIN


def test_the_noise_of_a_longer_history_is_noise_of_a_prefix_that_was_longer() -> None:
    """With the cache, a prefix may have been computed by a kernel that only longer ones take."""
    for beyond, verdict in ((0.0, BEYOND), (0.3, HIDDEN)):
        prompts = [measured(n, 0.01, floor=0.02, requests=5) for n in range(N_PROMPTS)]
        for each in prompts:
            draws = np.random.default_rng(each.prompt)
            each.add([(END, answer(draws, 0.01 if each.prompt else 0.6))], 9)
            longer = [answer(draws, beyond or 0.02) for _ in range(6)]
            each.cold.answers[END + 1] = longer
        assert judge_arm(prompts).verdict == verdict


@pytest.mark.parametrize("least", [-110.0, -1e30])
def test_tokens_that_a_sampler_ruled_out_are_as_those_that_no_answer_names(least: float) -> None:
    """Which of two the twentieth is, rounding decides; the other one is at minus infinity."""
    one, other = dict(enumerate(RIGHT)), dict(enumerate(RIGHT))
    one[20], other[21] = (number(least) for _ in range(2))
    one |= dict.fromkeys(range(22, SIZE), number(least))
    other |= dict.fromkeys(range(22, SIZE), number(least))
    scale = scale_of([one] * 3)
    assert scale is not None and distance(other, scale) < 0.05
    assert np.isnan(vector({0: float("nan")}, [0, 1])).all()


def test_a_floor_of_exactly_0_takes_that_of_other_histories() -> None:
    prompts = [measured(n, 0.1) for n in range(N_PROMPTS)]
    for quiet in prompts[:3]:  # their shapes chanced upon the same kernels
        quiet.cold.answers[END] = [dict(enumerate(RIGHT))] * 6
    assert judge_arm(prompts, 0.0).verdict == BEYOND
    assert judge_arm(prompts, pooled_floor([m.cold for m in prompts])).verdict == WITHIN


@pytest.mark.parametrize(("gap", "verdict", "evidence"), [
    (0.0, IDENTICAL, ""), (0.1, HIDDEN, NO_NOISE), (1.0, BEYOND, ""),
])  # fmt: skip
def test_where_no_shape_differs_the_size_of_a_fault_decides(
    gap: float, verdict: str, evidence: str
) -> None:
    found = judged(gap, floor=0.0)
    assert (found.verdict, found.evidence) == (verdict, evidence)


def test_what_is_approximate_by_design_is_lossy_beyond_the_noise_alone() -> None:
    for gap, verdict in ((0.1, WITHIN), (1.0, LOSSY)):
        prompts = [replace(measured(n, gap), approximate=True) for n in range(N_PROMPTS)]
        found = judge_arm(prompts, 0.0)
        assert (found.verdict, found.right) == (verdict, True)


@pytest.mark.parametrize(("gap", "floor", "verdict"), [
    (0.0, 0.0, IDENTICAL), (0.1, 0.1, WITHIN), (1.0, 0.1, BEYOND), (1.0, 0.0, BEYOND),
])  # fmt: skip
def test_without_the_size_of_a_fault_the_noise_alone_decides(
    gap: float, floor: float, verdict: str
) -> None:
    prompts = [measured(n, gap, floor=floor) for n in range(N_PROMPTS)]
    for prompt in prompts:  # as of a text that was cut
        prompt.cold.controls = []
    found = judge_arm(prompts, 0.0)
    assert (found.verdict, found.fault) == (verdict, None)


def test_one_prompt_is_judged_as_many_are() -> None:
    for approximate, verdict in ((False, BEYOND), (True, LOSSY)):
        found = judge_arm([replace(measured(0, 1.0), approximate=approximate)])
        assert (found.verdict, found.prompts) == (verdict, 1)


def test_an_answer_that_a_cold_one_gave_too_is_as_far_as_that_one() -> None:
    prompt = measured(0, 0.1)
    prompt.probes = []
    prompt.add([(END, prompt.cold.answers[END][3])], 9)
    (gap,) = judge_arm([prompt]).gaps
    assert gap.identical and 0 < gap.ratio <= 1


def test_a_quiet_history_has_the_floor_of_the_others_in_nats() -> None:
    prompt = measured(0, 0.1)
    prompt.cold.answers[END] = [dict(enumerate(RIGHT))] * 6
    size = float(np.sqrt(np.mean(np.square(RIGHT[:30]))))
    for gap in judge_arm([prompt], pooled=0.02).gaps:
        assert gap.floor == pytest.approx(0.02 * size)
        assert gap.ratio == pytest.approx(gap.gap / gap.floor)


def test_an_arm_that_a_server_has_not_is_unsupported() -> None:
    found = judge_arm([Measured("evicted", 0, Cold([]), unsupported="it has no slots to fill")])
    assert (found.verdict, found.evidence, found.right) == (
        UNSUPPORTED, "it has no slots to fill", False,
    )  # fmt: skip


PLAIN = ArmVerdict("prefix", WITHIN, ratio=0.9, worst=1.0)


@pytest.mark.parametrize(("plain", "worst", "promoted", "verdict"), [
    (WITHIN, 1.0, WITHIN, ROUNDING), (WITHIN, 1.0, IDENTICAL, ROUNDING), (WITHIN, 1.0, BEYOND, BUG),
    (HIDDEN, 1.0, WITHIN, ROUNDING), (HIDDEN, 1.0, HIDDEN, HIDDEN), (BEYOND, 9.0, BEYOND, BUG),
    (BEYOND, 1.2, WITHIN, ROUNDING), (BEYOND, 9.0, WITHIN, BEYOND), (VACUOUS, 0.0, BEYOND, VACUOUS),
    (IDENTICAL, 0.0, WITHIN, IDENTICAL), (IDENTICAL, 0.0, BEYOND, BUG),
    (WITHIN, 1.0, VACUOUS, WITHIN),
])  # fmt: skip
def test_a_promoted_server_decides(plain: str, worst: float, promoted: str, verdict: str) -> None:
    found = with_promoted(
        replace(PLAIN, verdict=plain, worst=worst), replace(PLAIN, verdict=promoted, ratio=7.0)
    )
    assert (found.verdict, found.promoted, found.promoted_ratio) == (verdict, promoted, 7.0)
    assert (found.evidence == KERNELS) == (plain == BEYOND and verdict == BEYOND)


@pytest.mark.parametrize(("floor", "promoted", "verdict"), [
    (0.1, 0.04, ROUNDING), (0.1, 0.06, HIDDEN), (0.0, 0.06, ROUNDING),
])  # fmt: skip
def test_a_promoted_server_has_less_than_half_of_the_noise(
    floor: float, promoted: float, verdict: str
) -> None:
    found = with_promoted(replace(PLAIN, floor=floor), replace(PLAIN, floor=promoted))
    assert found.verdict == verdict


def test_a_promoted_server_is_judged_by_what_its_medians_hide_too() -> None:
    tailed = replace(PLAIN, tail=9.0, tail_gap=0.7)
    found = with_promoted(PLAIN, tailed)
    assert (found.promoted_worst, found.promoted_worst_gap) == (9.0, 0.7)
    kernels = with_promoted(replace(tailed, verdict=BEYOND), PLAIN)
    assert (kernels.verdict, kernels.evidence) == (BEYOND, KERNELS)


@pytest.mark.parametrize("verdict", [CONTRARY, NOT_REACHED, LOSSY, UNSUPPORTED])
def test_what_a_promoted_server_does_not_decide_stays(verdict: str) -> None:
    for other in (WITHIN, BEYOND):
        found = with_promoted(replace(PLAIN, verdict=verdict), replace(PLAIN, verdict=other))
        assert found.verdict == verdict


def test_a_floor_is_its_own_then_that_of_others_and_never_below_what_float32_rounds() -> None:
    def floor(own: float, pooled: float) -> float:
        return Scale([], [], [], own, 1.0).floor_or(pooled)

    assert (floor(0.5, 0.1), floor(0.0, 0.1)) == (0.5, 0.1)
    assert floor(0.0, 0.0) == floor(1e-12, 0.1) == pytest.approx(1.2e-7, rel=0.01)


def test_the_floor_of_others_is_their_median() -> None:
    prompts = [measured(n, 0.1, floor=by) for n, by in enumerate((0.1, 0.1, 0.1, 5.0))]
    assert pooled_floor([m.cold for m in prompts]) < 0.1


def test_noise_that_grew_makes_gaps_and_faults_smaller() -> None:
    once, twice = (Compared.of(measured(0, 0.1), 0.0, grown) for grown in (1.0, 2.0))
    assert twice.gaps[0].floor == 2 * once.gaps[0].floor
    assert twice.gaps[0].ratio == once.gaps[0].ratio / 2
    assert twice.controls == [each / 2 for each in once.controls]
    assert twice.largest == 2 * once.largest


def test_a_request_is_its_median_answer() -> None:
    gaps = [ProbeGap(0, 0, END + i, r, 1.0, r, False) for i, r in enumerate((1.0, 2.0, 9.0))]
    assert Compared(gaps, [], None).runs() == [2.0]


def test_answers_that_contradict_themselves_are_said_unless_they_are_beyond_the_noise() -> None:
    for given, verdict in (
        ({"gap": 1.0}, BEYOND), ({"gap": 0.1, "fault": 0.08}, CONTRARY),
        ({"gap": 0.1, "variants": 2}, CONTRARY),
    ):  # fmt: skip
        prompts = [measured(n, **given) for n in range(N_PROMPTS)]  # type: ignore[arg-type]
        prompts[0].tally.count(Completion((7, 8), ({7: -9.0, 8: -1.0}, {8: -1.0}), 9))
        assert judge_arm(prompts).verdict == verdict


def test_equal_answers_of_which_nothing_says_that_they_were_cached_prove_nothing() -> None:
    assert judged(0.0, floor=0.0, reused=None).verdict == VACUOUS


def test_one_wrong_request_is_found_where_no_shape_differs() -> None:
    prompts = [measured(n, 0.0, floor=0.0) for n in range(N_PROMPTS)]
    prompts[3].add([(END, answer(np.random.default_rng(99), 1.0))], 9)
    found = judge_arm(prompts)
    assert (found.verdict, found.evidence) == (BEYOND, "in 1 of 11 requests")
