"""The subject of bench --impl transformers: any causal model of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvtool.commands.bench.settings import TRANSFORMERS
from kvtool.errors import CacheOpUnsupported, FileError, UsageError
from kvtool.files import is_gguf, model_folder
from kvtool.reading import MAX_CONFIG_BYTES, read_json_object
from kvtool.ui.output import Output

if TYPE_CHECKING:
    import torch

    from kvtool.commands.bench.settings import Settings
    from kvtool.core.bench.timing import Contender, Work


def is_foreign(settings: Settings) -> bool:
    """Whether only transformers is asked for, with a model that kvtool has not."""
    if settings.impl != (TRANSFORMERS,):
        return False
    from kvtool.config import own_types
    from kvtool.core.checkpoint.families import FAMILIES

    try:
        folder = model_folder(settings.run.model)
    except FileError:
        return True  # a type, or nothing, as loading it finds
    if folder.is_file() and is_gguf(folder):
        return False
    path = folder / "config.json"
    found = read_json_object(path, "a configuration", MAX_CONFIG_BYTES, finite=False)
    return found.get("model_type") not in (*FAMILIES, *own_types())


class ForeignSubject:
    """A causal model of transformers in each number format.

    Raises UsageError, FileError and CapacityError.
    """

    n_start: int

    def __init__(
        self,
        settings: Settings,
        lengths: list[int],
        device: torch.device,
        formats: Mapping[str, torch.dtype],
        out: Output,
    ) -> None:
        from kvtool.core.bench.foreign import load_foreign, require_room

        for flag, given in (("--n-kv-heads", settings.n_kv_heads), ("--text", settings.text)):
            if given:
                raise UsageError(f"{flag}: is for models of kvtool", "Leave it out.")
        self.settings, self.out = settings, out
        name, folder = settings.run.model, None
        with contextlib.suppress(FileError):  # then it is a type, or nothing
            folder = model_folder(name)
        self.models = {
            key: load_foreign(str(folder or name), settings.run.seed, device, dtype)
            for key, dtype in formats.items()
        }
        first = self.models[settings.run.dtype]
        flag, self.n_start = settings.start
        require_room(first, flag, self.n_start, lengths[-1] + (settings.depth is not None))
        if first.note:
            out.note(first.note)
        self.facts = {
            "model": str(folder or name),
            "sha256": first.sha256,
            "architecture": type(first.model).__name__,
            "attention": first.model.config._attn_implementation,
            "built": first.note if folder else f"tiny, with random weights {first.note}".strip(),
            "lossy": [],
        }

    def contenders(self, resolved: dict[str, Any]) -> list[Contender]:
        """Each kind that the model can do, of one setup after the other; of others it says why not.

        Raises UsageError if it can do none.
        """
        import torch

        from kvtool.core.bench.foreign import usable
        from kvtool.core.bench.peers import TransformersGenerate
        from kvtool.core.bench.timing import Contender

        settings = self.settings
        works: dict[tuple[str, str, int], Work] = {}
        kinds, refused = [], []
        for kind in settings.caches:
            try:
                for name, found in self.models.items():
                    torch.manual_seed(settings.run.seed)
                    prompts = found.prompts(max(settings.batch_sizes), self.n_start)
                    for batch in settings.batch_sizes:
                        work = TransformersGenerate(
                            found.model, prompts[:batch], settings.depth is not None
                        )
                        works[kind, name, batch] = usable(work, kind)
            except CacheOpUnsupported as error:
                refused.append(error.message)
                continue
            kinds.append(kind)
        if not kinds:
            raise UsageError(f"--model {settings.run.model}: {refused[0]}")
        for why in refused:
            self.out.note(f"not measured: {why}")
        resolved["not_measured"] = refused
        self.settings = replace(settings, caches=kinds)
        return [
            Contender(kind, works[kind, setup.dtype, setup.batch_size], TRANSFORMERS, setup)
            for kind in kinds
            for setup in settings.setups
        ]

    def weights_read(self) -> dict[str, int]:
        """None is known."""
        return dict.fromkeys(self.settings.dtypes, 0)

    def qualities(self) -> dict[str, dict[str, Any]]:
        """None: its kinds lose nothing."""
        return {}

    def tell_decoded(self) -> None:
        """Nothing: transformers decodes in one way."""

    def check(self) -> None:
        """Nothing: all was read."""
