"""The whole check of a user's decoder: scenarios, and a planted control."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kvtool.config import DECODE_TOKENS
from kvtool.core.verify.arms import Case
from kvtool.core.verify.check import MAIN, Checked, beginning, with_reach
from kvtool.core.verify.finding import Finding
from kvtool.core.verify.judge import Judge
from kvtool.core.verify.outcome import BUG
from kvtool.core.verify.passes import Passes
from kvtool.core.verify.scenario_run import PREFILL
from kvtool.core.verify.scenarios import GENERATED, SCENARIOS
from kvtool.core.verify.subject import Session, Start
from kvtool.core.verify.target.doctor import Examiner
from kvtool.core.verify.target.session import TargetSession
from kvtool.core.verify.target.subject import TargetSubject
from kvtool.errors import UsageError

OWN = "own"  # the kernels of a decoder that brings its own


def decode_case(
    vocab_size: int,
    context: int,
    ids: Tensor | Sequence[int] | None = None,
    tokens: int = DECODE_TOKENS,
    device: torch.device | str = "cpu",
    prompt_length: int = 0,
) -> Case:
    """The scenario `decode` on ids, or on random ones: the last `tokens` of them one by one.

    prompt_length: of random ids, in tokens; 0: as many as other scenarios have. Raises UsageError
    for ids that the decoder does not have, or too many of them.
    """
    if ids is None:
        if prompt_length >= context:
            text = f"a prompt of {prompt_length:,} tokens is too long"
            raise UsageError(f"{text} (the decoder holds {context:,}, and one more is needed)")
        n_prompt = prompt_length or PREFILL
        length = min(n_prompt + tokens, context)
        generator = torch.Generator().manual_seed(0)
        given = torch.randint(vocab_size, (1, length), generator=generator)
        n_prompt = n_prompt if length > n_prompt else length // 2
        return Case(SCENARIOS[MAIN], given.to(device), n_prompt)
    given = _checked_ids(ids, vocab_size, context, device)
    n = given.shape[1]
    return Case(SCENARIOS[MAIN], given, n - max(1, min(tokens, n // 2)))


def _checked_ids(
    ids: Tensor | Sequence[int], vocab_size: int, context: int, device: torch.device | str
) -> Tensor:
    """The ids (1,N) that a user gave as (N,) or (1,N). Raises UsageError as `decode_case` does."""
    try:
        given = torch.as_tensor(ids, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"ids: {ids!r} are no ids (expected whole numbers (N,))") from error
    given = given[None] if given.dim() == 1 else given
    n = given.shape[-1]
    if given.dim() != 2 or given.shape[0] != 1 or given.is_floating_point() or n < 2:
        shape = tuple(given.shape)
        raise UsageError(f"ids: {shape} of {given.dtype} (expected whole numbers (N,), 2 or more)")
    if n > context:
        raise UsageError(f"ids: {n} are too many (the decoder holds {context})")
    unknown = given[(given < 0) | (given >= vocab_size)].tolist()
    if unknown:
        raise UsageError(f"ids: {unknown[0]} is none of the decoder's {vocab_size}")
    return given.long()


def check_target(
    subject: TargetSubject,
    scenarios: Sequence[str],
    main: Case,
    progress: Callable[[str], None] = lambda text: None,
    thorough: bool = False,
) -> Iterator[Checked]:
    """Judge the user's decoder in all scenarios, in that order. Raises CheckFailed.

    thorough: feed all that can be fed in some minutes, not in some seconds.
    """
    if GENERATED.intersection(scenarios):
        progress("how long a history can be")
    subject.find_reach_for(scenarios, thorough)
    subject.passes = Passes()
    doctor, diagnosed = Examiner(), False
    judge = Judge(subject, doctor)
    for scenario in scenarios:
        progress(scenario)
        # The many steps of a generated scenario are diagnosed where nothing shorter was wrong.
        judge.doctor = None if diagnosed and scenario in GENERATED else doctor
        case = main if scenario == MAIN else Case(SCENARIOS[scenario], thorough=thorough)
        finding = judge.judge(case, thorough=scenario == MAIN)
        diagnosed = diagnosed or finding.verdict == BUG
        subject.passes.clear()  # the next scenario feeds other ids
        yield Checked(subject.name, OWN, True, with_reach(finding, subject))


def target_control(subject: TargetSubject, main: Case) -> Finding:
    """Judge the decoder with a planted bug: a check that calls this right is worth nothing."""
    return Judge(subject.with_session(WrongToken)).judge(beginning(main))


class WrongToken(TargetSession):
    """A session that stores another token than the one it was fed in its first step."""

    def __init__(self, subject: TargetSubject, start: Start) -> None:
        super().__init__(subject, start)
        self.right: Session | None = TargetSession(subject, start)

    def feed(self, ids: Tensor) -> Tensor:
        """The next tokens of each row (B,n) -> their logits (B,n,V)."""
        if self.right is None:
            return super().feed(ids)
        # The first step answers rightly, so that only the stored tokens are wrong.
        found, self.right = self.right.feed(ids), None
        wrong = ids.clone()
        # Its last token: a decoder may forget those that are far, and answers here already.
        wrong[:, -1] = (wrong[:, -1] + 1) % self.subject.vocab_size
        super().feed(wrong)
        return found
