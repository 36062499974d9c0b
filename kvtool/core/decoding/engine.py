"""The decode loop over token ids, for every model and every cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvtool.core.cache import Cache
from kvtool.core.cache.cross import CrossCache
from kvtool.core.decoding.dispatch import DecodingForm, by_modules, decoding_form
from kvtool.core.decoding.sampling import Sampler, likeliest
from kvtool.core.kernels.default import DEFAULT, Kernels
from kvtool.core.models import Model
from kvtool.core.native.arrays import Array
from kvtool.core.text.tokenizer import BOS
from kvtool.errors import CapacityError


def feed(
    model: Model | DecodingForm,
    cache: Cache,
    ids: Tensor,
    source: CrossCache | None = None,
    last: bool = False,
) -> Tensor:
    """Run the model on those tokens of a whole history `ids` (B,T) that the cache does not hold.

    -> logits (B,n,V) of these n tokens, or (B,1,V) of the last one with `last`. In a loop, pass the
    model's `decoding_form`. Raises CapacityError. Nothing is committed if the model raises.
    """
    new = ids if cache.recompute else ids[:, cache.length :]
    return advance(model, cache, new, source, last)


def advance(
    model: Model | DecodingForm,
    cache: Cache,
    new: Tensor,
    source: CrossCache | None = None,
    last: bool = False,
) -> Tensor:
    """Decode one step: the tokens `new` (B,n) after those in the cache -> logits as `feed`.

    For a cache kind that recomputes, `new` is the whole history. Raises CapacityError.
    """
    if not isinstance(model, DecodingForm):
        return by_modules(model, new, cache, source, last)
    logits = model.step(new, cache, source, last)
    return logits if isinstance(logits, Tensor) else torch.from_numpy(logits).to(cache.spec.dtype)


def first_input(
    model: Model, ids: Tensor, kernels: Kernels = DEFAULT
) -> tuple[Tensor, CrossCache | None]:
    """The first input of the decoder, and the encoded source, for `ids` (B,P).

    A decoder-only model gets the ids themselves, and None. An encoder-decoder gets the start token
    (B,1), and the encoded ids. `kernels` are the encoder's; the decoder's are in the cache's spec.
    """
    if not model.config.n_encoder_layers:
        return ids, None
    source = model.encode(ids, torch.ones_like(ids, dtype=torch.bool), kernels)
    return ids.new_full((ids.shape[0], 1), BOS), source


def check_context(n_prompt: int, n_new: int, context: int) -> None:
    """Raise CapacityError unless `n_prompt` and `n_new` tokens together fit into the context."""
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
    on_step: Callable[[Tensor, Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """Continue `prompt` (B,P) by `n_new` tokens, yielding the tokens (B,) of each step.

    on_step: called at each step with the logits (B,V), valid until the next step, and the chosen
    tokens (B,). To stop early, stop the iteration. To generate again on one cache, pass the same
    `decoding_form`, which keeps its captured CUDA graphs.
    Raises CapacityError, before any work, if the context is too short, and CheckFailed if logits
    are not finite.
    """
    n_prompt = prompt.shape[1]
    check_context(n_prompt, n_new, model.config.context)
    decode = decoding_form(model)
    new: Tensor | Array = prompt if cache.recompute else prompt[:, cache.length :]
    without_gradients = torch.inference_mode()
    for index in range(n_new):
        # Inference mode must not cover the caller's code. Entering it costs time, so a greedy token
        # in native code goes without.
        if isinstance(new, Tensor):
            with without_gradients:
                found = decode.step(new, cache, source, last=True)
        else:
            found = decode.step(new, cache, source, last=True)
        if sampler.greedy and not isinstance(found, Tensor):  # NumPy is faster for a few numbers
            chosen = likeliest(found[:, -1], index)
            token, new = torch.from_numpy(chosen), chosen[:, None].copy()
        else:
            with without_gradients:
                token = sampler(_as_tensor(found)[:, -1], index)
                added = token[:, None].clone()  # the caller may change `token`
                new = torch.cat([_as_tensor(new), added], dim=1) if cache.recompute else added
        if on_step is not None:
            on_step(_as_tensor(found)[:, -1], token)
        yield token


def _as_tensor(x: Tensor | Array) -> Tensor:
    return x if isinstance(x, Tensor) else torch.from_numpy(x)
