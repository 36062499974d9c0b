"""Decoders that are right and look wrong, or the other way round."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCAB, WIDTH, HEADS, CONTEXT = 53, 32, 4, 96


def rope(x: Tensor, pos: Tensor, base: float = 10000.0) -> Tensor:
    half = x.shape[-1] // 2
    angle = pos.to(x.dtype)[:, None] * base ** (-torch.arange(half, dtype=x.dtype) / half)
    c, s = angle.cos(), angle.sin()
    p, q = x[..., :half], x[..., half:]
    return torch.cat([p * c - q * s, p * s + q * c], -1)


class Decoder(nn.Module):
    """Two rotary layers; kinds override how keys are rotated, attended to and stored.

    late: positions one too far in every step behind the first.
    """

    vocab_size, context = VOCAB, CONTEXT
    layers = 2

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.late = late
        self.emb = nn.Embedding(VOCAB, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(self.layers))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(self.layers))
        self.head = nn.Linear(WIDTH, VOCAB)

    def rotate(self, x: Tensor, pos: Tensor, step: bool) -> Tensor:
        return rope(x, pos)

    def stored(self, x: Tensor) -> Tensor:
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: Any, pos: Tensor) -> Any:
        step = past is not None
        pos = pos + int(self.late and step)
        q, k = self.rotate(q, pos, step), self.rotate(k, pos, step)
        kept = (self.stored(k), self.stored(v))
        if step:
            k, v = torch.cat([past[0].to(k), k], 2), torch.cat([past[1].to(v), v], 2)
            kept = tuple(torch.cat([a, b], 2) for a, b in zip(past, kept, strict=True))
        return self.softmax(q, k) @ v, kept

    def softmax(self, q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        n, total = scores.shape[-2:]
        mask = torch.ones(n, total, dtype=torch.bool).tril(total - n)
        return scores.masked_fill(~mask, float("-inf")).softmax(-1)

    def forward(self, ids: Tensor, past_key_values: Any = None) -> tuple[Tensor, Any]:
        past = past_key_values
        start = past[0][0].shape[2] if past else 0
        pos = torch.arange(start, start + ids.shape[1])
        x, kept = self.emb(ids), []
        for i in range(self.layers):
            h = nn.functional.layer_norm(x, x.shape[-1:])
            q, k, v = self.qkv[i](h).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            y, kv = self.attend(q, k, v, past[i] if past else None, pos)
            x = x + self.out[i](y.transpose(1, 2).flatten(2))
            kept.append(kv)
        return self.head(x), kept


class ComplexTable(Decoder):
    """Complex rotary tables in a plain attribute; `conjugate` ones in the steps."""

    def __init__(self, conjugate: bool = False) -> None:
        super().__init__()
        self.conjugate = conjugate
        half = WIDTH // HEADS // 2
        angle = torch.outer(torch.arange(CONTEXT).float(), 10000.0 ** (-torch.arange(half) / half))
        self.tables = {"rotary": [torch.polar(torch.ones_like(angle), angle)]}

    def rotate(self, x: Tensor, pos: Tensor, step: bool) -> Tensor:
        table = self.tables["rotary"][0][pos]
        table = table.conj() if step and self.conjugate else table
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * table).flatten(-2).type_as(x)


class RoundedNumber(Decoder):
    """The pass reads a number that was rounded to float32; the step computes it anew."""

    def __init__(self) -> None:
        super().__init__()
        self.number = torch.sqrt(torch.tensor([7.0]))

    def rotate(self, x: Tensor, pos: Tensor, step: bool) -> Tensor:
        return rope(x, pos) * (7.0**0.5 if step else self.number.to(x.dtype))


class Refuses(Decoder):
    """A kernel that knows no float64."""

    def softmax(self, q: Tensor, k: Tensor) -> Tensor:
        assert q.dtype == torch.float32, "expected Float"
        return super().softmax(q, k)


class WrongLow(Decoder):
    """Positions that restart in the steps, in bfloat16 alone."""

    def rotate(self, x: Tensor, pos: Tensor, step: bool) -> Tensor:
        return rope(x, pos - pos[0] if step and x.dtype == torch.bfloat16 else pos)


class Codes(Decoder):
    """A cache of 8-bit codes; the uncached pass rounds nothing."""

    def stored(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round() * scale


class CodesInBoth(Codes):
    """The uncached pass reads the same codes: a value between two may become either."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: Any, pos: Tensor) -> Any:
        q, k = rope(q, pos), self.stored(rope(k, pos + int(self.late and past is not None)))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.softmax(q, k) @ v, (k, v)


class Halves(Decoder):
    """A cache in float16."""

    def stored(self, x: Tensor) -> Tensor:
        return x.half()


class LongBase(Decoder):
    """One layer, whose rotary base grows with the tokens that there are; unrotated keys are kept.

    late: the first key is lost.
    """

    layers = 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: Any, pos: Tensor) -> Any:
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        n = k.shape[2]
        base = 10000.0 * max(n / 16, 1.0)
        rotated = rope(k, torch.arange(n), base)
        if self.late and past is not None:
            rotated = torch.cat([rotated[:, :, :1] * 0, rotated[:, :, 1:]], 2)
        return self.softmax(rope(q, pos, base), rotated) @ v, (k, v)


class LongBases(LongBase):
    """Two layers of that: what the second keeps was computed when there were fewer tokens."""

    layers = 2
