"""The subject of bench: the model, whether the longest run fits, and the text for lossy kinds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvtool.commands.bench.peers import agreed
from kvtool.commands.bench.settings import KINDS, KVTOOL, TRANSFORMERS
from kvtool.errors import CapacityError, FileError, UsageError
from kvtool.registry import with_own_window
from kvtool.ui.output import Output

if TYPE_CHECKING:
    import torch

    from kvtool.commands.bench.settings import Settings
    from kvtool.core.bench.timing import Contender, Work
    from kvtool.core.checkpoint.checkpoint import Checkpoint
    from kvtool.core.models import Model

QUALITY_TOKENS = 512  # of the model's own text, where no other is given


class OwnSubject:
    """A model of kvtool in each number format, and transformers' of the same weights if asked for.

    `settings` are those that were given, with the model's own window for kinds that have one.
    Raises FileError and CapacityError.
    """

    def __init__(
        self,
        settings: Settings,
        lengths: list[int],
        device: torch.device,
        formats: Mapping[str, torch.dtype],
        out: Output,
    ) -> None:
        from kvtool.core.cache import settings_of

        self.device, self.out = device, out
        self.models = {
            name: load_model(settings, device, dtype, out if name == settings.run.dtype else None)
            for name, dtype in reversed(
                list(formats.items())
            )  # the first one last, as if it was alone
        }
        self.loaded, self.model = self.models[settings.run.dtype]
        config = self.model.config
        caches = [with_own_window(kind, config.window) for kind in settings.caches]
        self.settings = settings = replace(settings, caches=list(dict.fromkeys(caches)))
        largest = replace(settings, batch_size=max(settings.batch_sizes))
        for dtype in formats.values():
            check_fits(largest, lengths, config, device, dtype)
        self.longest = lengths[-1]
        self.facts = {
            **self.loaded.facts,
            "cache_settings": {kind: settings_of(kind) for kind in settings.caches},
            "lossy": self.lossy(),
        }
        if self.model is not self.loaded.model:
            changed = f"with {settings.n_kv_heads} key-value heads and random weights"
            self.facts["changed"] = changed

    def lossy(self) -> list[str]:
        """The kinds that change what is predicted."""
        from kvtool.core.cache import CacheSpec, make_cache

        spec = CacheSpec.of(self.model.config, 1, 1)
        return [kind for kind in self.settings.caches if make_cache(kind, spec).loses]

    def contenders(self, resolved: dict[str, Any]) -> list[Contender]:
        """The contenders: each kind, of one implementation and setup after the other.

        transformers' models are loaded and compared with ours, of which `resolved` is told. Raises
        what `agreed` raises.
        """
        from kvtool.core.bench.timing import Contender

        settings = self.settings
        self.ids = read_ids(settings, self.loaded, self.device)
        works = self._works(resolved)
        has = {KVTOOL: settings.caches, TRANSFORMERS: [k for k in settings.caches if k in KINDS]}
        left_out = [kind for kind in settings.caches if kind not in KINDS]
        if left_out and TRANSFORMERS in settings.impl:
            self.out.note(
                f"transformers: not measured with {', '.join(left_out)}, kinds of kvtool's"
            )
        return [
            Contender(kind, works[impl, setup.dtype, setup.batch_size], impl, setup)
            for kind in settings.caches
            for impl in settings.impl
            if kind in has[impl]
            for setup in settings.setups
        ]

    def _works(self, resolved: dict[str, Any]) -> dict[tuple[str, str, int], Work]:
        """What generates, by implementation, number format and batch."""
        import torch

        from kvtool.core.bench.peers import TransformersGenerate
        from kvtool.core.bench.timing import Workload
        from kvtool.core.kernels.default import make_kernels
        from kvtool.core.native import arrays as native

        settings, config = self.settings, self.model.config
        n_vocab, n_rows = config.source_vocab_size or config.vocab_size, max(settings.batch_sizes)
        prompts = torch.randint(n_vocab, (n_rows, settings.start[1])).to(self.device)
        kernels, decode_only = make_kernels(settings.kernels), settings.depth is not None
        works: dict[tuple[str, str, int], Work] = {}
        for name in settings.dtypes:
            loaded, model = self.models[name]
            native.prepare(next(model.parameters()))  # or compiling would be timed
            for batch in settings.batch_sizes:
                work = Workload(model, prompts[:batch], kernels, decode_only)
                works[KVTOOL, name, batch] = work
            if TRANSFORMERS not in settings.impl:
                continue
            kinds = [kind for kind in settings.caches if kind in KINDS]
            first = works[KVTOOL, name, settings.batch_size]
            assert isinstance(first, Workload)
            folder = loaded.path if model is loaded.model else None
            other = agreed(first, kinds, folder, resolved, self.out)
            for batch in settings.batch_sizes:
                theirs = TransformersGenerate(other, prompts[:batch], decode_only)
                works[TRANSFORMERS, name, batch] = theirs
        self.ours = [work for work in works.values() if isinstance(work, Workload)]
        return works

    @property
    def n_start(self) -> int:
        """How many tokens decoding starts from."""
        return self.ours[0].n_start

    def weights_read(self) -> dict[str, int]:
        """Bytes of weights that a step reads, by number format."""
        from kvtool.core.bench.traffic import weights_read

        return {name: weights_read(model) for name, (_, model) in self.models.items()}

    def qualities(self) -> dict[str, dict[str, Any]]:
        """The accuracy of each lossy kind, in the first number format."""
        return qualities(self.settings, self.model, self.ids, self.longest, self.out)

    def tell_decoded(self) -> None:
        """Say how steps were decoded, if more is to be said."""
        for work in self.ours:
            if told := work.decode.summary():
                self.out.detail(f"decoded {told}")

    def check(self) -> None:
        """Raise if the weights changed meanwhile."""
        for loaded, _ in self.models.values():
            loaded.digest()


def load_model(
    settings: Settings, device: Any, dtype: Any, out: Output | None
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
    if out is not None:
        out.note(
            f"random weights: those of {loaded.path.name} have {config.n_kv_heads} key-value "
            f"heads, not {settings.n_kv_heads}"
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
