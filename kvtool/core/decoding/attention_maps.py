"""Attention weights of a run: how much each new token read from a source or from a context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from kvtool.core.cache import Cache, Step
from kvtool.core.kernels.default import DEFAULT, Kernels, Layer, reference_weights
from kvtool.core.kernels.masks import LazyMask, mask_tensor
from kvtool.core.models import Model
from kvtool.core.text.tokenizer import BOS, SPECIALS, Tokenizer


class WeightRecorder:
    """Kernels that compute as `kernels` do and record the weights of each attention over `keys`."""

    def __init__(self, kernels: Kernels, keys: Tensor) -> None:
        self.name = kernels.name
        self.kernels = kernels
        self.keys = keys
        self.found: list[Tensor] = []  # each (B,H,T,S), float64

    def per_token(self, x: Tensor, *layers: Layer) -> Tensor:
        """As `Kernels.per_token`."""
        return self.kernels.per_token(x, *layers)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | LazyMask | None,
        causal: bool,
        cap: float = 0.0,
    ) -> Tensor:
        """As `Kernels.attention`; records the weights if `k` is the tensor `keys` itself."""
        if k is self.keys:
            self.found.append(reference_weights(q, k, mask_tensor(mask), causal))
        asked = (cap,) if cap else ()  # kernels need not know one
        return self.kernels.attention(q, k, v, mask, causal, *asked)


@torch.inference_mode()
def cross_attention_weights(
    model: Model,
    source: Sequence[int],
    target: Sequence[int],
    layer: int,
    kernels: Kernels = DEFAULT,
) -> Tensor:
    """The cross-attention weights of one decoder layer for a decoded target: (H,T,S) in float64.

    source (S,) and target (T,) are ids. Row t belongs to the step that chose target[t], and that
    step read the tokens before it. So the end token has a row if it is in `target`. One pass over
    the whole target gives the same queries and keys as decoding: bit for bit with exact kernels,
    otherwise up to rounding.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([source], device=device)
    encoded = model.encode(ids, torch.ones_like(ids, dtype=torch.bool), kernels)
    recorder = WeightRecorder(kernels, encoded.layers[layer][0])
    read = torch.tensor([[BOS, *target[:-1]]], device=device)
    model(read, Step.full(1, len(target), device, kernels=recorder), source=encoded)
    (weights,) = recorder.found
    return weights[0].cpu()


class SelfRecorder(WeightRecorder):
    """Kernels that record the weights of one layer's attention for the last `n` queries, (B,H,n,S)
    float64, and what these see, (B or 1,1,n,S) bool."""

    def __init__(self, kernels: Kernels, layer: int, n: int) -> None:
        super().__init__(kernels, torch.empty(0))
        self.layer, self.n = layer, n
        self.calls = 0  # attentions so far: a layer has one

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | LazyMask | None,
        causal: bool,
        cap: float = 0.0,
    ) -> Tensor:
        """As `Kernels.attention`."""
        if self.calls == self.layer:
            seen = mask_tensor(mask)
            if seen is None:
                seen = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
                seen = seen.tril() if causal else seen
            seen = seen[:, :, -self.n :]
            self.found += [reference_weights(q[:, :, -self.n :], k, seen, False, cap), seen]
        self.calls += 1
        return super().attention(q, k, v, mask, causal, cap)


class SelfAttentionMap(NamedTuple):
    """What each new token read from the tokens before it, and in which form they were there."""

    weights: Tensor  # (H,T,S) float64
    gone: Tensor  # (T,S) bool: tokens that its step did not see any more
    coded: Tensor  # (T,S) bool: tokens that its step read quantized


@torch.inference_mode()
def self_attention_weights(
    model: Model,
    prompt: Sequence[int],
    new: Sequence[int],
    layer: int,
    cache: Cache,
    kernels: Kernels = DEFAULT,
) -> SelfAttentionMap:
    """The self-attention weights of one layer of a decoder for a continuation.

    prompt (P,) and new (T,) are ids. Row t belongs to the step that chose new[t], and columns are
    the tokens that the last step read: the prompt and all new ones but the last, S = P + T - 1. At
    each token the pass loses and rounds what `cache`, one of the run's kind, has lost and rounded
    there: so its queries and keys are those of decoding, bit for bit with exact kernels, otherwise
    up to rounding.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *new[:-1]]], device=device)
    n_keys, n = ids.shape[1], len(new)
    recorder = SelfRecorder(kernels, layer, n)
    quantization = cache.quantization
    lost = cache.window, cache.sinks, quantization
    model(ids, Step.full(1, n_keys, device, None, recorder, *lost))
    weights, seen = recorder.found[0][0].cpu(), recorder.found[1][0, 0].cpu()
    # A quantized copy of a token stands before all exact ones.
    n_coded = weights.shape[-1] - n_keys
    coded = torch.zeros(n, n_keys, dtype=torch.bool)
    coded[:, :n_coded] = seen[:, :n_coded]
    folded, seen = weights[..., n_coded:].clone(), seen[:, n_coded:] | coded
    folded[..., :n_coded] += weights[..., :n_coded]
    if quantization is not None and quantization.in_place:
        coded = seen
    past = torch.arange(n_keys) <= torch.arange(n_keys - n, n_keys)[:, None]
    return SelfAttentionMap(folded, past & ~seen, coded)


def labels(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token in visible characters, or the name of a special token."""
    return [_label(tokenizer, token) for token in ids]


def _label(tokenizer: Tokenizer, token: int) -> str:
    if tokenizer.has_specials and token < len(SPECIALS):
        return SPECIALS[token]
    (piece,) = tokenizer.pieces([token])
    return visible(_text_of_bytes(piece) if tokenizer.kind == "bpe" else piece).replace(" ", "␣")


def _text_of_bytes(piece: str) -> str:
    """The text of a byte-level piece, with \\x.. for the bytes of a partial character."""
    alphabet = set(ByteLevel.alphabet())  # one character for each byte: itself, or one from 256 on
    if not alphabet.issuperset(piece):
        return piece
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    spelt = bytes(ord(c) if ord(c) < 256 else others[ord(c) - 256] for c in piece)
    return spelt.decode("utf-8", "backslashreplace")


def visible(text: str) -> str:
    """`text` on one line, with escapes such as \\n for characters that do not print."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
