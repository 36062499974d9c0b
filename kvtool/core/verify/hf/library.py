"""What the installed transformers knows, and how it is made quiet."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvtool.errors import FileError, KvtoolError, UsageError, first_line, pass_on_shortage
from kvtool.hub import offline
from kvtool.registry import TRANSFORMERS_MODELS

CAUSAL, SEQ2SEQ = TRANSFORMERS_MODELS  # kinds of models
INSTALL = "Install it with: pip install 'kvtool[hf]'"


def need_transformers() -> str:
    """The version of transformers. Raises UsageError if it is not installed."""
    offline()
    try:
        import transformers
    except ImportError as error:
        raise UsageError("--impl transformers: transformers is not installed", INSTALL) from error
    return str(transformers.__version__)


@functools.cache
def known_types(kind: str = CAUSAL) -> tuple[str, ...]:
    """The model types of which the installed transformers has a causal language model, sorted; or
    of which it has an encoder-decoder that reads and writes text."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto

    if kind == CAUSAL:
        return tuple(sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    names = sorted(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    return tuple(n for n in names if getattr(CONFIG_MAPPING[n], "is_encoder_decoder", False))


def is_type(name: str) -> bool:
    """Whether transformers knows a model type of that name."""
    return name in known_types(CAUSAL) or name in known_types(SEQ2SEQ)


def kind_of(model_type: str) -> str:
    """What a type means where nobody says which: the encoder-decoder, if there is one."""
    return SEQ2SEQ if model_type in known_types(SEQ2SEQ) else CAUSAL


def use_eager_experts(model: Any) -> None:
    """Let a mixture of experts compute them one by one: its faster kernels have no float64."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the warnings and bars of transformers."""
    from transformers.utils import logging as bars

    logger = logging.getLogger("transformers")
    level, shown = logger.level, bars.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    bars.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if shown:
            bars.enable_progress_bar()


@contextlib.contextmanager
def in_one_line(where: Path | str) -> Iterator[None]:
    """Within, what transformers raises becomes a FileError in one line, without its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except KvtoolError:
        raise
    except (Exception, SystemExit) as error:
        pass_on_shortage(error)
        why = first_line(error) or type(error).__name__
        raise FileError(f"{where}: transformers cannot read it ({why})") from error
