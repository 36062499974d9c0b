"""The subject of bench: the model, whether the longest run fits, and the text for lossy kinds."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from kvtool.errors import CapacityError, FileError, UsageError
from kvtool.ui.output import Output

if TYPE_CHECKING:
    from kvtool.commands.bench.settings import Settings
    from kvtool.core.checkpoint.checkpoint import Checkpoint
    from kvtool.core.models import Model

QUALITY_TOKENS = 512  # of the model's own text, where no other is given


def load_model(
    settings: Settings, device: Any, dtype: Any, out: Output
) -> tuple[Checkpoint, Model]:
    """The checkpoint, and its model; with --n-kv-heads one of its sizes, but of random weights."""
    import torch

    from kvtool.core.checkpoint import checkpoint
    from kvtool.core.models import build_model

    loaded = checkpoint.load(settings.run.model, device, dtype)
    config = loaded.config
    if settings.n_kv_heads in (0, config.n_kv_heads):
        return loaded, loaded.model
    smaller = dataclasses.replace(config, n_kv_heads=settings.n_kv_heads)
    out.note(
        f"random weights: those of {loaded.path.name} have {config.n_kv_heads} key-value heads, "
        f"not {settings.n_kv_heads}"
    )
    torch.manual_seed(settings.run.seed)
    return loaded, build_model(smaller).to(device, dtype).eval()


def check_fits(
    settings: Settings, lengths: list[int], config: Any, device: Any, dtype: Any
) -> None:
    """Raise CapacityError if the longest run exceeds the context or the memory."""
    from kvtool.core import footprint
    from kvtool.core.cache import CacheSpec, make_cache
    from kvtool.core.machine import require_memory

    flag, n_prompt = settings.start
    start = 1 if config.n_encoder_layers else n_prompt
    start += settings.depth is not None  # the token that reading the prompt gives
    longest_prompt = config.context if config.n_encoder_layers else config.context - 1
    if n_prompt > longest_prompt:
        raise CapacityError(
            f"{flag} {n_prompt}: is too long (the model holds {config.context} tokens)",
            f"The longest that fits is {longest_prompt}.",
        )
    if start + lengths[-1] > config.context:
        raise CapacityError(
            f"--lengths {lengths[-1]}: with a prompt of {start} tokens is beyond the context (the "
            f"model holds {config.context})",
            f"The longest that fits is {config.context - start}.",
        )
    spec = CacheSpec.of(config, settings.batch_size, start + lengths[-1], dtype, device)
    read = spec.capacity if "none" in settings.caches else n_prompt
    caches = 2 * spec.capacity * spec.token_nbytes
    require_memory("the caches", caches, device, dtype=dtype)
    once = footprint.activations(config, settings.batch_size * read, dtype.itemsize)
    require_memory("the caches, and the longest pass", caches + once, device, dtype=dtype)
    one = CacheSpec.of(config, 1, 1)
    if not config.n_encoder_layers and any(make_cache(k, one).loses for k in settings.caches):
        needed = footprint.quality(config, config.context, dtype.itemsize)
        require_memory("the predictions of two caches", needed, device)


def read_ids(settings: Settings, loaded: Checkpoint, device: Any) -> Any:
    """The tokens of the last tenth of --text, as in train-lm; None without one."""
    import torch

    from kvtool.core.text.tokenizer import require_room
    from kvtool.core.training.lm import split_text
    from kvtool.reading import read_text

    if settings.text is None:
        return None
    if loaded.config.n_encoder_layers or loaded.tokenizer is None:
        raise UsageError("--text: needs a decoder with a tokenizer", "Leave out --text.")
    held_out = split_text(read_text(settings.text, "a text to measure on", "--text"))[1]
    require_room(f"--text {settings.text}", held_out)
    ids = loaded.tokenizer.encode(held_out)
    if len(ids) < 2:
        raise FileError(
            f"{settings.text}: its last tenth is {len(ids)} tokens (expected 2 or more)"
        )
    return torch.tensor(ids, device=device)


def qualities(
    settings: Settings, model: Model, ids: Any, longest: int, out: Output
) -> dict[str, dict[str, Any]]:
    """The accuracy of each lossy kind, on --text or on the model's own text."""
    from kvtool.core.bench.quality import measure_quality, own_text
    from kvtool.core.cache import CacheSpec, make_cache

    spec = CacheSpec.of(model.config, 1, 1)
    lossy = [kind for kind in settings.caches if make_cache(kind, spec).loses]
    if not lossy and settings.text:
        out.warn("--text: is of no use here, since no kind in --caches changes what is predicted")
    if not lossy or model.config.n_encoder_layers:
        return {}
    source = f"{settings.text}, last 10 %" if settings.text else "the model's own text"
    if ids is None:
        n = min(max(longest, QUALITY_TOKENS), model.config.context)
        ids = own_text(model, n, settings.run.seed)
    return {
        kind: {
            "text": source,
            **vars(measure_quality(model, kind, ids, model.config.context)),
        }
        for kind in lossy
    }
