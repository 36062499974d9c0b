"""The decode loop over token ids: the same for every model and every cache."""

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
    """Run the tokens of `ids` (B,T), a whole history, that the cache does not hold yet.

    -> logits (B,n,V) of those n tokens, or (B,1,V) of the last one. Nothing is committed if the
    model raises. In a loop, take the model's `decoding_form`. Raises CapacityError.
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
    """One step: `new` (B,n) after what the cache holds, or all tokens for a kind that recomputes
    -> logits as `feed`. Raises CapacityError."""
    if not isinstance(model, DecodingForm):
        return by_modules(model, new, cache, source, last)
    logits = model.step(new, cache, source, last)
    return logits if isinstance(logits, Tensor) else torch.from_numpy(logits).to(cache.spec.dtype)


def first_input(
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
    on_step: Callable[[Tensor, Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """Continue `prompt` (B,P) by `n_new` tokens, yielding each (B,) as it is chosen.

    `on_step` is given each step's logits (B,V), to be read at once, and what was chosen (B,). The
    caller stops the iteration to stop early. To generate again on one cache, pass the same
    `decoding_form`: it keeps what it has captured. Raises CapacityError before any work if the
    context is too short, and CheckFailed if logits are not finite.
    """
    n_prompt = prompt.shape[1]
    check_context(n_prompt, n_new, model.config.context)
    decode = decoding_form(model)
    new: Tensor | Array = prompt if cache.recompute else prompt[:, cache.length :]
    without_gradients = torch.inference_mode()
    for index in range(n_new):
        # Not around the caller's part, nor a greedy token's in native code: to enter it takes time.
        if isinstance(new, Tensor):
            with without_gradients:
                found = decode.step(new, cache, source, last=True)
        else:
            found = decode.step(new, cache, source, last=True)
        if sampler.greedy and not isinstance(found, Tensor):  # without PyTorch, which is slow
            chosen = likeliest(found[:, -1], index)
            token, new = torch.from_numpy(chosen), chosen[:, None].copy()
        else:
            with without_gradients:
                token = sampler(_as_tensor(found)[:, -1], index)
                added = token[:, None].clone()  # since the caller's token is its own
                new = torch.cat([_as_tensor(new), added], dim=1) if cache.recompute else added
        if on_step is not None:
            on_step(_as_tensor(found)[:, -1], token)
        yield token


def _as_tensor(x: Tensor | Array) -> Tensor:
    return x if isinstance(x, Tensor) else torch.from_numpy(x)
