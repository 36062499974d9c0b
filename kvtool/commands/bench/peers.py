"""bench --impl: which implementations are measured, with which kinds, and whether they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from kvtool.commands.bench.settings import KINDS, KVTOOL, TRANSFORMERS
from kvtool.registry import IMPLEMENTATIONS, choose
from kvtool.ui.lists import list_option
from kvtool.ui.output import Output

if TYPE_CHECKING:
    from kvtool.commands.bench.settings import Settings
    from kvtool.core.bench.timing import Contender, Workload
    from kvtool.core.checkpoint.checkpoint import Checkpoint


def implementation(text: str, flag: str) -> str:
    """One implementation. Raises UsageError with the nearest name."""
    return choose(text, IMPLEMENTATIONS, flag)


Impls = Annotated[
    list[str],
    list_option(
        "--impl",
        element=implementation,
        example="kvtool transformers",
        help=f"Whose code runs the model: kvtool, transformers (kinds {', '.join(KINDS)}), or both "
        "in turns.",
        metavar="NAME...",
        unique=True,
        complete=lambda: list(IMPLEMENTATIONS),
    ),
]


def facts(settings: Settings) -> dict[str, Any]:
    """Facts about the other implementations. Raises UsageError if one is not installed."""
    if TRANSFORMERS not in settings.impl:
        return {}
    from kvtool.core.verify.hf.library import need_transformers

    return {"transformers": need_transformers()}


def make_contenders(
    settings: Settings, loaded: Checkpoint, work: Workload, resolved: dict[str, Any], out: Output
) -> list[Contender]:
    """The contenders: each kind, of one implementation after the other.

    transformers' model is loaded and compared with ours first, and `resolved` told what came of it.
    Raises UsageError, FileError, CapacityError, and CheckFailed if they do other work.
    """
    from kvtool.core.bench.timing import Contender

    works: dict[str, Any] = {KVTOOL: work}
    has = {KVTOOL: settings.caches, TRANSFORMERS: [k for k in settings.caches if k in KINDS]}
    if TRANSFORMERS in settings.impl:
        works[TRANSFORMERS] = _transformers(loaded, work, has[TRANSFORMERS], resolved, out)
        left_out = [kind for kind in settings.caches if kind not in KINDS]
        if left_out:
            out.note(f"transformers: not measured with {', '.join(left_out)}, kinds of kvtool's")
    return [
        Contender(kind, works[impl], impl)
        for kind in settings.caches
        for impl in settings.impl
        if kind in has[impl]
    ]


def _transformers(
    loaded: Checkpoint, ours: Workload, kinds: Sequence[str], resolved: dict[str, Any], out: Output
) -> Any:
    from kvtool.core.bench.peers import TransformersGenerate, agreement, load_peer, source_of

    source = source_of(loaded.path) if ours.model is loaded.model else None
    model = load_peer(source, ours.model)
    work = TransformersGenerate(model, ours.prompt, ours.decode_only)
    found = agreement(ours, work, kinds, built=source is None)
    resolved["architecture"] = type(model).__name__
    resolved["attention"] = model.config._attn_implementation
    resolved["agreement"] = asdict(found)
    out.note(f"transformers {resolved['transformers']}, {resolved['architecture']}: {found}")
    return work
