"""A causal model of transformers that kvtool has not: a folder of any type, or a tiny one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtool.core.bench.peers import TransformersGenerate
from kvtool.core.verify.hf.check import load_model
from kvtool.core.verify.hf.folder import read_folder
from kvtool.core.verify.hf.library import quiet_transformers, use_eager_experts
from kvtool.core.verify.hf.subject import context, hub_decoder, ordinary_ids
from kvtool.core.verify.hf.tiny import tiny_model
from kvtool.errors import (
    CacheOpUnsupported,
    CapacityError,
    UsageError,
    first_line,
    pass_on_shortage,
)

TRIAL = 2  # tokens


@dataclass(frozen=True)
class Foreign:
    """A model of transformers, and where it is from."""

    model: Any  # a PreTrainedModel, in eval mode
    note: str  # what is special about how it was built
    sha256: str | None  # of its weights, if they are from a folder

    @property
    def context(self) -> int:
        """How many tokens it takes."""
        return context(self.model.config)

    def prompts(self, n_rows: int, n_tokens: int) -> Tensor:
        """Random prompts (B,P) of tokens that mean a word."""
        ids = ordinary_ids(self.model.config)
        return ids[torch.randint(len(ids), (n_rows, n_tokens))].to(self.model.device)


def load_foreign(name: str, seed: int, device: torch.device, dtype: torch.dtype) -> Foreign:
    """The causal model in a folder, or a tiny random one of a type.

    Raises UsageError, FileError and CapacityError.
    """
    digest: str | None
    if os.path.isdir(name):
        model, digest = read_folder(Path(name), dtype)
        use_eager_experts(model)
        note = ""
    else:
        model, note, digest = load_model(name, seed)
    if model.config.is_encoder_decoder:
        try:  # a type that has both: as a sweep takes it
            model, note = tiny_model(name, seed)
        except UsageError:
            model = None
        if model is None or digest is not None or model.config.is_encoder_decoder:
            raise UsageError(
                f"--model {name}: is an encoder-decoder of transformers (expected a causal model)",
                "kvtool's own encoder-decoders are measured with --impl kvtool.",
            )
    return Foreign(model.to(device, dtype), note, digest)


def require_room(found: Foreign, flag: str, n_prompt: int, longest: int) -> None:
    """Raise CapacityError if the longest run exceeds the model's context."""
    if n_prompt + longest > found.context:
        raise CapacityError(
            f"--lengths {longest}: behind {flag} {n_prompt} is beyond the context (the model holds "
            f"{found.context})",
            f"The longest that fits is {max(found.context - n_prompt, 0)}.",
        )


def usable(work: TransformersGenerate, kind: str) -> TransformersGenerate:
    """The work, called as the model takes this kind of cache, and tried for two tokens.

    Raises CacheOpUnsupported if the model cannot generate with it.
    """
    if kind != "none":
        with quiet_transformers():
            decoder = hub_decoder(work.model, kind, ordinary_ids(work.model.config))
        work = TransformersGenerate(work.model, work.prompt, work.decode_only, decoder.plan.cache)
    try:
        work.run(kind, TRIAL)
    except Exception as error:  # of whatever lies in transformers
        pass_on_shortage(error)
        raise CacheOpUnsupported(kind, "be used", first_line(error)) from error
    return work
