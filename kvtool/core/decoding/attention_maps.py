"""Cross-attention weights: how much each target token read from each source token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from kvtool.core.cache import Step
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
