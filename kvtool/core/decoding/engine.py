"""The decode loop over token ids: the same for every model and every cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvtool.core.cache import Cache
from kvtool.core.cache.cross import CrossCache
from kvtool.core.decoding.flat import Decode, DecodingForm, decoding_form
from kvtool.core.decoding.sampling import Sampler, likeliest
from kvtool.core.kernels.default import DEFAULT, Kernels
from kvtool.core.models import Model
from kvtool.core.native.arrays import Array
from kvtool.core.text.tokenizer import BOS
from kvtool.errors import CapacityError


def feed(
    model: Decode,
    cache: Cache,
    ids: Tensor,
    source: CrossCache | None = None,
    last: bool = False,
) -> Tensor:
    """Run the tokens of `ids` (B,T), a whole history, that the cache does not hold yet.

    -> logits (B,n,V) of those n tokens, or (B,1,V) of the last one. Nothing is committed if the
    model raises. In a loop, take the model's `decoding_form`. Raises CapacityError.
    """
    new = ids if cache.recompute else ids[:, cache.length :]
    return advance(model, cache, new, source, last)


def advance(
    model: Decode, cache: Cache, new: Tensor, source: CrossCache | None = None, last: bool = False
) -> Tensor:
    """One step: `new` (B,n) behind what the cache holds, or all tokens for a kind that recomputes
    -> logits as `feed`. Raises CapacityError."""
    if isinstance(model, DecodingForm) and not torch.is_grad_enabled():
        logits = model.at_once(new, cache, source, last)
        if logits is not None:
            return torch.from_numpy(logits).to(cache.spec.dtype)
        played = model.recorded(new, cache, source)
        if played is not None:
            return played
    step = cache.begin(new.shape[1])
    found = model(new, step, cache, source, last)
    cache.commit(new.shape[1])
    return found


def begin(
    model: Model, ids: Tensor, kernels: Kernels = DEFAULT
) -> tuple[Tensor, CrossCache | None]:
    """Where decoding starts from `ids` (B,P): the tokens themselves, or for an encoder-decoder the
    start token (B,1) and the encoded source. `kernels` serve the encoder; a cache's spec has those
    of the decoder."""
    if not model.config.n_encoder_layers:
        return ids, None
    source = model.encode(ids, torch.ones_like(ids, dtype=torch.bool), kernels)
    return ids.new_full((ids.shape[0], 1), BOS), source


def check_context(n_prompt: int, n_new: int, context: int) -> None:
    """Raise CapacityError unless a prompt and `n_new` tokens fit into the context."""
    if n_prompt + n_new > context:
        raise CapacityError(
            f"the prompt is {n_prompt:,} token{'s' * (n_prompt != 1)} and {n_new:,} more were "
            f"asked for (the model holds {context:,})",
            "Ask for fewer tokens, or shorten the prompt.",
        )


def generate(
    model: Model | DecodingForm,
    prompt: Tensor,
    cache: Cache,
    n_new: int,
    sampler: Sampler,
    source: CrossCache | None = None,
    weigh: Callable[[Tensor, Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """Continue `prompt` (B,P) by `n_new` tokens, yielding each (B,) as it is chosen.

    `weigh` is given each step's logits (B,V), to be read at once, and what was chosen (B,). The
    caller stops the iteration to stop early. Who generates again on the same cache, after a
    reset, takes one `decoding_form`: it keeps what it has recorded. Raises CapacityError before any
    work if the context is too short, and CheckFailed if logits are not finite.
    """
    n_prompt = prompt.shape[1]
    check_context(n_prompt, n_new, model.config.context)
    decode = decoding_form(model)
    new: Tensor | Array = prompt if cache.recompute else prompt[:, cache.length :]
    without_gradients = torch.inference_mode()
    for index in range(n_new):
        last = _logits_at_once(decode, cache, new, source) if sampler.greedy else None
        if last is not None:
            logits, found = torch.from_numpy(last), likeliest(last, index)
            token, new = torch.from_numpy(found), found[:, None].copy()  # the caller's is its own
        else:
            with without_gradients:  # but not around the caller's part
                ids = torch.as_tensor(new)
                logits = advance(decode, cache, ids, source, last=True).select(1, -1)
                token = sampler(logits, index)
                new = token[:, None]
                new = torch.cat([ids, new], dim=1) if cache.recompute else new
        if weigh is not None:
            weigh(logits, token)
        yield token


def _logits_at_once(
    decode: Model | DecodingForm, cache: Cache, new: Tensor | Array, source: CrossCache | None
) -> Array | None:
    """What decides behind `new` (B,n), (B,V), without PyTorch, whose part of a token apart from
    layers takes as long as small layers; None where it cannot be."""
    if not isinstance(decode, DecodingForm):
        return None
    logits = decode.at_once(new, cache, source, last=True)
    return None if logits is None else logits[:, 0]
