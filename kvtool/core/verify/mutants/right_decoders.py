"""Decoders of users that are right and look suspicious, each tried where the like goes wrong."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvtool.core.verify.mutants.batches import holes
from kvtool.core.verify.mutants.mutant import Lookalike
from kvtool.core.verify.mutants.requests import END, Remembers, with_meaning
from kvtool.core.verify.mutants.user_decoder import Decoder, Fed, Flaw, Pair, UserCache, flawed


class RowByRow(Decoder):
    """Reads the rows of a step one after the other."""

    def run(self, ids: Tensor, state: UserCache, flaw: Flaw) -> tuple[Tensor, UserCache]:
        done = [
            super(RowByRow, self).run(ids[row], super(RowByRow, self).select(state, row), flaw)
            for row in torch.arange(len(ids), device=ids.device).split(1)
        ]
        layers = [
            (torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs]))
            for pairs in zip(*(held.layers for _, held in done), strict=True)
        ]
        logits = torch.cat([found for found, _ in done])
        return logits, replace(state, layers=layers, n=done[0][1].n)


class ReversesRows(Decoder):
    """Stores the rows of a batch from the last to the first."""

    def run(self, ids: Tensor, state: UserCache, flaw: Flaw) -> tuple[Tensor, UserCache]:
        turned = replace(state, padding=None if state.padding is None else state.padding.flip(0))
        logits, held = super().run(ids.flip(0), turned, flaw)
        return logits.flip(0), replace(held, padding=state.padding)

    def select(self, state: UserCache, rows: Tensor) -> UserCache:
        batch = len(state.layers[0][0])
        turned = super().select(state, batch - 1 - rows.flip(0))
        return replace(turned, padding=None if state.padding is None else state.padding[rows])


class InPieces(Decoder):
    """Reads a step of more than `size` tokens in pieces."""

    size = 16

    def run(self, ids: Tensor, state: UserCache, flaw: Flaw) -> tuple[Tensor, UserCache]:
        answers = []
        for piece in ids.split(self.size, dim=1):
            logits, state = super().run(piece, state, flaw)
            answers.append(logits)
        return torch.cat(answers, dim=1), state


class TokenByToken(InPieces):
    """Reads a draft one token at a time."""

    size = 1


class SavesBytes(Decoder):
    """What is saved is a file."""

    def get_state(self, state: UserCache) -> Any:
        file = io.BytesIO()
        torch.save((state.layers, state.n, state.padding), file)
        return file.getvalue()

    def set_state(self, state: UserCache, saved: Any) -> UserCache:
        return UserCache(*torch.load(io.BytesIO(saved), weights_only=True))


class OneIdForTwo(Decoder):
    """Takes an id with a meaning for another one, cached or not."""

    def run(self, ids: Tensor, state: UserCache, flaw: Flaw) -> tuple[Tensor, UserCache]:
        return super().run(ids.masked_fill(ids == END, 0), state, flaw)


class LastPlaceForAll(Decoder):
    """All tokens beyond the 300th stand at one place, cached or not."""

    def run(self, ids: Tensor, state: UserCache, flaw: Flaw) -> tuple[Tensor, UserCache]:
        return super().run(ids, state, flawed(places=lambda right, fed: right.clamp(max=299)))


def large_in_holes(pair: Pair, layer: int, fed: Fed) -> Pair:
    """Large numbers stand where there is padding behind a prompt."""
    padding = holes(fed)[:, fed.past :][:, None, :, None]
    return pair[0].masked_fill(padding, 1e3), pair[1].masked_fill(padding, 1e3)


RIGHT_DECODERS = (
    Lookalike(
        "rows that are read one by one", decoder=RowByRow, scenarios=("rows", "padded-rows"),
        why="no row needs another",
    ),
    Lookalike(
        "rows from the last to the first", decoder=ReversesRows,
        scenarios=("leaving", "padded-rows"), why="where a row is stored does not matter",
    ),
    Lookalike(
        "large numbers in padding after a prompt",
        decoder=lambda: Decoder(flawed(stored=large_in_holes)), scenarios=("right-padded",),
        why="padding is masked",
    ),
    Lookalike(
        "a cache that is saved as a file", decoder=SavesBytes, scenarios=("saved",),
        why="what is loaded is what was saved",
    ),
    Lookalike(
        "a known prefix is read again", decoder=lambda: Decoder(Remembers(0)),
        scenarios=("second-request",), why="the same tokens have the same keys and values",
    ),
    Lookalike(
        "one id is taken for another", decoder=lambda: with_meaning(OneIdForTwo()),
        scenarios=("ids",), why="it is so without the cache too",
    ),
    Lookalike(
        "a prompt in pieces of 16", decoder=InPieces, scenarios=("prompts", "steps"),
        why="a piece sees those before it",
    ),
    Lookalike(
        "a draft token by token", decoder=TokenByToken, scenarios=("steps",),
        why="a token sees those before it",
    ),
    Lookalike(
        "a window of 64", decoder=lambda: Decoder(window=64), scenarios=("boundaries",),
        why="it is compared under the same window",
    ),
    Lookalike(
        "chunks of 96", decoder=lambda: Decoder(chunk=96), scenarios=("boundaries",),
        why="it is compared under the same chunks",
    ),
    Lookalike(
        "places that end at 300",
        decoder=lambda: LastPlaceForAll(context=420), scenarios=("long",),
        why="it is so without the cache too",
    ),
)  # fmt: skip
