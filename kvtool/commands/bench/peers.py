"""bench --impl: what is known of transformers, and whether it does the same work as kvtool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.commands.bench.settings import TRANSFORMERS
from kvtool.ui.output import Output

if TYPE_CHECKING:
    from kvtool.commands.bench.settings import Settings
    from kvtool.core.bench.timing import Workload


def facts(settings: Settings) -> dict[str, Any]:
    """Facts about the other implementations. Raises UsageError if one is not installed."""
    if TRANSFORMERS not in settings.impl:
        return {}
    from kvtool.core.verify.hf.library import need_transformers

    return {"transformers": need_transformers()}


def agreed(
    work: Workload, kinds: Sequence[str], folder: Path | None, resolved: dict[str, Any], out: Output
) -> Any:
    """transformers' model with the weights of `work`, after a comparison with ours, of which
    `resolved` is told; from a folder if it can read that itself.

    Raises UsageError, FileError, CapacityError, and CheckFailed if it does other work.
    """
    from kvtool.core.bench.peers import TransformersGenerate, agreement, load_peer, source_of

    source = None if folder is None else source_of(folder)
    model = load_peer(source, work.model)
    theirs = TransformersGenerate(model, work.prompt, work.decode_only)
    found = agreement(work, theirs, kinds, built=source is None)
    resolved["architecture"] = type(model).__name__
    resolved["attention"] = model.config._attn_implementation
    resolved.setdefault("agreement", asdict(found))  # of the first number format
    out.note(f"transformers {resolved['transformers']}, {resolved['architecture']}: {found}")
    return model
