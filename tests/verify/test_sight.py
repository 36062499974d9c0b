"""What each token can see is found by moving one at a time, and what is wrong with it is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvtool.core.verify.judge import BUG, ROUNDING
from kvtool.core.verify.target.doctor import SEES_RIGHT, UNNAMED
from kvtool.core.verify.target.influence import sight
from kvtool.core.verify.target.picture import picture
from kvtool.core.verify.target.probe import Spot
from kvtool.core.verify.target.subject import TargetSubject
from kvtool.core.verify.target.trace import is_wrong
from kvtool.ui.sight_map import Seen, left_out, sight_plot
from sighted import WINDOW, Sighted, judged, steps

ONES, MIXED = (7, 1, 1, 1), (7, 3, 1, 4, 1)


def window(key: Tensor, query: Tensor, width: int) -> Tensor:
    return (key <= query) & (key > query - width)


SIGHTS: dict[str, tuple[int, Any, tuple[int, ...]]] = {
    "the window is one token too wide: 7 tokens, not 6": (
        WINDOW, lambda k, q, p: window(k, q, 7), MIXED),
    "the window is one token too narrow: 5 tokens, not 6": (
        WINDOW, lambda k, q, p: window(k, q, 5), ONES),
    "the window of 6 tokens is dropped: up to 10 are seen": (
        WINDOW, lambda k, q, p: k <= q, ONES),
    "the window is 3 tokens wide through the cache, and 6 without it": (
        WINDOW, lambda k, q, p: window(k, q, 3), MIXED),
    "the window is 4 tokens wide through the cache, and 16 or more without it": (
        0, lambda k, q, p: window(k, q, 4), MIXED),
    "the causal mask is aligned top-left": (0, lambda k, q, p: k <= q - p, MIXED),
    "they see each other": (0, lambda k, q, p: k <= q.max(), MIXED),
    "the first token is lost": (0, lambda k, q, p: (k <= q) & (k > 0), MIXED),
    "the token before the step is lost": (0, lambda k, q, p: (k <= q) & (k != p - 1), MIXED),
    "the past is not read": (0, lambda k, q, p: (k <= q) & (k >= p), MIXED),
    "the tokens of a step do not see each other": (0, lambda k, q, p: (k < p) | (k == q), MIXED),
    "tokens after it are forgotten": (
        0, lambda k, q, p: (k <= q) & ((k < 7) | (k >= p)), MIXED),
    "a step of several tokens is stored before it is read": (
        WINDOW, lambda k, q, p: window(k, q, WINDOW) & (k > q.max() - WINDOW), MIXED),
    "the slots after the newest are taken for empty": (
        WINDOW, lambda k, q, p: window(k, q, WINDOW) & ((k % 6 <= q % 6) | (k == q)), ONES),
}  # fmt: skip


@pytest.mark.parametrize(  # all layers wrong, or the second alone, in turns
    ("words", "layer"), [(words, (None, 1)[i % 2]) for i, words in enumerate(SIGHTS)]
)
def test_what_a_cache_shows_or_hides_is_named(words: str, layer: int | None) -> None:
    width, sees, sizes = SIGHTS[words]
    finding = judged(Sighted(width, sees, layer=layer), steps(*sizes))
    assert finding.verdict == BUG
    assert finding.diagnosis.layer == (layer or 0)
    assert words in finding.diagnosis.hint


def test_a_window_is_not_called_dropped_where_it_may_be_one_too_wide() -> None:
    finding = judged(Sighted(WINDOW, lambda k, q, p: k <= q), steps(6, 1))
    assert len(finding.diagnosis.bugs) == 2
    assert "one token too wide" in finding.diagnosis.hint and "dropped" in finding.diagnosis.hint


def test_one_wrong_token_may_have_lost_the_first_or_see_through_a_window() -> None:
    finding = judged(Sighted(0, lambda k, q, p: (k <= q) & (k > 0)), steps(7, 1))
    assert finding.diagnosis.bugs == (
        "the window is 7 tokens wide through the cache, and 8 or more without it",
        "the first token is lost (after the first step)",
    )


def test_a_bug_of_some_steps_is_named_with_them() -> None:
    def sees(key: Tensor, query: Tensor, past: int) -> Tensor:
        return key <= query - past if len(query) == 3 else key <= query

    finding = judged(Sighted(0, sees), steps(7, 1, 3, 4, 1))
    assert "top-left" in finding.diagnosis.hint
    assert finding.diagnosis.hint.endswith("(in steps of 3 tokens alone)")


def test_what_no_rule_explains_is_described_as_it_is_seen() -> None:
    finding = judged(Sighted(0, lambda k, q, p: (k <= q) & (k % 3 != 1)), steps(*ONES))
    assert finding.diagnosis.bugs == ("token 7 does not see tokens 1, 4",)


@torch.inference_mode()
def test_a_map_of_one_layer_shows_the_window_and_not_what_reaches_further() -> None:
    subject = TargetSubject(Sighted(WINDOW), "it").to(torch.float64)
    direct = judged_spot(Sighted(WINDOW, lambda k, q, p: k <= q))
    seen = sight(subject, steps(*ONES), 1, 3, direct)
    assert seen is not None and not seen.differs
    key, query = torch.arange(10), torch.arange(10)[:, None]
    assert torch.equal(seen.uncached[0], window(key, query, WINDOW))
    reached = sight(subject, steps(*ONES), 1, 3, Spot())
    assert reached is not None and torch.equal(reached.cached[0], window(key, query, 11))


@torch.inference_mode()
def judged_spot(decoder: nn.Module) -> Spot:
    from kvtool.core.verify.target.doctor import locate
    from kvtool.core.verify.target.spots import spots

    subject = TargetSubject(decoder, "it").to(torch.float64)
    located = locate(subject, steps(*ONES), 1)
    assert located is not None
    return next(spots(subject, located[0]))


def test_rows_that_read_each_other_are_told() -> None:
    def reads(keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return keys.mean(0, keepdim=True).expand_as(keys), values

    finding = judged(Sighted(0, reads=reads), steps(*MIXED, batch=3))
    assert "rows read each other: what rows 0-2 were fed changes rows 0-2" in finding.diagnosis.hint


# What is read


def negated(keys: Tensor, values: Tensor, new: Any, past: int) -> tuple[Tensor, Tensor]:
    return keys, torch.cat([values[:, :, :past], -values[:, :, past:]], dim=2)


READS: dict[str, Any] = {
    "the values that are read of token 8 are negated": negated,
    "the keys that are read of the past are zero": lambda k, v, new, p: (
        torch.cat([0 * k[:, :, :p], k[:, :, p:]], 2), v),
    "the values that are read of the past are the keys": lambda k, v, new, p: (
        k, torch.cat([k[:, :, :p], v[:, :, p:]], 2)),
    "the values that are read of token 3 are those of the token before each": lambda k, v, new, p: (
        k, v[:, :, [0, 1, 2, 2, *range(4, v.shape[2])]]),
    "head 1 reads those of head 2, head 2 reads those of head 1": lambda k, v, new, p: (
        k, v[:, [0, 2, 1]]),
    "the keys that are read of the past are multiplied by 2": lambda k, v, new, p: (
        torch.cat([2 * k[:, :, :p], k[:, :, p:]], 2), v),
}  # fmt: skip


@pytest.mark.parametrize("words", READS)
def test_what_is_read_in_place_of_what_was_stored_is_told(words: str) -> None:
    finding = judged(Sighted(reads=READS[words], layer=1), steps(*ONES))
    assert finding.diagnosis.layer == 1
    assert words in finding.diagnosis.hint


def test_values_of_another_layer_are_told() -> None:
    def reads(keys: Tensor, values: Tensor, new: Any, past: int) -> tuple[Tensor, Tensor]:
        return keys, new[0][1]

    finding = judged(Sighted(reads=reads), steps(*ONES))
    assert "are those of layer 0" in finding.diagnosis.hint


# Positions

PLACES: dict[str, Any] = {
    "positions after the first step are one too high": lambda at, past: at + 1,
    "positions after the first step are one too low": lambda at, past: at - 1,
    "positions start at 0 again in each step": lambda at, past: at - past,
    "all tokens of a step after the first get the position": lambda at, past: 0 * at + past,
    "positions are 3 too low after the first step": lambda at, past: at - 3,
    "the number of keys held, not of tokens seen: 8 at most": lambda at, past: (
        at - past + min(past, 8)),
}  # fmt: skip


@pytest.mark.parametrize("words", PLACES)
def test_rotary_positions_are_named_with_the_line_that_makes_them(words: str) -> None:
    finding = judged(Sighted(places=PLACES[words]), steps(*MIXED))
    assert words in finding.diagnosis.hint
    assert re.search(r"\((test_sight|sighted)\.py:\d+; nothing else", finding.diagnosis.hint)


def test_wrong_positions_beside_another_bug_are_not_named() -> None:
    decoder = Sighted(places=lambda at, past: at + 1, gain=0.5)
    assert "positions" not in "".join(judged(decoder, steps(*ONES)).diagnosis.bugs)


def test_what_cannot_be_told_is_said_not_to_be() -> None:
    finding = judged(Sighted(gain=0.5), steps(*ONES))
    assert (finding.verdict, finding.diagnosis.bugs) == (BUG, ())
    assert finding.diagnosis.hint == f"{UNNAMED}; {SEES_RIGHT}"


# Where


class Masked(Sighted):
    """A mask of 0 and large negative numbers is given to a module; a later value is negated."""

    low = -torch.inf  # of the pass

    def __init__(self) -> None:
        super().__init__(reads=negated, layer=1)
        self.hide = Hide()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: int, wrong: bool) -> Tensor:
        seen = torch.ones(q.shape[2], k.shape[2]).tril(past)
        mask = (1 - seen).masked_fill(seen == 0, -torch.inf if past else self.low)
        return super().attend(self.hide(q, mask.to(q.dtype)), k, v, past, wrong)


class Hide(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("low", [-torch.inf, -1e9, 1.0])
def test_a_mask_that_changes_nothing_is_not_what_is_wrong(low: float) -> None:
    decoder = Masked()
    decoder.low = low
    finding = judged(decoder, steps(*MIXED))
    assert finding.diagnosis.layer == 1
    assert "layers.1.o: its input is wrong" in finding.diagnosis.place


def test_masks_differ_where_another_key_is_hidden_alone() -> None:
    inf = torch.inf
    mask = torch.tensor([0.0, -inf, 0.0, -inf], dtype=torch.float64)
    assert not is_wrong(mask, mask.clamp(min=-1e9))
    assert not is_wrong(mask, mask)
    assert is_wrong(mask, mask.roll(1))
    biased = torch.tensor([0.5, -inf, 0.25, -inf], dtype=torch.float64)
    assert not is_wrong(biased, biased.clone())
    assert is_wrong(biased, biased + torch.tensor([0.0, 0.0, 1e-3, 0.0]))


class InModule(nn.Module):
    """The module keeps its cache itself, as meta-llama's does."""

    def __init__(self, **bug: Any) -> None:
        super().__init__()
        self.inner, self.held, self.on = Sighted(**bug), None, False
        self.vocab_size, self.context = self.inner.vocab_size, self.inner.context

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        self.on, self.held = True, None

    def forward(self, ids: Tensor, start_pos: int = 0) -> Tensor:
        logits, held = self.inner(ids, self.held if self.on and start_pos else None)
        self.held = held if self.on else None
        return logits


def test_the_copy_of_a_module_that_runs_is_watched() -> None:
    decoder = InModule(reads=negated, layer=1)
    finding = judged(decoder, steps(*ONES))
    assert finding.diagnosis.layer == 1
    assert "inner.layers.1.o: its input is wrong" in finding.diagnosis.place
    assert "negated" in finding.diagnosis.hint


# The picture


def test_a_right_decoder_has_a_picture_without_marks() -> None:
    decoder = Sighted(WINDOW)
    assert judged(decoder, steps(*MIXED)).verdict == ROUNDING
    seen = picture(TargetSubject(decoder, "it"), steps(*MIXED), None)
    assert seen is not None and seen.cached == seen.uncached
    assert [sum(row) for row in seen.cached[-3:]] == [WINDOW] * 3


def test_a_picture_marks_what_is_hidden_and_what_is_shown_wrongly(tmp_path: Path) -> None:
    case = steps(*MIXED)
    subject = TargetSubject(Sighted(0, lambda k, q, p: k <= q - p), "it")
    seen = picture(subject, case, 1)
    assert seen is not None
    assert seen.cached[7] == [1, 2, 2, 2, 2, 2, 2, 1, *[0] * (len(seen.keys) - 8)]
    subject = TargetSubject(Sighted(0, lambda k, q, p: k <= q.max()), "it")
    seen = picture(subject, case, 1)
    assert seen is not None and seen.cached[7][7:11] == [1, 3, 3, 0]
    path = tmp_path / "seen.png"
    sight_plot(path, Seen(*seen[1:7]), {"it": {"float64": [0.0, 0.5]}}, "What each token sees")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_map_says_where_tokens_are_left_out() -> None:
    assert left_out([0, 1, 2]) == []
    assert left_out([0, 1, 5, 6, 9]) == [2, 4]
    assert left_out([7, 8]) == [0]  # those before it
