"""generate --attention-plot: what may be drawn, and the drawing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtool.commands.generate.results import Result
from kvtool.errors import UsageError
from kvtool.ui.environment import caption, measured_on
from kvtool.ui.output import Output

if TYPE_CHECKING:
    from kvtool.commands.generate.settings import Settings
    from kvtool.core.checkpoint.checkpoint import Checkpoint


MAX_COLUMNS, MAX_ROWS = 96, 64  # tokens that are drawn of a longer context or continuation


def check_attention(settings: Settings, loaded: Checkpoint, n_sources: int) -> None:
    """Raise UsageError if there is no such layer, or more than one prompt or source."""
    n_layers = loaded.config.n_layers
    if (settings.attention_layer or 1) > n_layers:
        raise UsageError(
            f"--attention-layer: {settings.attention_layer} is too large (the decoder's layers are "
            f"1 to {n_layers})"
        )
    if n_sources > 1:
        what = "prompt" if loaded.source_tokenizer is None else "source"
        raise UsageError(
            f"--attention-plot: draws one {what} (found {n_sources})", "Give one with --prompt."
        )


def draw(
    settings: Settings, loaded: Checkpoint, source: list[int], result: Result, out: Output
) -> None:
    """The plot of what each token of `result`, the best of its source or prompt, read from it."""
    if loaded.source_tokenizer is None:
        draw_context(settings, loaded, source, result, out)
    else:
        draw_source(settings, loaded, source, result, out)


def draw_source(
    settings: Settings, loaded: Checkpoint, source: list[int], result: Result, out: Output
) -> None:
    """The plot of cross-attention, of an encoder-decoder."""
    from kvtool.core.decoding.attention_maps import cross_attention_weights, labels
    from kvtool.core.kernels.default import make_kernels
    from kvtool.ui.heat_maps import attention_plot

    path = settings.attention_plot
    assert loaded.source_tokenizer is not None and path is not None
    layer = settings.attention_layer or loaded.config.n_layers
    kernels = make_kernels(settings.kernels)
    weights = cross_attention_weights(loaded.model, source, result.ids, layer - 1, kernels)
    attention_plot(
        path,
        weights.tolist(),
        labels(loaded.source_tokenizer, source),
        labels(loaded.tokenizer, result.ids),
        title(settings, loaded, f"Cross-attention of decoder layer {layer}", result),
    )
    out.note(f"plot: {path}")


def draw_context(
    settings: Settings, loaded: Checkpoint, prompt: list[int], result: Result, out: Output
) -> None:
    """The plot of self-attention, of a decoder, with what its cache has lost and rounded."""
    from kvtool.core.cache import CacheSpec, make_cache
    from kvtool.core.decoding.attention_maps import labels, self_attention_weights
    from kvtool.core.kernels.default import make_kernels
    from kvtool.registry import with_own_window
    from kvtool.ui.heat_maps import Mark, attention_plot

    path = settings.attention_plot
    assert path is not None
    config, layer = loaded.config, settings.attention_layer or loaded.config.n_layers
    kind = with_own_window(settings.cache, config.window)
    cache = make_cache(kind, CacheSpec.of(config, 1, 1))
    kernels = make_kernels(settings.kernels)
    found = self_attention_weights(loaded.model, prompt, result.ids, layer - 1, cache, kernels)
    ids = [*prompt, *result.ids[:-1]]
    columns, rows = slice(-MAX_COLUMNS, None), slice(-MAX_ROWS, None)
    by = f"{kind} cache" if cache.window else f"window of {config.window} of the model"
    lines = title(settings, loaded, f"Self-attention of layer {layer}", result)
    shown = found.weights[:, rows, columns]
    if cut := cut_text(len(ids), len(result.ids), 1 - float(shown.sum(-1).mean())):
        lines.append(cut)
        out.note(f"--attention-plot: {cut}")
    attention_plot(
        path,
        shown.tolist(),
        labels(loaded.tokenizer, ids[columns]),
        labels(loaded.tokenizer, result.ids[rows]),
        lines,
        ("tokens that were read", "new tokens"),
        [
            Mark(f"no longer seen ({by})", found.gone[rows, columns].tolist(), hatched=True),
            Mark(f"read quantized ({kind})", found.coded[rows, columns].tolist(), hatched=False),
        ],
    )
    out.note(f"plot: {path}")


def cut_text(n_read: int, n_new: int, outside: float) -> str:
    """What of a long context is not drawn; "" if all is. outside: the share of attention there.

    >>> cut_text(400, 20, 0.25)
    'the last 96 of 400 tokens are drawn; 25 % of the attention is on those before them'
    """
    parts = []
    if n_read > MAX_COLUMNS:
        parts.append(f"the last {MAX_COLUMNS} of {n_read:,} tokens are drawn")
        parts.append(f"{outside * 100:.0f} % of the attention is on those before them")
    if n_new > MAX_ROWS:
        parts.append(f"rows are the last {MAX_ROWS} of {n_new:,} new tokens")
    return "; ".join(parts)


def title(settings: Settings, loaded: Checkpoint, what: str, result: Result) -> list[str]:
    """The lines of the title: what is drawn, of which model, from which text."""
    from kvtool.core.decoding.attention_maps import visible

    about = caption(measured_on(settings, loaded.facts))
    pair = f"{shorten(visible(result.prompt))} → {shorten(visible(result.text))}"
    return [f"{what} of {loaded.config.n_layers}", about, pair]


def shorten(text: str, width: int = 60) -> str:
    """The start of `text`.

    >>> shorten("To be, or not to be", 10)
    'To be, or…'
    """
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"
