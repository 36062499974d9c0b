"""Bug or rounding: right caches are called right, and planted bugs of many kinds are found."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtool.core import engine, verify
from kvtool.core.cache import Cache, Step, base, cache_class
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.models import Model
from kvtool.core.verify import BUG, IDENTICAL, ROUNDING, VACUOUS, Check
from kvtool.errors import CapacityError, CheckFailed
from kvtool.registry import CACHES
from planted_bugs import (
    MUTANTS,
    NaNBehind,
    NaNBelowFloat64,
    WrapsSilently,
    WrongBelowFloat64,
    moved,
)
from small_models import random_model

N_NEW = 9
PROMPT = [5, 9, 2, 6, 5, 3, 5]
MODELS: dict[str, dict[str, Any]] = {
    "sinusoidal": {},
    "learned, untied": {"positions": "learned", "tied": False, "bias": False},
    "rotary, two heads share": {"positions": "rotary", "n_kv_heads": 2, "norm": "rmsnorm"},
    "rotary, all heads share": {"positions": "rotary", "n_kv_heads": 1, "activation": "swiglu"},
    "seq2seq": {"n_encoder_layers": 1, "source_vocab_size": 23},
    "seq2seq, rotary": {
        "n_encoder_layers": 1,
        "source_vocab_size": 23,
        "positions": "rotary",
        "n_kv_heads": 2,
    },
}
STORING = [kind for kind in CACHES if not cache_class(kind).recompute]


def check(model: Model, n_new: int = N_NEW, prompt: list[int] = PROMPT) -> Check:
    return Check(model, torch.tensor([prompt]), n_new)


@pytest.fixture(scope="module", params=MODELS)
def checked(request: pytest.FixtureRequest) -> Check:
    return check(random_model(**MODELS[request.param]))


# Right caches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_right_cache_differs_by_rounding_at_most(name: str, dtype: torch.dtype) -> None:
    one = check(random_model(dtype=dtype, **MODELS[name]))
    for kind in STORING:
        verdict = one.judge(kind)
        assert verdict.right and verdict.verdict in (IDENTICAL, ROUNDING)
        assert verdict.first_wrong is None
        assert verdict.working.steps == N_NEW
        assert verdict.working.relative <= 16 * torch.finfo(dtype).eps
        assert verdict.float64.relative < 1e-14


@pytest.mark.parametrize("kind", STORING)
def test_a_prompt_of_one_token_and_one_beyond_the_first_buffer_are_right_too(kind: str) -> None:
    model = random_model(context=160)
    assert check(model, 66, [3]).judge(kind).right
    assert check(model, 66, list(range(23)) * 3).judge(kind).right


def test_identical_means_that_every_step_is_equal_bit_for_bit(checked: Check) -> None:
    class Recomputing(DynamicCache):
        """Right to the last bit: it stores nothing, and is fed everything again."""

        recompute = True

        def begin(self, n_new: int) -> Step:
            self.length = 0
            return super().begin(n_new)

        def commit(self, n_new: int) -> None:
            self.length = n_new

    verdict = checked.judge("recomputing", lambda spec: Recomputing(spec))
    assert verdict.verdict == IDENTICAL
    assert (verdict.working.identical, verdict.working.first) == (N_NEW, None)
    assert verdict.working.ulps == verdict.working.relative == 0


def test_no_cache_proves_nothing(checked: Check) -> None:
    verdict = checked.judge("none")
    assert verdict.verdict == VACUOUS and not verdict.right
    assert verdict.working.identical == N_NEW


def test_a_single_step_proves_nothing_because_no_cache_is_read() -> None:
    assert check(random_model(), n_new=1).judge("dynamic").verdict == VACUOUS


# Planted bugs


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_found_at_the_first_step_that_it_touches(
    checked: Check, name: str
) -> None:
    n_start = 1 if checked.model.config.n_encoder_layers else len(PROMPT)
    mutant, held = MUTANTS[name]
    verdict = checked.judge(name, mutant)
    assert verdict.verdict == BUG and not verdict.right
    assert verdict.first_wrong == (max(1, held + 1 - n_start) if held else 0)


def test_the_control_is_found_in_every_model(checked: Check) -> None:
    verdict = checked.control()
    assert verdict.verdict == BUG
    assert verdict.first_wrong == 1


@pytest.mark.parametrize("name", ["rotary, two heads share", "seq2seq, rotary"])
def test_keys_rotated_again_when_read_are_found(name: str) -> None:
    model = random_model(**MODELS[name])
    rotary = (model.decoder if model.config.n_encoder_layers else model).rotary

    class RotatedAgain(DynamicCache):
        def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            keys, values = super().write(layer, k, v, step)
            return (rotary(keys, step.k_pos) if self.length else keys), values

    verdict = check(model).judge("rotated again", RotatedAgain)
    assert (verdict.verdict, verdict.first_wrong) == (BUG, 1)


def test_a_uniform_shift_of_rotary_positions_is_no_bug() -> None:
    one = check(random_model(**MODELS["rotary, two heads share"]))
    assert one.judge("shifted", moved(lambda cache, start: 5)).verdict == ROUNDING


@pytest.mark.parametrize("step", [1, 4, N_NEW - 1])
def test_a_bug_that_starts_late_is_dated_to_its_step(step: int) -> None:
    late = len(PROMPT) + step - 1
    verdict = check(random_model()).judge("late", moved(lambda _, start: int(start >= late)))
    assert (verdict.verdict, verdict.first_wrong) == (BUG, step)


@pytest.mark.parametrize("kept", [slice(1, None), slice(0, 0)], ids=["shifted", "not copied"])
def test_growing_that_copies_garbage_is_found_where_the_buffer_grew(kept: slice) -> None:
    class GrowsWrong(DynamicCache):
        def _reserve(self, length: int) -> None:
            old = [(k.clone(), v.clone()) for k, v in zip(self._keys, self._values, strict=True)]
            columns = self._columns
            super()._reserve(length)
            if self._columns != columns:
                for layer, (k, _) in enumerate(old):
                    part = k[:, :, kept]
                    self._keys[layer][:, :, :columns] = 0.0
                    self._keys[layer][:, :, : part.shape[2]] = part

    verdict = check(random_model(context=160), 64).judge("grows wrong", GrowsWrong)
    assert (verdict.verdict, verdict.first_wrong) == (BUG, 64 - len(PROMPT) + 1)


def test_a_full_cache_that_wraps_silently_is_found() -> None:
    verdict = check(random_model()).judge("wraps", WrapsSilently)
    assert (verdict.verdict, verdict.first_wrong) == (BUG, 12 - len(PROMPT) + 1)


def test_a_bug_in_the_prompt_alone_is_found_at_step_0() -> None:
    class WrongPrompt(DynamicCache):
        def _place(self, start: int, n_new: int) -> Step:
            step = super()._place(start, n_new)
            return step if start else dataclasses.replace(step, causal=False)

    verdict = check(random_model()).judge("not causal", WrongPrompt)
    assert (verdict.verdict, verdict.first_wrong) == (BUG, 0)


def test_a_gap_that_is_not_a_number_counts_as_infinite(checked: Check) -> None:
    verdict = checked.judge("NaN behind the end", NaNBehind)
    assert verdict.working.relative == verdict.float64.relative == float("inf")


# A cache may be wrong in the working format alone: other kernels serve it there


@pytest.mark.parametrize("mutant", [WrongBelowFloat64, NaNBelowFloat64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bug_in_the_working_format_alone_is_not_called_rounding(
    mutant: type[Cache], dtype: torch.dtype
) -> None:
    verdict = check(random_model(dtype=dtype)).judge("low", mutant)
    assert verdict.verdict == BUG
    assert verdict.first_wrong == 10 - len(PROMPT) + 1
    assert verdict.float64.relative < 1e-14


# The two arms


def test_both_arms_are_fed_the_same_ids_in_both_precisions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fed: dict[torch.dtype, list[list[int]]] = {torch.float32: [], torch.float64: []}
    model = random_model()
    forward = type(model).forward

    def record(self: Model, tokens: Tensor, step: Step | None = None, *rest: Any, **named: Any):
        fed[next(self.parameters()).dtype].append([step is not None, *tokens[0].tolist()])
        return forward(self, tokens, step, *rest, **named)

    monkeypatch.setattr(type(model), "forward", record)
    one = check(model)
    one.judge("dynamic")
    ids = one.ids[0].tolist()
    ends = range(len(PROMPT), len(PROMPT) + N_NEW)
    assert ids[: len(PROMPT)] == PROMPT and len(ids) == len(PROMPT) + N_NEW
    for runs in fed.values():
        assert [run[1:] for run in runs if not run[0]] == [ids[:end] for end in ends]
        with_cache = [token for run in runs if run[0] for token in run[1:]]
        assert with_cache == ids[:-1]


@pytest.mark.parametrize("name", ["sinusoidal", "seq2seq"])
def test_the_uncached_arm_touches_no_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a cache was touched")

    model = random_model(**MODELS[name])
    prompt = torch.tensor([PROMPT])
    expected, ids = verify.uncached(model, prompt, N_NEW)
    for method in ("__init__", "begin", "write", "attend", "commit"):
        monkeypatch.setattr(base.Cache, method, refuse)
    monkeypatch.setattr(verify, "cache_class", refuse)
    monkeypatch.setattr(engine, "feed", refuse)
    found, again = verify.uncached(model, prompt, N_NEW)
    assert torch.equal(ids, again)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_uncached_tokens_are_the_likeliest_after_the_whole_sequence() -> None:
    model = random_model()
    logits, ids = verify.uncached(model, torch.tensor([PROMPT]), 4)
    assert [len(step) for step in logits] == [len(PROMPT), 1, 1, 1]
    with torch.no_grad():
        for end in range(len(PROMPT), len(PROMPT) + 4):
            whole = model(ids[:, :end].clone())[0]
            assert ids[0, end] == whole[-1].argmax()
            assert torch.allclose(
                logits[end - len(PROMPT)], whole[-len(logits[end - len(PROMPT)]) :]
            )


def test_given_ids_are_fed_instead_of_the_likeliest() -> None:
    ids = torch.tensor([[*PROMPT, 1, 1, 1]])
    _, used = verify.uncached(random_model(), torch.tensor([PROMPT]), 3, ids)
    assert torch.equal(used, ids)


def test_a_prompt_and_tokens_beyond_the_context_are_refused_before_any_work() -> None:
    with pytest.raises(CapacityError, match="60 more were asked for"):
        check(random_model(), 60)


def test_logits_that_are_not_finite_fail_the_check_naming_the_step() -> None:
    model = random_model(positions="learned", tied=False)
    with torch.no_grad():
        model.embed.positions.weight[len(PROMPT) + 2] = float("nan")
    with pytest.raises(CheckFailed, match="step 3: the logits are not finite"):
        check(model)


# The measures


def test_ulps_count_the_spacing_at_the_largest_logit_of_the_step() -> None:
    expected = [torch.tensor([[4.0, 1.0]]), torch.tensor([[1.0, 0.5]])]
    found = [torch.tensor([[4.0, 1.0]]), torch.tensor([[1.0, 0.5 + 2.0**-20]])]
    gap = verify.compare(found, expected)
    assert (gap.steps, gap.identical, gap.first) == (2, 1, 1)
    assert verify.distances(found, expected) == [0.0, gap.relative] == [0.0, 2.0**-22]
    assert gap.ulps == 2.0**-20 / 2.0**-23


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
    assert verify.spacing(value, dtype) == expected
