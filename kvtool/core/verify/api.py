"""`kvtool.verify`: the whole check of any decoder from Python, and the evidence in words."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvtool import registry
from kvtool.config import DECODE_TOKENS, check_int, require_cache_kind
from kvtool.core.machine import dtype_name
from kvtool.core.models import Model
from kvtool.core.verify.check import Checked, check_model, control, main_case, planted_bug
from kvtool.core.verify.compare import Gap
from kvtool.core.verify.finding import Finding
from kvtool.core.verify.left_out import Judged, cut_short, left_out
from kvtool.core.verify.model_subject import Formats
from kvtool.core.verify.outcome import (
    IDENTICAL,
    LOSSY,
    PRECISION,
    UNSUPPORTED,
    Outcome,
    Summary,
)
from kvtool.core.verify.scenarios import SCENARIOS
from kvtool.core.verify.target.check import OWN, check_target, decode_case, target_control
from kvtool.core.verify.target.subject import TargetSubject
from kvtool.errors import UsageError
from kvtool.reading import quoted


@dataclass(frozen=True)
class Verification:
    """The result of `verify`: true if something was checked, all of it is right, and the planted
    bug was found. str() gives the evidence."""

    name: str
    dtype: str
    checked: tuple[Checked, ...]
    control: Finding
    guess: str = ""  # how an nn.Module was called

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings of all scenarios, one kind of cache after the other."""
        return tuple(checked.finding for checked in self.checked)

    @property
    def summary(self) -> Summary[Checked]:
        """All findings in counts."""
        return Summary(self.checked, planted_bug(self.control, OWN).outcome)

    @property
    def judged(self) -> tuple[Checked, ...]:
        """The findings without unsupported scenarios and kinds of cache that store nothing."""
        return tuple(c for c in self.checked if c.outcome != Outcome.SKIPPED)

    @property
    def wrong(self) -> tuple[Checked, ...]:
        """The judged findings that are not right."""
        return tuple(self.summary.wrong)

    @property
    def ok(self) -> bool:
        """Whether something was checked, all of it is right, and the planted bug was found."""
        return self.summary.ok

    @property
    def trustworthy(self) -> bool:
        """Whether the planted bug was called wrong."""
        return self.summary.trustworthy

    def __bool__(self) -> bool:
        return self.ok

    @property
    def exit_code(self) -> int:
        """0 if it is ok, else 1."""
        return 0 if self.ok else 1

    @property
    def conclusion(self) -> str:
        """The verdict in one line, and what was not run."""
        found = [(c.finding.scenario, c.finding) for c in self.checked]
        skipped = [(name, f.evidence) for name, f in found if f.verdict == UNSUPPORTED]
        rest = left_out(skipped, [name for name, f in found if f.verdict != UNSUPPORTED])
        return "; ".join(filter(None, [self._verdict(), rest]))

    @property
    def verdict(self) -> str:
        """The verdict in a few words, what is wrong first: "BUG in decode from step 1 on"."""
        if self.wrong:
            where, step = self._first_wrong()
            return f"{self.wrong[0].finding.verdict.upper()} in {where}{step}"
        if not self.ok:
            return self._verdict()
        found = {checked.finding.verdict for checked in self.summary.right}
        if found == {IDENTICAL}:
            return "identical, bit for bit"
        if LOSSY in found:
            return "lossy as declared"
        return "rounding, or the model's own precision" if PRECISION in found else "rounding only"

    @property
    def explained(self) -> list[str]:
        """Why the first wrong finding is wrong, where, and what it does, in lines."""
        if not self.wrong:
            return []
        first = self.wrong[0].finding
        found = (("", first.evidence), ("where: ", first.diagnosis.place))
        return [f"{a}{b}" for a, b in (*found, ("what: ", first.diagnosis.hint)) if b]

    def _first_wrong(self) -> tuple[str, str]:
        """Where the first wrong finding is, and from which step on."""
        cache, first = self.wrong[0].cache, self.wrong[0].finding
        where = first.scenario if cache == self.name else f"{cache}, {first.scenario}"
        return where, "" if first.first_wrong is None else f" from step {first.first_wrong} on"

    def _verdict(self) -> str:
        n_judged, n_right = len(self.judged), len(self.summary.right)
        if self.wrong:
            where, step = self._first_wrong()
            wrong = f"{len(self.wrong)} of {n_judged} checks not right"
            return f"{where}: {self.wrong[0].finding.verdict}{step} ({wrong})"
        if not n_right:
            return "nothing was checked"
        if kinds := self.summary.unjudged_kinds:
            return f"nothing was checked of {', '.join(kinds)}"
        if not self.trustworthy:
            return "the check failed: it did not report the bug that was planted to test it"
        more = f", {n_judged - n_right} proved nothing" if n_right < n_judged else ""
        less = cut_short(
            Judged(c.finding.scenario, c.kernels, c.layers, c.finding.not_fed) for c in self.checked
        )
        left = "".join(f"; {part}" for part in less)
        return f"right: {n_right} of {n_judged} scenarios{more}; the planted bug was found{left}"

    def __repr__(self) -> str:
        return f"<Verification: {self.verdict}; {self.name}, {self.dtype}>"

    def __str__(self) -> str:
        return "\n".join([*self._lines(self.checked), self.conclusion])

    @property
    def failure(self) -> str:
        """The conclusion, and the evidence of each wrong finding; of all findings if none is
        wrong."""
        return "\n".join([self.conclusion, *self._lines(self.wrong or self.checked)])

    def _lines(self, shown: Sequence[Checked]) -> list[str]:
        lines = [f"{self.name}, {self.dtype}"]
        if self.guess:
            lines.append(self.guess)
        cache = None
        for checked in shown:
            if checked.cache not in (cache, self.name):
                lines.append(f"{checked.cache}:")
            cache = checked.cache
            lines.extend(evidence(checked.finding, self.dtype))
        return lines


def evidence(finding: Finding, dtype: str) -> list[str]:
    """A finding in a few lines: the verdict, the gaps, where, and what."""
    step = "" if finding.first_wrong is None else f" at step {finding.first_wrong}"
    text = f"{finding.verdict}{step}" + (f": {finding.evidence}" if finding.evidence else "")
    gaps = ((finding.working, dtype), (finding.float64, "float64"), (finding.promoted, "promoted"))
    shown = ", ".join(f"{gap.relative:.1e} {name}" for gap, name in gaps if isinstance(gap, Gap))
    if finding.right and finding.working is not None:
        text += f" ({finding.working.identical} of {finding.working.steps} steps identical"
        text += f"; gap {shown})"
        shown = ""
    lines = [f"  {finding.scenario:<16} {text}"]
    more = (("gap", shown), ("where", finding.diagnosis.place), ("what", finding.diagnosis.hint))
    return lines + [f"  {'':<16} {name}: {words}" for name, words in more if words]


def verify(
    model: Any,
    *,
    ids: Tensor | Sequence[int] | None = None,
    scenarios: Sequence[str] | None = None,
    tokens: int = DECODE_TOKENS,
    prompt_length: int = 0,
    thorough: bool = False,
    dtype: torch.dtype | None = None,
    caches: Sequence[str] | None = None,
    vocab_size: int = 0,
    context: int = 0,
    lossy: bool = False,
) -> Verification:
    """Compare a decoder's cached with its uncached logits: bug or rounding, where, and what.

    model: a model of kvtool's, an nn.Module, or an object with full and step as documented in
    kvtool.core.verify.target. It is not changed: a copy of it is checked.
    ids: what to decode (N,) or (1,N), the last `tokens` of it one by one, at most half; else they
    are random, and begin with a prompt of prompt_length (0: 11). thorough: feed all that can be fed
    in some minutes, not in some seconds. scenarios: names of SCENARIOS, all by default. dtype: the
    working format, the model's own by default. caches: kinds for a model of kvtool's, all by
    default. vocab_size, context: of another decoder, where they cannot be found. lossy: its cache
    rounds what it stores on purpose, so that a loss is reported and no fault.
    Raises UsageError for what cannot be called, CheckFailed for logits that are not finite.
    """
    names = _listed(scenarios or tuple(SCENARIOS))
    for name in names:
        registry.choose(name, tuple(SCENARIOS), "scenarios")
    _require_options(tokens, prompt_length, dtype)
    if isinstance(model, Model):
        kinds = list(registry.CACHES) if caches is None else _listed(caches)
        for kind in kinds:
            require_cache_kind(kind, "caches")
        model = copy.deepcopy(model).eval()
        model = model.to(dtype) if dtype else model
        return _verify_own(model, ids, names, tokens, kinds, prompt_length, thorough)
    if caches is not None:
        raise UsageError("caches: only models of kvtool's can be given a kind of cache")
    subject = TargetSubject(_copied(model), type(model).__name__, vocab_size, context)
    subject.lossy |= lossy
    if dtype is not None:
        subject = subject.to(dtype)
    sizes = (subject.vocab_size, subject.context)
    main = decode_case(*sizes, ids, tokens, subject.device, prompt_length)
    checked = tuple(check_target(subject, names, main, thorough=thorough))
    planted = target_control(subject, main)
    return Verification(subject.name, dtype_name(subject.dtype), checked, planted, subject.guess)


def _listed(names: Sequence[str]) -> list[str]:
    """The names; a text is one name, and no sequence of letters."""
    return [names] if isinstance(names, str) else list(names)


def _require_options(tokens: int, prompt_length: int, dtype: torch.dtype | None) -> None:
    """Raise UsageError for what would fail later, in words that say nothing of it."""
    check_int("tokens", tokens, 1)
    check_int("prompt_length", prompt_length, 0)
    if dtype is not None and not getattr(dtype, "is_floating_point", False):
        raise UsageError(
            f"dtype: {quoted(str(dtype))} is no format of a decoder's numbers (expected "
            "torch.float32, torch.bfloat16, torch.float16 or torch.float64)"
        )


def _verify_own(
    model: Model,
    ids: Tensor | Sequence[int] | None,
    scenarios: Sequence[str],
    tokens: int,
    caches: Sequence[str],
    prompt_length: int,
    thorough: bool,
) -> Verification:
    config, weight = model.config, next(model.parameters())
    if config.n_encoder_layers:
        case = decode_case(config.source_vocab_size, config.context, ids, 1, weight.device)
        assert case.given is not None
        main = main_case(model, case.given, min(tokens, config.context - 1))
    else:
        sizes = (config.vocab_size, config.context)
        main = decode_case(*sizes, ids, tokens, weight.device, prompt_length)
    formats = Formats(model)
    given = (formats, caches, ["default"], scenarios, main)
    checked = tuple(check_model(*given, thorough=thorough))
    planted = control(formats, main)
    return Verification(type(model).__name__, dtype_name(weight.dtype), checked, planted)


def _copied(model: Any) -> Any:
    """A copy, so that the user's model keeps its mode; itself if it cannot be copied."""
    try:
        return copy.deepcopy(model)
    except (TypeError, RuntimeError):
        return model
