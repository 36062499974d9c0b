"""What is odd in answers themselves, and how much they reused, on answers that are made up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvtool.commands.verify.server_report import VisitReport
from kvtool.core.servers.engine import Completion
from kvtool.core.servers.sglang import SGLang
from kvtool.core.servers.texts import Answer, Cold, Measured
from kvtool.core.servers.verdict import (
    BEYOND,
    BUG,
    CONTRARY,
    HIDDEN,
    IDENTICAL,
    NOT_REACHED,
    WITHIN,
    ArmVerdict,
    judge_arm,
    with_promoted,
)
from kvtool.core.servers.vllm import VLLM
from kvtool.errors import ServerError

END, SHORT = 20, Completion((8,), ({8: -1.0},), 9, lacking=3)
CONTRADICTING = Completion((7, 8), ({7: -9.0, 8: -1.0}, {8: -1.0}), 9)


def measured(prompt: int, reused: tuple[int, ...] = (9, 9)) -> Measured:
    """A right prompt, with a request for each number of reused tokens."""
    draws = np.random.default_rng(prompt)

    def answer(by: float) -> Answer:
        return dict(enumerate(np.linspace(-1, -9, 40) + by * draws.normal(size=40)))

    cold = Cold(list(range(END)), {END: [answer(0.1) for _ in range(6)]})
    cold.controls = [answer(1.0) for _ in range(2)]
    found = Measured("prefix", prompt, cold, least=9)
    for n in reused:
        found.add([(END, answer(0.1))], n)
    return found


@pytest.mark.parametrize(("reused", "verdict"), [
    ((9, 9), WITHIN), ((9, 8), WITHIN), ((9, 8, 8), NOT_REACHED), ((8, 8), NOT_REACHED),
])  # fmt: skip
def test_half_of_the_requests_must_reuse_what_it_takes(
    reused: tuple[int, ...], verdict: str
) -> None:
    found = judge_arm([measured(n, reused) for n in range(5)])
    assert found.verdict == verdict
    some = "5 of 15 requests" if 9 in reused else "no request"
    assert verdict == WITHIN or found.evidence == f"{some} reused the 9 tokens that it takes"


def test_what_is_odd_without_the_cache_too_is_not_held_against_it() -> None:
    for odd, alone in ((CONTRADICTING, CONTRARY), (SHORT, HIDDEN)):
        prompts = [measured(n) for n in range(5)]
        prompts[1].tally.count(odd)
        assert judge_arm(prompts).verdict == alone
        prompts[2].cold.tally.count(odd)
        assert judge_arm(prompts).verdict == (HIDDEN if odd is CONTRADICTING else WITHIN)


def test_one_arm_that_contradicts_itself_is_no_success() -> None:
    right = ArmVerdict("fork", WITHIN, ratio=0.9)
    assert VisitReport([right]).exit_code == 0
    assert VisitReport([right, ArmVerdict("prefix", CONTRARY)]).exit_code == 1


def test_identical_answers_are_told_from_a_bug_by_a_promoted_server_that_is_noisy_too() -> None:
    noisy = {"floor": 0.1, "ratio": 9.0}
    plain = ArmVerdict("prefix", IDENTICAL, **noisy)  # type: ignore[arg-type]
    assert with_promoted(plain, ArmVerdict("prefix", BEYOND, **noisy)).verdict == BUG  # type: ignore[arg-type]


class Says:
    """A client whose server says the same whatever it is asked."""

    url = "http://server"

    def __init__(self, said: dict[str, Any]) -> None:
        self.said = said

    def post(self, path: str, body: Any) -> dict[str, Any]:
        return self.said

    def get(self, path: str) -> dict[str, Any]:
        return self.said

    def masked(self, text: str) -> str:
        return text


TOPS = {f"token_id:{i}": -1.0 - i for i in range(9)}


@pytest.mark.parametrize("kind", [VLLM, SGLang])
@pytest.mark.parametrize("wrong", [7, "x", [1], [None], {}, None, True, {"tokens": 7}])
def test_an_answer_of_another_shape_has_no_logprobs(kind: Any, wrong: Any) -> None:
    shapes: list[dict[str, Any]] = [
        {"choices": wrong, "meta_info": wrong}, {"choices": [wrong]},
        {"choices": [{"logprobs": wrong}], "meta_info": {"output_token_logprobs": wrong}},
        {"choices": [{"logprobs": {"tokens": wrong, "top_logprobs": [TOPS]}}],
         "meta_info": {"output_token_logprobs": wrong, "output_top_logprobs": [[[-1.0, 1]]]}},
    ]  # fmt: skip
    for said in shapes:
        with pytest.raises(ServerError, match="has no logprobs of token ids"):
            kind(Says(said), {}).complete([1, 2, 3])


@pytest.mark.parametrize("usage", [7, "x", [1], True, None])
def test_a_usage_of_another_shape_says_nothing_of_reuse(usage: Any) -> None:
    logprobs = {"tokens": ["token_id:0"], "top_logprobs": [TOPS]}
    client: Any = Says({"choices": [{"logprobs": logprobs}], "usage": usage})
    assert VLLM(client, {}).complete([1, 2, 3]).reused is None
