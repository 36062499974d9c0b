"""Where wrong keys and queries stand is found by passes over one id, and by what rotation keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvtool.core.verify.target import doctor
from kvtool.core.verify.target.operands import WEIGHTS
from sighted import HEADS, WIDTH, Sighted, judged, rotated, steps

ONES, MIXED = (6, 1, 1, 1), (7, 3, 1, 4, 1)


def with_past(change: Any) -> Any:
    """What is read where `change` is made to the keys of the past."""
    return lambda k, v, new, p: (torch.cat([change(k[:, :, :p]), k[:, :, p:]], 2), v)


def of_step(change: Any) -> Any:
    return lambda k, v, new, p: (torch.cat([k[:, :, :p], change(k[:, :, p:], p)], 2), v)


def places(x: Tensor, past: int = 0) -> Tensor:
    return past + torch.arange(x.shape[2])


READS: dict[str, Any] = {
    "the keys that are read of tokens 1-5 are rotated twice: they stand at twice their positions": (
        with_past(lambda k: rotated(k, places(k)))),
    "the keys that are read of token 6 are rotated backwards: by minus their positions": (
        of_step(lambda k, p: rotated(k, -2 * places(k, p)))),
    "the keys that are read of token 6 stand as if the step began at position 0": (
        of_step(lambda k, p: rotated(k, 0 * places(k) - p))),
    "the keys that are read of the past stand at positions 2-7, 2 too far": (
        with_past(lambda k: rotated(k, 0 * places(k) + 2))),
    "the keys that are read of the past are the values, rotated": lambda k, v, new, p: (
        torch.cat([rotated(v[:, :, :p], places(v[:, :, :p])), k[:, :, p:]], 2), v),
}  # fmt: skip


@pytest.mark.parametrize("words", READS)
def test_where_wrong_keys_stand_is_told(words: str) -> None:
    diagnosis = judged(Sighted(reads=READS[words]), steps(*ONES)).diagnosis
    assert diagnosis.bugs == (words,)


def test_keys_of_a_later_layer_are_known_by_what_rotation_keeps() -> None:
    reads = with_past(lambda k: rotated(k, places(k)))
    diagnosis = judged(Sighted(reads=reads, layer=1), steps(*ONES)).diagnosis
    assert "are rotated otherwise: they stand at other positions" in diagnosis.hint


def test_keys_of_which_channels_are_exchanged_are_not_called_rotated() -> None:
    reads = with_past(lambda k: k[..., torch.tensor([3, 0, 5, 1, 7, 2, 4, 6])])
    diagnosis = judged(Sighted(reads=reads), steps(*ONES)).diagnosis
    assert diagnosis.bugs == () and "are wrong" in diagnosis.hint


class LostQueries(Sighted):
    """Queries of a step stand as if it began at position 0."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: int, wrong: bool) -> Tensor:
        q = rotated(q, 0 * places(q) - past) if past else q
        return super().attend(q, k, v, past, wrong)


def test_queries_that_stand_elsewhere_than_their_keys_are_told() -> None:
    words = "the queries of token 6 stand as if the step began at position 0, and their keys do not"
    assert judged(LostQueries(), steps(*ONES)).diagnosis.bugs == (words,)


class Fused(Sighted):
    """Fused attention, whose scores are scaled otherwise with a past."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: int, wrong: bool) -> Tensor:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(past)
        scale = 0.5 if past else 1.0
        fused = nn.functional.scaled_dot_product_attention
        return fused(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)


def test_another_scale_of_fused_attention_is_told() -> None:
    assert judged(Fused(), steps(*ONES)).diagnosis.bugs == (WEIGHTS,)


class LongerPast(Sighted):
    """The past is stored with two empty slots, and seen with them."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: int, wrong: bool) -> Tensor:
        if past:
            k, v = (nn.functional.pad(t, (0, 0, 2, 0)) for t in (k, v))
        return super().attend(q, k, v, past + 2 if past else 0, wrong)


def test_slots_that_no_token_is_stored_in_are_counted() -> None:
    hint = judged(LongerPast(), steps(*ONES)).diagnosis.bugs
    assert hint == ("attention reads 2 slots more than there are tokens",)


class NormedHeads(Sighted):
    """A module norms each head, so that its answers (B,H,n,D) count heads before tokens."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH // HEADS) for _ in range(2))
        self.turn = 0

    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        self.turn = 0
        return super().forward(ids, cache)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: int, wrong: bool) -> Tensor:
        norm, self.turn = self.norms[self.turn], self.turn + 1
        return super().attend(norm(q), k, v, past, wrong)


def test_as_many_tokens_as_heads_are_not_taken_for_them() -> None:
    """Where heads were moved for tokens, tokens of a step would seem to see each other."""
    decoder = NormedHeads(reads=with_past(lambda k: 2 * k))
    diagnosis = judged(decoder, steps(7, HEADS, HEADS)).diagnosis
    assert diagnosis.bugs == ("the keys that are read of the past are multiplied by 2",)


class TwoTables(Sighted):
    """Cosines and sines are cut from tables by two lines, each at the wrong place."""

    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        self.low = 0 if cache is None else 2
        return super().forward(ids, cache)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: int, wrong: bool) -> Tensor:
        table = torch.arange(128).to(q.dtype)[:, None] * torch.linspace(1, 2, 8)
        begin = past - self.low
        cosines = table.cos()[begin : begin + q.shape[2]]
        sines = table.sin()[begin : begin + q.shape[2]]
        return super().attend(q * cosines + q.flip(-1) * sines, k, v, past, wrong)


def test_positions_of_which_two_lines_make_use_are_told() -> None:
    hint = judged(TwoTables(), steps(*MIXED)).diagnosis.hint
    assert "2 too low" in hint and "test_standing.py" in hint


def test_where_it_is_not_known_what_tokens_see_a_mask_may_be_wrong_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "sight", lambda *given: None)
    diagnosis = judged(Fused(), steps(*ONES)).diagnosis
    assert diagnosis.bugs == () and "the mask, the scale" in diagnosis.hint


def test_what_is_seen_through_all_layers_clears_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    sight = doctor.sight

    def through_all_layers(*given: Any) -> Any:
        return (seen := sight(*given)) and replace(seen, direct=False)

    monkeypatch.setattr(doctor, "sight", through_all_layers)
    diagnosis = judged(Fused(), steps(*ONES)).diagnosis
    assert diagnosis.bugs == () and "the mask, the scale" in diagnosis.hint
