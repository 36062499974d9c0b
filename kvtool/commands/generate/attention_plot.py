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


def check_attention(settings: Settings, loaded: Checkpoint, n_sources: int) -> None:
    """Raise UsageError if there is no attention over a source to draw, or more than one source."""
    n_layers = loaded.config.n_layers
    if loaded.source_tokenizer is None:
        raise UsageError(
            f"--attention-plot: {loaded.path} is a decoder-only model, which reads no source",
            "Give --model an encoder-decoder, of train-seq2seq for example.",
        )
    if (settings.attention_layer or 1) > n_layers:
        raise UsageError(
            f"--attention-layer: {settings.attention_layer} is too large (the decoder's layers are "
            f"1 to {n_layers})"
        )
    if n_sources > 1:
        raise UsageError(
            f"--attention-plot: draws one source (found {n_sources})", "Give one with --prompt."
        )


def draw(
    settings: Settings, loaded: Checkpoint, source: list[int], result: Result, out: Output
) -> None:
    """The plot of what each token of `result`, the best of its source, read from the source."""
    from kvtool.core.decoding.attention_maps import cross_attention_weights, labels, visible
    from kvtool.core.kernels.default import make_kernels
    from kvtool.ui.heat_maps import attention_plot

    path = settings.attention_plot
    assert loaded.source_tokenizer is not None and path is not None
    n_layers = loaded.config.n_layers
    layer = settings.attention_layer or n_layers
    kernels = make_kernels(settings.kernels)
    weights = cross_attention_weights(loaded.model, source, result.ids, layer - 1, kernels)
    title = f"Cross-attention of decoder layer {layer} of {n_layers}"
    about = caption(measured_on(settings, loaded.facts))
    attention_plot(
        path,
        weights.tolist(),
        labels(loaded.source_tokenizer, source),
        labels(loaded.tokenizer, result.ids),
        [title, about, f"{shorten(visible(result.prompt))} → {shorten(visible(result.text))}"],
    )
    out.note(f"plot: {path}")


def shorten(text: str, width: int = 60) -> str:
    """The start of `text`.

    >>> shorten("To be, or not to be", 10)
    'To be, or…'
    """
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"
