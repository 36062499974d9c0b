"""Norms, linear layers, feed-forward networks and positions: all that works token by token."""

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
    """Skips nn.Module's call overhead unless it has hooks or is compiled.

    That would take as long as a small layer. For what works token by token; hooks on all modules of
    a process are not looked for.

    by_token: for a few tokens native code is used where it can be, which treats each by itself.
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
        """Draw the weight; the bias is 0."""
        # Smaller weights hide cache bugs: attention is then nearly uniform whatever the positions.
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(...,in) -> (...,out)"""
        weight, bias = self.weight, self.bias
        # Where sizes do not fit, PyTorch says what is wrong.
        if native.serves(x, weight, bias) and x.shape[-1] == self.in_features:
            return native.on_tensor(self.on_arrays(), x)
        return F.linear(x, weight, bias)

    def on_arrays(self) -> native.ArrayLayer:
        """The same for a few tokens, on arrays (n,in) -> (n,out)."""
        return native.linear(self.weights())

    def weights(self) -> native.Weights:
        """What native code reads of it. Raises ValueError for a bias of another width."""
        return native.Weights.of(self.weight, self.bias)


class LayerNorm(Plain, nn.LayerNorm):
    """nn.LayerNorm (Ba 2016)."""

    by_token = True

    def forward(self, x: Tensor) -> Tensor:
        """(...,d) -> (...,d)"""
        weight, bias = self.weight, self.bias
        if native.serves(x, weight, bias) and weight is not None and x.shape[-1:] == weight.shape:
            return native.on_tensor(self.on_arrays(), x)
        return torch.layer_norm(x, self.normalized_shape, weight, bias, self.eps)

    def on_arrays(self) -> native.ArrayLayer:
        """The same for a few tokens, on arrays (n,d) -> (n,d)."""
        return native.normalised(self.weights())

    def weights(self) -> native.Norm:
        """What native code reads of it. Raises ValueError for a shift of another width."""
        return native.Norm.of(self.weight, self.bias, self.eps, centred=True)


class RMSNorm(Plain, nn.RMSNorm):
    """nn.RMSNorm (Zhang 2019)."""

    by_token = True

    def forward(self, x: Tensor) -> Tensor:
        """(...,d) -> (...,d)"""
        fits = self.weight is not None and x.shape[-1:] == self.weight.shape
        if fits and self.eps is not None and native.can_read(x, self.weight):  # however many
            return native.on_tensor(self.on_arrays(), x)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def on_arrays(self) -> native.ArrayLayer:
        """The same on arrays (n,d) -> (n,d)."""
        return native.normalised(self.weights())

    def weights(self) -> native.Norm:
        """What native code reads of it; eps must be given."""
        assert self.eps is not None
        return native.Norm.of(self.weight, None, self.eps, centred=False)


def make_norm(config: ModelConfig) -> LayerNorm | RMSNorm:
    """LayerNorm (Ba 2016) or RMSNorm (Zhang 2019) over the width of the model."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, eps=config.norm_eps)
    return LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


def make_head_norm(config: ModelConfig) -> RMSNorm:
    """RMSNorm over one head's queries or keys (Henry 2020, as in Qwen3)."""
    return RMSNorm(config.head_dim, eps=config.norm_eps)


ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "geglu": lambda x: F.gelu(x.chunk(2, dim=-1)[0], approximate="tanh") * x.chunk(2, dim=-1)[1],
    "swiglu": lambda x: F.silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1],
}


class MLP(Plain):
    """The feed-forward network of a block: (B,T,d) -> (B,T,d), each token by itself.

    swiglu and geglu (Shazeer 2020) have a gate beside the activation: `up` then yields 2 * d_ff,
    gate first.
    """

    by_token = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        gates = 2 if config.gated else 1
        self.up = Linear(config.d_model, gates * config.d_ff, bias=config.has_bias("mlp"))
        self.down = Linear(config.d_ff, config.d_model, bias=config.has_bias("mlp"))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activate(self.up(x)))

    def activate(self, x: Tensor) -> Tensor:
        """(...,d_ff), or with a gate (...,2*d_ff) -> (...,d_ff)"""
        if native.serves(x):
            return native.on_tensor(native.activation(self.activation), x)
        return ACTIVATION[self.activation](x)


class Dropout(Plain):
    """While training, zeroes elements with probability p and scales the others up (Srivastava
    2014): (B,T,d) -> (B,T,d), added to `onto` if that is given.

    Where several processes share a batch, the context says with which row this one's input begins:
    each row loses the same elements, however many they are.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        if not self.training or not (dropped := round(self.p * 2**32)):
            return x if onto is None else onto + x
        before = context.current().first_row * math.prod(x.shape[1:])
        start = int(torch.randint(2**32, ())) + before
        mask = fused.Mask(start % 2**32, dropped - 2**31, 2**32 / (2**32 - dropped))
        if fused.serves(x, x if onto is None else onto):
            return fused.dropout(x, onto, mask)
        x = x * (mask.kept(x).to(x.dtype) * mask.scale)
        return x if onto is None else onto + x


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
        if pos.shape[0] > 1 and pos.stride(0) == 0:  # one row for all
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
        """tokens (B,T), positions (B,T), negative = padding -> (B,T,d)"""
        x = F.embedding(tokens, self.tokens.weight)
        if self.table is not None:
            return x * self.scale + self.table(pos, x.dtype)
        if self.positions is not None:
            return x + F.embedding(pos.clamp(min=0), self.positions.weight)
        return x
