"""Choosing the next token from logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvtool.core.native import arrays as native
from kvtool.core.native.arrays import Array
from kvtool.errors import CheckFailed


def require_finite(logits: Tensor, step: int) -> None:
    """Raise CheckFailed, naming `step`, unless all are finite."""
    # A sum is not finite if a number is not, and takes a quarter of the time of isfinite().all().
    total = logits if logits.numel() == 1 else logits.sum(dtype=torch.float64)
    # Large numbers of float64 may have such a sum too.
    if not math.isfinite(total) and not bool(logits.isfinite().all()):
        raise CheckFailed(
            f"step {step}: the logits are not finite",
            "Look for NaN in the weights, or run with --dtype float32.",
        )


class LogProb:
    """The logarithm of the probability of what was chosen, by the model itself: before temperature,
    top-k and top-p. Adds up, in nats, over the steps it is called for, of one row."""

    def __init__(self) -> None:
        self.total = 0.0

    def __call__(self, logits: Tensor, token: Tensor) -> None:
        """logits (1,V), token (1,)"""
        self.total += float(logits.double().log_softmax(-1)[0, token[0]])


class Sampler:
    """Greedy at temperature 0, otherwise random among the likeliest tokens.

    These are the first `top_k` (0: all), and of them the smallest set whose probabilities reach
    `top_p` (Holtzman 2020).
    """

    def __init__(
        self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0
    ) -> None:
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.seed = seed
        self._generator: torch.Generator | None = None

    def __call__(self, logits: Tensor, index: int = 0) -> Tensor:
        """logits (B,V) -> tokens (B,). Raises CheckFailed, naming step `index`, if not finite."""
        if native.numpy_can_read(logits):  # which takes a tenth of PyTorch's time
            token = torch.from_numpy(likeliest(logits.detach().numpy(), index))
        else:
            best, token = logits.max(dim=-1)
            require_finite(best, index)
        return token if self.greedy else self._draw(logits)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, and nothing drawn."""
        return self.temperature == 0

    def _draw(self, logits: Tensor) -> Tensor:
        if self._generator is None:
            self._generator = torch.Generator(device=logits.device).manual_seed(self.seed)
        probs = self.distribution(logits)
        return torch.multinomial(probs, 1, generator=self._generator)[:, 0]

    def distribution(self, logits: Tensor) -> Tensor:
        """The probabilities drawn from: logits (B,V) -> (B,V) float32."""
        logits = logits.double()
        # The likeliest becomes 0, which no temperature takes beyond what a number can hold.
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            kept = logits.topk(self.top_k, dim=-1)  # not all that equal the last: ties are common
            logits = torch.full_like(logits, float("-inf")).scatter(-1, kept.indices, kept.values)
        probs = logits.softmax(-1)
        if self.top_p < 1.0:
            ordered, order = probs.sort(dim=-1, descending=True)
            # A token stays if those before it have not reached top_p; so the first always stays.
            drop = ordered.cumsum(-1) - ordered >= self.top_p
            probs = probs.masked_fill(drop.scatter(-1, order, drop), 0.0)
            probs = probs / probs.sum(-1, keepdim=True)
        return probs.float()


def likeliest(logits: Array, step: int) -> Array:
    """Where the largest of each row is: (B,V) -> (B,). Raises CheckFailed, naming `step`, unless it
    is finite; NaN counts as largest."""
    found: Array = logits.argmax(-1)
    if not all(math.isfinite(logits[row, i]) for row, i in enumerate(found.tolist())):
        require_finite(torch.from_numpy(logits), step)
    return found
