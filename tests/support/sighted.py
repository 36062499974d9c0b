"""A decoder whose cache shows and hides what it is told to, for what is found from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvtool.core.verify.arms import Case
from kvtool.core.verify.finding import Finding
from kvtool.core.verify.judge import Judge
from kvtool.core.verify.scenario_run import ScenarioRun
from kvtool.core.verify.scenarios import Scenario
from kvtool.core.verify.target.doctor import examine
from kvtool.core.verify.target.subject import TargetSubject

VOCAB, WIDTH, HEADS, WINDOW = 23, 24, 3, 6


def steps(*sizes: int, batch: int = 1, padding: list[int] | None = None) -> Case:
    """A case that feeds steps of these sizes."""

    def play(run: ScenarioRun) -> None:
        session = run.open(batch=batch, padding=padding)
        for size in sizes:
            session.feed(size)

    return Case(Scenario("steps", "steps of some sizes", play))


def judged(decoder: Any, case: Case) -> Finding:
    """What the check says of a decoder in a case."""
    return Judge(TargetSubject(decoder, "it"), examine).judge(case)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))


class Sighted(nn.Module):
    """It attends by positions alone, in a window or not; with a past it goes wrong as it is told.

    hides(key, query, past) -> bool mask changes which of the keys (T,) each query (n,1) sees, and
    reads(keys, values, layer, past) the keys and values (B,H,T,D); places(positions) the rotation.
    """

    def __init__(
        self,
        window: int = 0,
        sees: Callable[..., Tensor] | None = None,
        reads: Callable[..., tuple[Tensor, Tensor]] | None = None,
        places: Callable[..., Tensor] | None = None,
        gain: float = 1.0,
        layer: int | None = None,
        n_layers: int = 2,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vocab_size, self.context, self.layer = VOCAB, 128, layer
        self.window, self.sees, self.reads, self.places = window, sees, reads, places
        self.gain = gain
        self.emb, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.layers = nn.ModuleList(Layer() for _ in range(n_layers))

    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        past = 0 if cache is None else cache[0][0].shape[2]
        x, new = self.emb(ids), []
        places = torch.arange(past, past + ids.shape[1])
        if past and self.places is not None:
            places = self.places(places, past)
        for i, layer in enumerate(self.layers):
            h = layer.norm(x)
            q, k, v = (
                f(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (layer.q, layer.k, layer.v)
            )
            q, k = rotated(torch.cat([q, k], 1), places).split(HEADS, dim=1)
            wrong = past and self.layer in (None, i)
            if past:
                k, v = torch.cat([cache[i][0], k], 2), torch.cat([cache[i][1], v], 2)
            new.append((k, v))
            if wrong and self.reads is not None:
                k, v = self.reads(k, v, new, past)
            x = x + layer.o(self.attend(q, k, v, past, bool(wrong)))
        return self.head(x), new

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: int, wrong: bool) -> Tensor:
        key, query = torch.arange(k.shape[2]), past + torch.arange(q.shape[2])[:, None]
        seen = key <= query
        if wrong and self.sees is not None:
            seen = self.sees(key, query, past)
        elif self.window:
            seen = seen & (key > query - self.window)
        scores = (q @ k.mT).masked_fill(~seen, -torch.inf)
        y = scores.softmax(-1) @ v * (self.gain if wrong else 1.0)
        return y.transpose(1, 2).flatten(2)


def rotated(x: Tensor, places: Tensor) -> Tensor:
    """Rotary positions (n,) of (B,H,n,D)."""
    half = x.shape[-1] // 2
    angle = places.to(x.dtype)[:, None] * 10.0 ** -torch.arange(half, dtype=x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
