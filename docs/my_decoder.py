"""A decoder with learned positions and a KV cache, to try the check of your own decoder on:

    kvtool verify-cache --target docs/my_decoder.py:build

It holds one slip on purpose: with a cache, every token after the prompt stands one too far.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cache = list[tuple[Tensor, Tensor]]  # of each layer the keys and values (B,H,S,D)


class Attention(nn.Module):
    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        n, total = q.shape[2], k.shape[2]
        mask = torch.ones(n, total, dtype=torch.bool).tril(diagonal=total - n)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2)), k, v


class Block(nn.Module):
    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = Attention(d_model, n_heads)
        self.up, self.down = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        y, k, v = self.attention(self.norm1(x), past)
        x = x + y
        return x + self.down(F.gelu(self.up(self.norm2(x)))), k, v


class Decoder(nn.Module):
    def __init__(self, vocab_size=97, context=128, d_model=64, n_heads=4, n_layers=3) -> None:
        super().__init__()
        self.vocab_size, self.context = vocab_size, context
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.pos_embedding = nn.Embedding(context + 1, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads) for _ in range(n_layers))
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, vocab_size)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        past = cache[0][0].shape[2] + 1 if cache else 0  # the slip: it counts the new token too
        x = self.tokens(ids) + self.pos_embedding(torch.arange(past, past + ids.shape[1]))
        new = []
        for i, block in enumerate(self.blocks):
            x, k, v = block(x, cache[i] if cache else None)
            new.append((k, v))
        return self.head(self.norm(x)), new


def build() -> Decoder:
    torch.manual_seed(0)
    return Decoder()
