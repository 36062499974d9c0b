"""Judging a model of transformers with each of its caches."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from kvtool.core.training.team import ALONE, Team
from kvtool.core.verify.arms import Case
from kvtool.core.verify.check import MAIN, Checked, planted_bug, with_reach
from kvtool.core.verify.finding import Finding
from kvtool.core.verify.hf.folder import Placed, read_folder
from kvtool.core.verify.hf.library import (
    kind_of,
    known_types,
    need_transformers,
    quiet_transformers,
    use_eager_experts,
)
from kvtool.core.verify.hf.seq2seq import EncoderDecoderSubject
from kvtool.core.verify.hf.shared import SharedSubject
from kvtool.core.verify.hf.subject import TransformersSubject
from kvtool.core.verify.hf.tiny import tiny_model
from kvtool.core.verify.judge import Judge
from kvtool.core.verify.outcome import UNSUPPORTED
from kvtool.core.verify.passes import Passes
from kvtool.core.verify.scenarios import SCENARIOS
from kvtool.core.verify.subject import Same
from kvtool.core.verify.target.check import OWN, decode_case, target_control
from kvtool.core.verify.target.doctor import Examiner
from kvtool.errors import CacheOpUnsupported, CheckFailed, UsageError

ALL = "all"  # scenarios


class Loaded(NamedTuple):
    """A model of transformers that is to be judged."""

    model: Any  # a PreTrainedModel
    note: str  # what is special about how it was built
    sha256: str | None = None  # of its weights, if they are from a folder


def load_model(name: str, seed: int = 0, layers: int = 0, placed: Placed | None = None) -> Loaded:
    """The model in a saved folder, the first `layers` of it if not 0, or a tiny random one of a
    type. placed: see `read_folder`.

    Raises UsageError, FileError, and CheckFailed for weights that are NaN.
    """
    need_transformers()
    kind = kind_of(name)
    if name in known_types(kind) or not os.path.lexists(name):
        if layers:
            raise UsageError(f"--layers: {name} is a type, built tiny (expected a folder)")
        return Loaded(*tiny_model(name, seed, kind=kind))
    if os.path.isfile(name):
        raise UsageError(f"--model {name}: is a file (expected a folder)", "Leave --impl out.")
    read = read_folder(Path(name), kind=CheckFailed, layers=layers, placed=placed)
    use_eager_experts(read.model)
    return Loaded(read.model, "", read.sha256)


def subject_of(model: Any, kind: str, whole: Any = None, team: Team = ALONE) -> TransformersSubject:
    """A model of either kind as a subject. Raises what TransformersSubject raises.

    whole: the folder's model, where the processes of a team share `model`.
    """
    if not team.alone:
        return SharedSubject(model, kind, whole, team)
    if "decoder_input_ids" not in inspect.signature(model.forward).parameters:
        return TransformersSubject(model, kind)
    return EncoderDecoderSubject(model, kind)


def check_transformers(
    model: nn.Module,
    kinds: Sequence[str],
    scenarios: Sequence[str],
    tokens: int,
    asked: bool = False,
    diagnose: bool = True,
    progress: Callable[[str], None] = lambda text: None,
    remark: Callable[[str], None] = lambda text: None,
    skip: Container[tuple[str, str, str]] = (),
    prompt_length: int = 0,
    thorough: bool = False,
    whole: Any = None,
    team: Team = ALONE,
) -> Iterator[Checked]:
    """Judge a model with kinds of transformers' caches in all scenarios, then a planted bug.

    A kind that cannot be used is one finding, and counts only if it was `asked` for. skip: kind,
    kernels and scenario of what is not judged. `diagnose` locates bugs, which takes longer.
    `progress` hears what comes next, `remark` what goes with the verdicts. whole: see `subject_of`.
    Raises CheckFailed.
    """
    planted, passes, doctor = None, Passes(), Examiner()
    formats: dict[tuple[Same, torch.dtype], nn.Module] = {}
    for kind in kinds:
        left = [scenario for scenario in scenarios if (kind, OWN, scenario) not in skip]
        # The bug is planted in the first kind that can be used, even if nothing of it is left.
        if (kind, OWN, ALL) in skip or not (left or planted is None):
            continue
        try:
            subject = subject_of(model, kind, whole, team)
        except (CacheOpUnsupported, UsageError) as error:
            why = Finding(ALL, UNSUPPORTED, error.message)
            yield Checked(kind, OWN, asked, why, usable=False)
            continue
        subject.passes, subject.formats = passes, formats
        first = planted is None
        if first and (text := subject.remark()):
            remark(text)
        sizes = (subject.vocab_size, subject.context)
        main = decode_case(*sizes, None, tokens, subject.device, prompt_length)
        with quiet_transformers():
            subject.find_reach_for(left, thorough)
        judge = Judge(subject, doctor if diagnose else None)
        for scenario in left:
            progress(f"{kind}, {scenario}")
            yield _judged(judge, subject, scenario, main, first, thorough)
        if first:
            with quiet_transformers():
                planted = target_control(subject, main)
    if planted is not None:
        yield planted_bug(planted, OWN)


def _judged(
    judge: Judge,
    subject: TransformersSubject,
    scenario: str,
    main: Case,
    first: bool,
    thorough: bool,
) -> Checked:
    case = main if scenario == MAIN else Case(SCENARIOS[scenario], thorough=thorough)
    with quiet_transformers():
        finding = judge.judge(case, thorough=scenario == MAIN and first)
    finding = with_reach(finding, subject)
    return Checked(subject.name, OWN, True, finding, not_judged=subject.not_judged)
