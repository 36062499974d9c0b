"""kvtool.verify and kvtool.testing.assert_cache_matches: the check from Python."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvtool
from cli_probe import HANGS
from decoder_shapes import VOCAB, Pairs, Stepper, after, joined
from kvtool import registry
from kvtool.core.cache import Step
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.verify.api import evidence
from kvtool.core.verify.judge import BUG, Judge
from kvtool.core.verify.target.check import WrongToken, check_target, decode_case
from kvtool.core.verify.target.session import TargetSession
from kvtool.core.verify.target.subject import TargetSubject
from kvtool.errors import CheckFailed, UsageError
from kvtool.testing import assert_cache_matches
from small_models import random_model

QUICK: dict[str, Any] = {"scenarios": ["decode"], "tokens": 4}


class Shifted(Pairs):
    """Every token behind the prompt stands one too far."""

    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        new: list[Any] = []
        positions = after(cache, ids) + (1 if cache else 0)
        return self.run(ids, positions, joined(cache, new)), new


class WithDropout(Pairs):
    def run(self, *args: Any) -> Tensor:
        return nn.functional.dropout(super().run(*args), 0.5, self.training)


def test_importing_kvtool_loads_no_torch_and_offers_what_it_has() -> None:
    code = (
        "import sys, kvtool; assert 'torch' not in sys.modules\n"
        "assert {'verify', 'generate', 'testing'} <= set(dir(kvtool))\n"
        "assert 'torch' not in sys.modules\n"
        "import kvtool.testing; assert 'torch' not in sys.modules\n"
        "assert callable(kvtool.testing.assert_cache_matches)\n"
        "assert callable(kvtool.verify) and 'torch' in sys.modules\n"
        "from kvtool import generate, verify; assert verify is kvtool.verify"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANGS)


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'verfy'"):
        _ = kvtool.verfy  # type: ignore[attr-defined]


@pytest.mark.parametrize("decoder", [Pairs, Stepper])
def test_a_right_decoder_is_ok(decoder: type) -> None:
    report = kvtool.verify(decoder(), **QUICK)
    assert (report.ok, report.exit_code, bool(report)) == (True, 0, True)
    assert [f.verdict for f in report.findings] == ["rounding"]
    assert "0 of" in str(report) or "steps identical" in str(report)
    assert report.conclusion == "right: 1 of 1 scenarios; the planted bug was found"


def test_a_model_of_ours_is_checked_with_the_kinds_asked_for() -> None:
    report = kvtool.verify(random_model(), caches=["dynamic", "none"], **QUICK)
    assert [(c.cache, c.finding.verdict) for c in report.checked] == [
        ("dynamic", "rounding"), ("none", "no cache"),
    ]  # fmt: skip
    assert report.ok  # a kind that stores nothing on purpose is no failure


def test_a_kind_that_stores_nothing_is_not_enough() -> None:
    report = kvtool.verify(random_model(), caches=["none"], **QUICK)
    assert (report.ok, report.conclusion) == (False, "nothing was checked")


def test_an_encoder_decoder_of_ours_reads_the_ids_as_its_source() -> None:
    model = random_model(n_encoder_layers=1, source_vocab_size=23)
    assert kvtool.verify(model, ids=[3, 1, 22], caches=["dynamic"], **QUICK).ok


def test_the_report_of_a_bug_shows_step_gaps_place_and_kind() -> None:
    report = kvtool.verify(Shifted(), **QUICK)
    assert (report.ok, report.exit_code) == (False, 1)
    lines = str(report).splitlines()
    assert lines[0] == "Shifted, float32"
    assert lines[1] == "called as forward(ids, cache=None at first) -> (logits, cache)"
    assert lines[2].split() == ["decode", "bug", "at", "step", "1:", *lines[2].split()[5:]]
    gap = report.findings[0].float64
    assert gap is not None and f"{gap.relative:.1e} float64" in lines[3]
    assert lines[4].strip() == "where: pos_embedding was asked for 12, not 11"
    assert lines[5].strip().startswith("what: positions after the first step are one too high")
    assert lines[-1] == "decode: bug from step 1 on (1 of 1 checks not right)"


def test_the_assertion_passes_and_fails_with_the_evidence() -> None:
    assert_cache_matches(Pairs(), list(range(12)), **QUICK)
    with pytest.raises(AssertionError) as caught:
        assert_cache_matches(Shifted(), torch.arange(12), **QUICK)
    assert "where: pos_embedding was asked for 9, not 8" in str(caught.value)
    assert "what: positions after the first step are one too high" in str(caught.value)
    assert "float64" in str(caught.value)


class Coarse(DynamicCache):
    """Stores in half the format."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        k, v = (t.to(torch.bfloat16).to(t.dtype) for t in (k, v))
        return super().write(layer, k, v, step)


def test_the_assertion_begins_with_the_kind_and_lists_what_is_not_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(registry.CACHES, "coarse", f"{__name__}:Coarse")
    kinds = ["static", "coarse", "dynamic"]
    with pytest.raises(AssertionError) as caught:
        assert_cache_matches(random_model(), caches=kinds, **QUICK)
    lines = str(caught.value).splitlines()
    assert lines[0] == "coarse, decode: precision from step 0 on (1 of 3 checks not right)"
    assert [line for line in lines if not line.startswith(" ")][1:] == [
        "Decoder, float32", "coarse:",
    ]  # fmt: skip
    assert sum(line.startswith("  decode ") for line in lines) == 1
    whole = str(kvtool.verify(random_model(), caches=kinds, **QUICK)).splitlines()
    assert {"static:", "coarse:", "dynamic:"} < {*whole} and whole[-1] == lines[0]


def test_the_assertion_fails_for_logits_that_are_not_finite() -> None:
    model = Pairs()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(CheckFailed):
        kvtool.verify(model, **QUICK)
    with pytest.raises(AssertionError, match="not finite"):
        assert_cache_matches(model, **QUICK)


def test_the_users_model_is_left_as_it_was() -> None:
    model = WithDropout().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert kvtool.verify(model, dtype=torch.bfloat16, **QUICK).ok
    assert model.training and all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name])
    model(torch.arange(4)[None])[0].sum().backward()  # nothing of it was left in inference mode


def test_the_working_format_can_be_chosen() -> None:
    gaps = {}
    for dtype in (torch.float32, torch.float64):
        report = kvtool.verify(Pairs(), dtype=dtype, **QUICK)
        working = report.findings[0].working
        assert working is not None and report.dtype == str(dtype).removeprefix("torch.")
        gaps[dtype] = working.relative
    assert gaps[torch.float64] < 1e-14 < 1e-9 < gaps[torch.float32]


def test_ids_are_fed_as_a_prompt_and_then_one_by_one() -> None:
    case = decode_case(VOCAB, 64, torch.arange(12), tokens=5)
    assert case.given is not None and (case.given.tolist(), case.n_prompt) == ([[*range(12)]], 7)
    assert decode_case(VOCAB, 64, torch.arange(12), tokens=99).n_prompt == 6
    random = decode_case(VOCAB, 30, tokens=99)
    assert random.given is not None and (random.given.shape, random.n_prompt) == ((1, 30), 11)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.zeros(2, 5, dtype=torch.long), r"\(2, 5\) of torch.int64"),
        ([0.5, 1.5], "of torch.float32"),
        ([1], r"expected whole numbers \(N,\), 2 or more"),
        ([1] * 65, r"65 are too many \(the decoder holds 64\)"),
        ([1, VOCAB], f"{VOCAB} is none of the decoder's {VOCAB}"),
        ([1, -1], "-1 is none"),
    ],
)
def test_ids_that_mean_nothing_are_refused(ids: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        kvtool.verify(Pairs(), ids=ids, **QUICK)


def test_unknown_scenarios_and_misplaced_kinds_are_refused() -> None:
    with pytest.raises(UsageError, match="Did you mean decode"):
        kvtool.verify(Pairs(), scenarios=["decod"])
    with pytest.raises(UsageError, match="only models of kvtool's"):
        kvtool.verify(Pairs(), caches=["static"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": 0}, "tokens: 0 is too small"),
        ({"tokens": 1.5}, "tokens: 1.5 is not a whole number"),
        ({"tokens": "8"}, "tokens: '8' is not a whole number"),
        ({"prompt_length": -1}, "prompt_length: -1 is too small"),
        ({"dtype": "bfloat16"}, "dtype: 'bfloat16' is no format"),
        ({"dtype": torch.int8}, "dtype: 'torch.int8' is no format"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        kvtool.verify(Pairs(), **{**QUICK, **options})


def test_a_name_alone_is_one_name_and_no_letters() -> None:
    with pytest.raises(UsageError, match="scenarios: 'decod' is not known"):
        kvtool.verify(Pairs(), scenarios="decod")
    with pytest.raises(UsageError, match="caches: 'dynamik' is not known"):
        kvtool.verify(random_model(), caches="dynamik", **QUICK)


def test_a_function_is_told_from_what_it_builds() -> None:
    with pytest.raises(UsageError, match=r"a function is no decoder.* Call it"):
        kvtool.verify(lambda: Pairs(), **QUICK)
    with pytest.raises(UsageError, match=r"an int is no decoder .*\)$"):
        kvtool.verify(3, **QUICK)


def test_a_run_whose_planted_bug_is_missed_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WrongToken, "feed", TargetSession.feed)
    report = kvtool.verify(Pairs(), **QUICK)
    assert not report.ok
    assert "did not report the bug that was planted" in report.conclusion


def test_the_planted_bug_is_right_in_the_first_step_and_wrong_in_the_next() -> None:
    subject = TargetSubject(Pairs(), "it")
    case = decode_case(VOCAB, 64, tokens=3)
    finding = Judge(subject.with_session(WrongToken)).judge(case)
    assert (finding.verdict, finding.first_wrong) == (BUG, 1)


def test_what_is_beyond_a_decoder_does_not_count_and_what_is_undecided_does() -> None:
    class Rounds:
        """No format but its own, and not quite identical."""

        vocab_size, context = 5, 64

        def full(self, ids: Tensor) -> Tensor:
            return nn.functional.one_hot(ids % 5, 5).float()

        def step(self, ids: Tensor, state: Any) -> Any:
            return self.full(ids) + 1e-7, 1

    report = kvtool.verify(Rounds(), scenarios=["decode", "crop"], tokens=3)
    assert [f.verdict for f in report.findings] == ["undecided", "unsupported"]
    assert report.conclusion.startswith("decode: undecided ")
    assert not report.ok and [c.finding.scenario for c in report.wrong] == ["decode"]


def test_checking_goes_scenario_by_scenario_and_tells_which() -> None:
    subject, told = TargetSubject(Stepper(), "it"), list[str]()
    main = decode_case(VOCAB, 64, tokens=2)
    found = list(check_target(subject, ["decode", "crop"], main, told.append))
    assert told == ["decode", "crop"] == [c.finding.scenario for c in found]
    assert all(line.startswith("  ") for c in found for line in evidence(c.finding, "float32"))
