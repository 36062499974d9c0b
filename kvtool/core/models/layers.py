"""Layers that compute each token alone: norms, linear layers, feed-forward networks, positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.config import ModelConfig
from kvtool.core.native import arrays as native
from kvtool.core.native import context, fused


class Plain(nn.Module):
    """A module that is called without nn.Module's overhead, unless it has hooks or is compiled.

    The overhead would take as long as a small layer. Only for modules that compute each token
    alone. Global hooks on all modules of a process are not called.

    by_token: a few tokens go through native code where possible, which computes each token alone.
    """

    by_token: ClassVar[bool] = False

    def __call__(self, *args: Any, **named: Any) -> Any:
        if (
            self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or self._compiled_call_impl is not None  # by layer.compile()
        ):
            return super().__call__(*args, **named)
        return self.forward(*args, **named)


class Linear(Plain, nn.Linear):
    """nn.Linear, initialised at std 1/sqrt(in)."""

    by_token = True

    def reset_parameters(self) -> None:
        """Draw the weight, and set the bias to 0."""
        # Smaller weights would hide cache bugs: attention would be nearly uniform at all positions.
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(...,in) -> (...,out)"""
        weight, bias = self.weight, self.bias
        # If sizes do not fit, PyTorch raises a clear error.
        if native.can_compute(x, weight, bias) and x.shape[-1] == self.in_features:
            return native.on_tensor(self.on_arrays(), x)
        return F.linear(x, weight, bias)

    def on_arrays(self) -> native.ArrayLayer:
        """`forward` for a few tokens in native code, on arrays: (n,in) -> (n,out)."""
        return native.linear(self.weights())

    def weights(self) -> native.Weights:
        """The arrays that native code reads. Raises ValueError for a bias of another width."""
        return native.Weights.of(self.weight, self.bias)


class LayerNorm(Plain, nn.LayerNorm):
    """nn.LayerNorm (Ba 2016)."""

    by_token = True

    def forward(self, x: Tensor) -> Tensor:
        """(...,d) -> (...,d)"""
        weight, bias = self.weight, self.bias
        if (
            native.can_compute(x, weight, bias)
            and weight is not None
            and x.shape[-1:] == weight.shape
        ):
            return native.on_tensor(self.on_arrays(), x)
        return torch.layer_norm(x, self.normalized_shape, weight, bias, self.eps)

    def on_arrays(self) -> native.ArrayLayer:
        """`forward` for a few tokens in native code, on arrays: (n,d) -> (n,d)."""
        return native.normalised(self.weights())

    def weights(self) -> native.Norm:
        """The arrays that native code reads. Raises ValueError for a shift of another width."""
        return native.Norm.of(self.weight, self.bias, self.eps, centred=True)


class RMSNorm(Plain, nn.RMSNorm):
    """nn.RMSNorm (Zhang 2019)."""

    by_token = True

    def forward(self, x: Tensor) -> Tensor:
        """(...,d) -> (...,d)"""
        fits = self.weight is not None and x.shape[-1:] == self.weight.shape
        if fits and self.eps is not None and native.can_read(x, self.weight):  # any number of rows
            return native.on_tensor(self.on_arrays(), x)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def on_arrays(self) -> native.ArrayLayer:
        """`forward` in native code, on arrays: (n,d) -> (n,d)."""
        return native.normalised(self.weights())

    def weights(self) -> native.Norm:
        """The arrays that native code reads; `eps` must not be None."""
        assert self.eps is not None
        return native.Norm.of(self.weight, None, self.eps, centred=False)


def make_norm(config: ModelConfig) -> LayerNorm | RMSNorm:
    """The configured norm over the model's width: LayerNorm (Ba 2016) or RMSNorm (Zhang 2019)."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, eps=config.norm_eps)
    return LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


def make_head_norm(config: ModelConfig) -> RMSNorm:
    """An RMSNorm over the queries or keys of one head (Henry 2020, as in Qwen3)."""
    return RMSNorm(config.head_dim, eps=config.norm_eps)


ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "geglu": lambda x: F.gelu(x.chunk(2, dim=-1)[0], approximate="tanh") * x.chunk(2, dim=-1)[1],
    "swiglu": lambda x: F.silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1],
}


class MLP(Plain):
    """The feed-forward network of a block.

    With swiglu or geglu (Shazeer 2020), `up` gives 2 * d_ff numbers: the gate, then the values.
    """

    by_token = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        gates = 2 if config.gated else 1
        self.up = Linear(config.d_model, gates * config.d_ff, bias=config.has_bias("mlp"))
        self.down = Linear(config.d_ff, config.d_model, bias=config.has_bias("mlp"))

    def forward(self, x: Tensor) -> Tensor:
        """(...,d) -> (...,d)"""
        return self.down(self.activate(self.up(x)))

    def activate(self, x: Tensor) -> Tensor:
        """Apply the activation: (...,d_ff), or with swiglu (...,2*d_ff) -> (...,d_ff)."""
        if native.can_compute(x):
            return native.on_tensor(native.activation(self.activation), x)
        return ACTIVATION[self.activation](x)


class Dropout(Plain):
    """In training, sets elements to 0 with probability p and scales up the rest (Srivastava 2014).

    Which elements these are depends on the row's place in the whole batch, not on the number of
    ranks that share it: `Context.first_row` tells where this rank's rows begin.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """x (B,T,d) after dropout, plus `onto` (B,T,d) if that is given -> (B,T,d)."""
        if not self.training or not (dropped := round(self.p * 2**32)):
            return x if onto is None else onto + x
        before = context.current().first_row * math.prod(x.shape[1:])
        start = int(torch.randint(2**32, ())) + before
        mask = fused.DropoutMask(start % 2**32, dropped - 2**31, 2**32 / (2**32 - dropped))
        if fused.can_fuse(x, x if onto is None else onto):
            return fused.dropout(x, onto, mask)
        x = x * (mask.keep_mask(x).to(x.dtype) * mask.scale)
        return x if onto is None else onto + x


class Table(Plain):
    """A constant table (context, width), looked up by position.

    It is float64 for every dtype of the model, and rounded once, when it is looked up. Checkpoints
    do not contain it.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Table:
        self.table = self.table.to(fn(self.table).device)
        return self

    def forward(self, pos: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows at positions pos (B,T) -> (B,T,width) in `dtype`; padding (< 0) reads row 0."""
        if pos.shape[0] > 1 and pos.stride(0) == 0:  # all rows share one in memory
            return self(pos[:1], dtype).expand(*pos.shape, -1)
        return F.embedding(pos.clamp(min=0), self.table).to(dtype)


def sinusoids(n_positions: int, width: int) -> Tensor:
    """Sine and cosine of each position at wavelengths from 2 pi to 20,000 pi (Vaswani 2017, 3.5).

    -> (n_positions, width) float64, sines in the even columns and cosines in the odd ones.
    """
    even = torch.arange(0, width, 2, dtype=torch.float64)
    rates = torch.exp(even * (-math.log(10_000.0) / width))
    angles = torch.arange(n_positions, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(n_positions, width)


class TokenEmbedding(Plain):
    """The embedding of tokens and, unless they are rotary, of their positions.

    Sinusoidal positions are added to embeddings scaled by sqrt(d) (Vaswani 2017, 3.4). Learned
    positions are added to unscaled embeddings. Rotary positions are applied in attention.
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
        """tokens (B,T), positions pos (B,T), negative = padding -> (B,T,d)."""
        x = F.embedding(tokens, self.tokens.weight)
        if self.table is not None:
            return x * self.scale + self.table(pos, x.dtype)
        if self.positions is not None:
            return x + F.embedding(pos.clamp(min=0), self.positions.weight)
        return x
