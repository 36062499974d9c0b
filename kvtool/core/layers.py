"""Norms, linear layers, feed-forward networks and positions: all that works token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.config import ModelConfig

LARGE = 2**19  # weights of a layer; sharing smaller ones among threads gains nothing


class Plain(nn.Module):
    """A module that is called without detours where none of its own hooks asks for one.

    What nn.Module looks for at every call would take as long as a small layer. For what works token
    by token; hooks on all modules of a process are not looked for.
    """

    def __call__(self, *args: Any) -> Any:
        if (
            self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
        ):
            return super().__call__(*args)
        return self.forward(*args)


class Linear(Plain, nn.Linear):
    """nn.Linear, initialised at std 1/sqrt(in)."""

    def reset_parameters(self) -> None:
        # Smaller weights hide cache bugs: attention is then nearly uniform whatever the positions.
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == self.in_features and self._shared_by_threads():
            return by_threads(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def _shared_by_threads(self) -> bool:
        """Whether several threads should take parts of the weights, for one token."""
        return (
            self.weight.numel() >= LARGE
            and self.weight.stride(0) == 1
            and self.weight.device.type == "cpu"
            and torch.get_num_threads() > 1
            and not self.out_features % torch.get_num_threads()
        )


def by_threads(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` for one token, each thread with its own columns of the result.

    PyTorch has one thread multiply a single row, and so leaves memory bandwidth unused. As a batch
    of products it goes to all of them: 1.5 to 1.7 times as fast with two (docs/performance.md).
    weight (out,in) as `lay_out_for_decoding` leaves it, out a multiple of the threads.
    """
    n = torch.get_num_threads()
    parts = weight.mT.unflatten(1, (n, -1)).transpose(0, 1)  # (n,in,out/n), no copy
    y = x.reshape(1, 1, -1).expand(n, 1, -1) @ parts  # (n,1,out/n)
    y = y.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class LayerNorm(Plain, nn.LayerNorm):
    """nn.LayerNorm (Ba 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(Plain, nn.RMSNorm):
    """nn.RMSNorm (Zhang 2019)."""


def lay_out_for_decoding(model: nn.Module) -> None:
    """Reorder the weights of linear layers in memory, so that one token goes through them sooner.

    Values and shapes stay: a weight (out,in) that is as wide as it is high, or wider, is stored
    column by column. A processor then adds up scaled columns, all of them read in order, where it
    would else take a dot product with each short row: 1.2 to 2.5 times as fast for a single token
    in float32 (docs/performance.md). Other types have kernels of their own, which like rows.
    """
    for module in model.modules():
        if not isinstance(module, nn.Linear) or module.out_features < module.in_features:
            continue
        weight = module.weight
        if weight.dtype is torch.float32 and weight.device.type == "cpu":
            weight.data = weight.data.t().contiguous().t()


def make_norm(config: ModelConfig) -> nn.Module:
    """LayerNorm (Ba 2016) or RMSNorm (Zhang 2019) over the width of the model."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, eps=config.norm_eps)
    return LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


def make_head_norm(config: ModelConfig) -> nn.Module:
    """RMSNorm over one head's queries or keys (Henry 2020, as in Qwen3)."""
    return RMSNorm(config.head_dim, eps=config.norm_eps)


ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class MLP(Plain):
    """The feed-forward network of a block: (B,T,d) -> (B,T,d), each token by itself.

    swiglu (Shazeer 2020) has a gate beside the activation: `up` then yields 2 * d_ff, gate first.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        gates = 2 if config.activation == "swiglu" else 1
        self.up = Linear(config.d_model, gates * config.d_ff, bias=config.has_bias("mlp"))
        self.down = Linear(config.d_ff, config.d_model, bias=config.has_bias("mlp"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.activation == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        else:
            x = ACTIVATION[self.activation](x)
        return self.down(x)


class Dropout(Plain):
    """While training, zeroes elements with probability p and scales the others up (Srivastava
    2014): (B,T,d) -> (B,T,d).

    An element takes 16 random bits, so p is met to 1/65,536, and on a CPU this costs a third of
    F.dropout. `first` and `total` say which rows of a batch of `total` the input holds, where
    processes share one (0: all of it): the bits are drawn for the whole batch, so that each row's
    are the same however many processes there are.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.first = self.total = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not (dropped := round(self.p * 2**16)):
            return x
        shape = (self.total or x.shape[0], *x.shape[1:])
        words = torch.empty(-(-math.prod(shape) // 4), dtype=torch.int64, device=x.device)
        bits = words.random_(-(2**63), None).view(torch.int16)[: math.prod(shape)].view(shape)
        kept = bits[self.first : self.first + x.shape[0]] >= dropped - 2**15
        return x * (kept.to(x.dtype) * (2**16 / (2**16 - dropped)))


def deal_rows(model: nn.Module, rows: slice, total: int) -> None:
    """Tell a model's dropout that inputs are `rows` of a batch of `total`."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.first, module.total = rows.start, total


class Table(Plain):
    """A constant looked up by position, (context, width), in float64 whatever the model's dtype.

    It is no part of a checkpoint. Rounding happens once, at the look-up, to the caller's dtype.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Table:
        self.table = self.table.to(fn(self.table).device)
        return self

    def forward(self, pos: Tensor, dtype: torch.dtype) -> Tensor:
        """pos (B,T), where padding (negative) reads row 0 -> (B,T,width)"""
        return F.embedding(pos.clamp(min=0), self.table).to(dtype)


def sinusoids(context: int, width: int) -> Tensor:
    """Sine and cosine of each position at wavelengths from 2 pi to 20,000 pi (Vaswani 2017, 3.5).

    -> (context, width) float64, sines in the even columns and cosines in the odd ones.
    """
    even = torch.arange(0, width, 2, dtype=torch.float64)
    rates = torch.exp(even * (-math.log(10_000.0) / width))
    angles = torch.arange(context, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(context, width)


class TokenEmbedding(Plain):
    """Tokens and their positions -> (B,T,d).

    Sinusoidal positions are added to embeddings scaled by sqrt(d) (Vaswani 2017, 3.4); learned ones
    are added as they are; rotary positions are left to attention.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, config.d_model)
        sinusoidal = config.positions == "sinusoidal"
        self.scale = math.sqrt(config.d_model)
        self.table = Table(sinusoids(config.context, config.d_model)) if sinusoidal else None
        learned = config.positions == "learned"
        self.positions = nn.Embedding(config.context, config.d_model) if learned else None
        nn.init.normal_(self.tokens.weight, std=config.d_model**-0.5)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=config.d_model**-0.5)

    def forward(self, tokens: Tensor, pos: Tensor) -> Tensor:
        x = F.embedding(tokens, self.tokens.weight)
        if self.table is not None:
            return x * self.scale + self.table(pos, x.dtype)
        if self.positions is not None:
            return x + F.embedding(pos.clamp(min=0), self.positions.weight)
        return x
