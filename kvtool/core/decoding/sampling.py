"""Choosing the next token from logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvtool.core.native import arrays as native
from kvtool.core.native.arrays import Array
from kvtool.errors import CheckFailed


def require_finite(logits: Tensor, step: int) -> None:
    """Raise CheckFailed, naming `step`, unless all logits are finite."""
    # One number that is not finite makes the sum so, in a quarter of isfinite().all()'s time.
    total = logits if logits.numel() == 1 else logits.sum(dtype=torch.float64)
    # The sum of large finite float64 numbers may overflow as well, so look at each.
    if not math.isfinite(total) and not bool(logits.isfinite().all()):
        raise CheckFailed(
            f"step {step}: the logits are not finite",
            "Look for NaN in the weights, or run with --dtype float32.",
        )


class LogProb:
    """Adds up the log probability of the chosen tokens of one row, in nats.

    The probabilities are the model's own, before temperature, top-k and top-p. Call it once a step.
    """

    def __init__(self) -> None:
        self.total = 0.0

    def __call__(self, logits: Tensor, token: Tensor) -> None:
        """Add the log probability of token (1,) by logits (1,V)."""
        self.total += float(logits.double().log_softmax(-1)[0, token[0]])


class Sampler:
    """Chooses the likeliest token at temperature 0, and otherwise samples.

    It samples from the `top_k` likeliest tokens (0: all), and among these from the smallest set of
    likeliest tokens whose probabilities add up to `top_p` (Holtzman 2020).
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
        """logits (B,V) -> tokens (B,).

        Raises CheckFailed, naming step `index`, if the largest logit of a row is not finite.
        """
        if native.numpy_can_read(logits):  # NumPy takes a tenth of PyTorch's time
            token = torch.from_numpy(likeliest(logits.detach().numpy(), index))
        else:
            best, token = logits.max(dim=-1)
            require_finite(best, index)
        return token if self.greedy else self._sample(logits)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    def _sample(self, logits: Tensor) -> Tensor:
        if self._generator is None:
            self._generator = torch.Generator(device=logits.device).manual_seed(self.seed)
        probs = self.distribution(logits)
        return torch.multinomial(probs, 1, generator=self._generator)[:, 0]

    def distribution(self, logits: Tensor) -> Tensor:
        """The probabilities to sample from: logits (B,V) -> (B,V) float32."""
        logits = logits.double()
        # The largest logit becomes 0, so no temperature makes it overflow.
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            kept = logits.topk(self.top_k, dim=-1)  # exactly top_k, though ties with the last exist
            logits = torch.full_like(logits, float("-inf")).scatter(-1, kept.indices, kept.values)
        probs = logits.softmax(-1)
        if self.top_p < 1.0:
            ordered, order = probs.sort(dim=-1, descending=True)
            # A token stays if those before it add up to less than top_p; so the first always stays.
            drop = ordered.cumsum(-1) - ordered >= self.top_p
            probs = probs.masked_fill(drop.scatter(-1, order, drop), 0.0)
            probs = probs / probs.sum(-1, keepdim=True)
        return probs.float()


def likeliest(logits: Array, step: int) -> Array:
    """The index of each row's largest logit: (B,V) -> (B,). NaN counts as the largest.

    Raises CheckFailed, naming `step`, unless these logits are finite.
    """
    found: Array = logits.argmax(-1)
    if not all(math.isfinite(logits[row, i]) for row, i in enumerate(found.tolist())):
        require_finite(torch.from_numpy(logits), step)
    return found
