"""The configuration of a saved folder, read strictly: nothing that it names is loaded."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvtool.config import own_types
from kvtool.core.checkpoint.checkpoint import CONFIG
from kvtool.core.checkpoint.safetensors_file import DTYPES
from kvtool.core.checkpoint.weight_files import refuse_lookalike
from kvtool.core.verify.hf.library import SEQ2SEQ, kind_of
from kvtool.errors import FileError
from kvtool.reading import MAX_CONFIG_BYTES, quoted, read_json_object

ADAPTER = "adapter_config.json"
# Fields of a configuration that have something else loaded, or the model changed as it is built.
REFUSED = {
    "quantization_config": "quantized weights are not judged",
    "compression_config": "quantized weights are not judged",
    "transformers_weights": "weights are read from the names that they always have",
    "fusion_config": "a model is judged as it is written",
    "distributed_config": "a model is judged on one device",
    "gguf_file": "weights are read from safetensors or pickles",
}
IMPLEMENTATIONS = re.compile(r"_?(attn|experts)_implementation(_internal)?")
PLAIN_NAME = re.compile(r"\w+", re.ASCII)  # an "org/name" has code fetched from the hub
FORMATS = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
MAX_LABELS = 100_000  # of which a configuration makes two tables of names


def read_settings(folder: Path) -> dict[str, Any]:
    """What config.json says, if nothing in it has anything loaded from elsewhere.

    Raises FileError.
    """
    path = folder / CONFIG
    refuse_lookalike(path, "a configuration")
    # Not finite: time steps of state-space models really end at Infinity.
    settings = read_json_object(path, "a configuration", MAX_CONFIG_BYTES, finite=False)
    if (folder / ADAPTER).exists():
        raise FileError(
            f"{folder / ADAPTER}: is of an adapter (expected a whole model)",
            "Merge it into its model and save that.",
        )
    for name, value in all_fields(settings):
        _check_field(name, value, path)
    settings.pop("auto_map", None)  # where code would lie; none is run
    _check_type(settings.get("model_type"), path)
    return settings


def _check_type(kind: Any, path: Path) -> None:
    from transformers import CONFIG_MAPPING

    if not isinstance(kind, str):
        raise FileError(f"{path}: model_type is missing or not a string")
    if kind not in CONFIG_MAPPING:
        raise FileError(
            f"{path}: model_type {quoted(kind)} is none that transformers knows",
            "It is kvtool's own: leave out --impl transformers." if kind in own_types() else "",
        )


def all_fields(value: Any) -> Iterator[tuple[str, Any]]:
    """All names with their values, at any depth."""
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, (dict, list)):
            yield from all_fields(item)
    if isinstance(value, dict):
        yield from value.items()


def _check_field(name: str, value: Any, path: Path) -> None:
    """Raise FileError for a field that has something loaded, or that asks for too much."""
    if value is None:
        return
    if name in REFUSED:
        raise FileError(f"{path}: {name} is not supported ({REFUSED[name]})")
    each = value.values() if isinstance(value, dict) else [value]
    given = [part for part in each if part is not None]
    if IMPLEMENTATIONS.fullmatch(name):
        _check_implementations(name, given, path)
    elif name in ("num_labels", "_num_labels"):
        _check_labels(name, value, path)
    elif name in ("dtype", "torch_dtype"):
        _check_formats(name, given, path)


def _check_implementations(name: str, given: Sequence[Any], path: Path) -> None:
    for value in given:
        if not (isinstance(value, str) and PLAIN_NAME.fullmatch(value)):
            raise FileError(
                f"{path}: {name} is {quoted(value)} (expected a plain name, as sdpa)",
                "kvtool loads no code for a checkpoint.",
            )


def _check_labels(name: str, value: Any, path: Path) -> None:
    if isinstance(value, (int, float)) and value > MAX_LABELS:
        raise FileError(f"{path}: {name} is {value} (expected {MAX_LABELS:,} or fewer)")


def _check_formats(name: str, given: Sequence[Any], path: Path) -> None:
    for value in given:
        plain = value.removeprefix("torch.") if isinstance(value, str) else ""
        if plain not in (*FORMATS, "auto"):
            raise FileError(
                f"{path}: {name} is {quoted(value)} (expected one of {', '.join(FORMATS)})"
            )


def make_config(settings: Mapping[str, Any]) -> Any:
    """What transformers makes of the fields of a configuration. Raises what it raises."""
    from transformers import AutoConfig

    # Through a folder of our own: which class a type means is decided where it reads one.
    with tempfile.TemporaryDirectory(prefix="kvtool-") as folder:
        Path(folder, CONFIG).write_text(json.dumps(settings), encoding="utf-8")
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def class_of(config: Any, where: Path) -> tuple[Any, Any]:
    """The class of the model that a configuration describes, as AutoModel would choose it, and the
    configuration of that class: of a part, where a type that reads images has a decoder of text.

    Raises FileError for a type without a model that writes text.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    whole = config.is_encoder_decoder and kind_of(config.model_type) == SEQ2SEQ
    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if whole else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        raise FileError(f"{where}: model_type {config.model_type} has no model that writes text")
    found: Any = mapping[type(config)]
    if isinstance(found, (list, tuple)):
        found = _listed(found, getattr(config, "architectures", None) or [])
    if found.config_class is not None and not isinstance(config, found.config_class):
        config = config.get_text_config()
    return found, config


def _listed(classes: Sequence[Any], architectures: Sequence[str]) -> Any:
    """The first class that a configuration lists, or else the first of all."""
    named = {each.__name__: each for each in classes}
    return next((named[name] for name in architectures if name in named), classes[0])
