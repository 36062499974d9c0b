"""transformers' `generate` of the same model, to be timed in turns with kvtool."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtool.core.bench.timing import TimedRun, Workload, now
from kvtool.core.cache import CacheSpec, make_cache
from kvtool.core.checkpoint.families import FAMILIES
from kvtool.core.checkpoint.weight_files import CONFIG
from kvtool.core.decoding.engine import generate
from kvtool.core.decoding.sampling import Sampler
from kvtool.core.machine import require_memory
from kvtool.core.models import Model
from kvtool.core.reference.witness import IMPL, witness
from kvtool.core.verify.compare import distances
from kvtool.core.verify.hf import caches
from kvtool.core.verify.hf.folder import read_folder
from kvtool.core.verify.hf.library import quiet_transformers
from kvtool.errors import CheckFailed, FileError
from kvtool.reading import MAX_CONFIG_BYTES, read_json_object

COMPARED_PROMPT, COMPARED = 32, 16  # tokens of the prompt; generated tokens that are compared
# Of the largest logit. Rounding in float32 leaves about 1e-6 of it, other mathematics 1e-3 or more;
# `verify-logits --against transformers` draws the line in float64.
ROUNDING = 1e-4


class Clock:
    """A streamer of `generate` that notes when the prompt and each token arrived, in seconds."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stamps: list[float] = []

    def put(self, tokens: Tensor) -> None:
        """Note the time, in seconds, at which these tokens arrived."""
        self.stamps.append(now(self.device))

    def end(self) -> None:
        """Does nothing: no token is held back."""


@dataclass
class TransformersGenerate:
    """Greedy `generate` of a model of transformers from prompts (B,P), as work for `timing`.

    As its users call it, so that a token's time includes what its loop does around the model: but
    nothing ends it early, nothing changes the logits, and nothing is compiled, as in our own loop.
    The cache is made by transformers for each run: a DynamicCache, a StaticCache of the length that
    is needed, or none (use_cache=False).
    """

    model: Any
    prompt: Tensor
    decode_only: bool = False
    parameter: str = "past_key_values"  # of the model's forward, that takes a cache
    seen: Tensor = field(init=False)

    def __post_init__(self) -> None:
        from transformers import GenerationConfig

        self.seen = torch.ones_like(self.prompt)
        # In place of the model's own, which may ask for an end, a penalty or a temperature.
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=None, pad_token_id=0, disable_compile=True
        )

    def run(self, kind: str, length: int) -> TimedRun:
        """Generate `length` tokens a row; with decode_only, after a first one that is not timed."""
        n_new = length + self.decode_only
        clock = Clock(self.prompt.device)
        with quiet_transformers():
            started = now(clock.device)
            _, cache = self._generate(kind, n_new, clock)
        stamps = clock.stamps[1:]  # the first is of the prompt, which generate hands on at once
        nbytes = 0 if cache is None else cache_nbytes(cache)
        return TimedRun.of(started, stamps, nbytes, decode_only=self.decode_only)

    def predicted(self, kind: str, length: int) -> int | None:
        """None: nothing is predicted of transformers' caches."""
        return 0 if kind == "none" else None

    def tokens(self, kind: str, n_new: int) -> Tensor:
        """The tokens (B,n_new) that it generates."""
        with quiet_transformers():
            return self._generate(kind, n_new, None)[0][:, self.prompt.shape[1] :]

    def _generate(self, kind: str, n_new: int, clock: Clock | None) -> tuple[Tensor, Any]:
        """All ids (B,P+n_new), and the cache that was filled."""
        given: dict[str, Any] = {"use_cache": False}
        if kind != "none":
            capacity = self.prompt.shape[1] + n_new
            given = {self.parameter: caches.make_cache(kind, self.model.config, capacity)}
        with torch.inference_mode():
            ids = self.model.generate(
                self.prompt, attention_mask=self.seen, max_new_tokens=n_new, streamer=clock, **given
            )
        return ids, given.get(self.parameter)


def cache_nbytes(cache: Any) -> int:
    """Bytes of the storages behind all tensors of a cache of transformers, each counted once."""
    tensors = [t for layer in cache.layers for value in vars(layer).values() for t in _held(value)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _held(value: Any) -> list[Tensor]:
    """The tensors in a field of a layer: states of some types are lists or tables."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [t for part in parts for t in _held(part)] if isinstance(value, (dict, list)) else []


def source_of(folder: Path) -> Path | None:
    """The folder, or None if transformers cannot read it by itself. Raises FileError."""
    if folder.is_file():  # GGUF
        return None
    kind = read_json_object(folder / CONFIG, "a configuration", MAX_CONFIG_BYTES).get("model_type")
    return folder if kind in FAMILIES else None


def load_peer(source: Path | None, model: Model) -> Any:
    """transformers' model with the weights of `model`, in its format and on its device: read from
    `source`, a folder of Hugging Face, or built from them.

    Raises UsageError for a model that transformers has not, FileError and CapacityError.
    """
    weight = next(model.parameters())
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    for_check = 0 if weight.dtype == torch.float32 else 2 * 4  # `agreement` copies both models
    require_memory(
        f"{IMPL}: a second model", n_weights * (weight.itemsize + for_check), weight.device
    )
    if source is not None:
        try:
            return read_folder(source, weight.dtype).model.to(weight.device)
        except FileError as error:
            raise FileError(f"{IMPL}: {error.message}", error.hint) from error
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    arrays = {name: t.detach().to("cpu", exact).numpy() for name, t in model.state_dict().items()}
    made = witness(arrays, model.config, weight.dtype, IMPL)
    return made.requires_grad_(False).to(weight.device)


# --- the same work


@dataclass(frozen=True)
class Agreement:
    """How far two implementations agree, in float32."""

    tokens: int  # compared, in all rows together
    same: int  # before a row's first difference, at the kind of cache where they are fewest
    gap: float  # between logits of one uncached pass, of the largest
    margin: float | None  # of the two tokens' logits where choices differ first, at most; likewise

    @property
    def right(self) -> bool:
        """Whether the two differ by rounding alone."""
        return self.gap <= ROUNDING and (self.margin is None or self.margin <= ROUNDING)

    def __str__(self) -> str:
        if self.margin is None:
            found = f"the same {self.tokens} greedy tokens as kvtool"
        else:
            found = (
                f"{self.same} of {self.tokens} greedy tokens as kvtool, up to two tokens whose "
                f"logits are {self.margin:.1e} apart"
            )
        logits = f"within {self.gap:.1e}" if self.gap else "equal bit for bit"
        return f"{found} in float32, logits {logits}"


def agreement(
    ours: Workload, theirs: TransformersGenerate, kinds: Sequence[str], built: bool = False
) -> Agreement:
    """Compare our greedy tokens with those of each kind of their caches, in a short run in float32.

    built: their model was built from ours. Raises CheckFailed if logits, or those of two tokens
    that were chosen, differ by more than rounding.
    """
    prompt = ours.prompt[:, :COMPARED_PROMPT]
    n_new = min(COMPARED, ours.model.config.context - prompt.shape[1])
    model, other = _in_float32(ours.model), theirs.model
    if model is not ours.model:
        # What is computed for ours, such as sinusoids, is a weight of theirs, and was rounded.
        other = load_peer(None, model) if built else _in_float32(other)
    tokens = _tokens(replace(ours, model=model, prompt=prompt), n_new)
    peer = TransformersGenerate(other, prompt)
    ids = torch.cat([prompt, tokens], dim=1)
    with torch.inference_mode():
        logits, others = model(ids), other(ids, use_cache=False).logits
    chosen = logits[:, prompt.shape[1] - 1 : -1]  # (B,n_new,V), from which our tokens were taken
    found = [_first_differences(tokens, peer.tokens(kind, n_new), chosen) for kind in kinds]
    same = min(n for n, _ in found)
    margin = max((m for _, m in found if m is not None), default=None)
    (gap,) = distances([logits], [others])
    result = Agreement(tokens.numel(), same, gap, margin)
    if not result.right:
        raise CheckFailed(
            f"{IMPL}: generates something else than kvtool ({result})",
            "kvtool verify-logits --against transformers tells whether it is a bug.",
        )
    return result


def _in_float32(model: Any) -> Any:
    is_float32 = next(model.parameters()).dtype == torch.float32
    return model if is_float32 else copy.deepcopy(model).float()


def _tokens(work: Workload, n_new: int) -> Tensor:
    """Our greedy tokens (B,n_new)."""
    batch, n_prompt = work.prompt.shape
    spec = CacheSpec.of(
        work.model.config, batch, n_prompt + n_new, torch.float32, work.prompt.device, work.kernels
    )
    cache = make_cache("dynamic", spec)
    return torch.stack(list(generate(work.model, work.prompt, cache, n_new, Sampler())), dim=1)


def _first_differences(ours: Tensor, theirs: Tensor, logits: Tensor) -> tuple[int, float | None]:
    """How many tokens (B,T) agree before each row's first difference, and the largest distance
    between the logits (B,T,V) of the two tokens there, relative to the largest logit. None: no
    difference."""
    differs = (ours != theirs).int()
    same = differs.cumsum(1).eq(0).sum(1)  # (B,)
    margins = [
        float((logits[row, at, ours[row, at]] - logits[row, at, theirs[row, at]]).abs())
        for row, at in enumerate(same.tolist())
        if at < ours.shape[1]
    ]
    largest = float(logits.abs().max())
    return int(same.sum()), max(margins) / largest if margins else None
