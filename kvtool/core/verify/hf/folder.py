"""A model of transformers from a saved folder, of which transformers itself opens no file.

All that lies in the folder is read by kvtool, by the rules of its own models: the configuration
strictly, weights by their header, shards beside their index, pickles bounded. transformers is given
what was read. It builds the model first without weights, within limits, and says which tensors it
misses, does not know or finds misshapen; any of them is refused, since it would draw what is
missing at random and judge that.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from kvtool.config import own_types
from kvtool.core.checkpoint.safetensors_file import DTYPES, STORED_DTYPES
from kvtool.core.checkpoint.sizes import CPU, SMALLER, n_bytes, require_tables, stored_dtype
from kvtool.core.checkpoint.weight_files import (
    CONFIG,
    WeightFile,
    open_weights,
    refuse_lookalike,
    refuse_names,
    require_finite,
    wrong_shape,
)
from kvtool.core.limited import limited
from kvtool.core.machine import dtype_name, require_memory
from kvtool.core.verify.hf.library import SEQ2SEQ, kind_of, quiet_transformers
from kvtool.core.verify.hf.tiny import LAYERS
from kvtool.errors import FileError, KvtoolError, first_line, pass_on_shortage
from kvtool.hub import offline
from kvtool.reading import MOST_CONFIG, quoted, read_json_object, short

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
DEPTHS = (*LAYERS, "encoder_layers")  # fields that say how often something is built
# Of what a model is built without its weights: tied tensors are built more than once, and a
# thousand of them, or a few million numbers, cost nothing.
TIED, SLACK, MOST_FREE = 8, 1000, 2**24
MOST_LABELS = 100_000  # of which a configuration makes two tables of names


class Read(NamedTuple):
    """What a folder holds."""

    model: Any  # a PreTrainedModel, in eval mode, on the CPU
    sha256: str  # of the weights


def read_folder(
    folder: Path, dtype: torch.dtype | None = None, kind: type[Exception] = FileError
) -> Read:
    """The model in a saved folder, in `dtype` or else in the one that its configuration names.

    Nothing is downloaded, and no code that lies beside the weights is run. Raises FileError for
    what is missing, damaged or contradictory, CapacityError, and `kind` for weights that are NaN.
    """
    offline()
    path = folder / CONFIG
    settings = read_settings(folder)
    source = open_weights(folder, STORED_DTYPES)
    _check_depths(settings, source, folder)
    with quiet_transformers(), in_one_line(folder):
        with limited(f"{path}: what it describes"), counted(source, folder):
            made, config = _class_of(make_config(settings), path)
            chosen = dtype or _named_dtype(config) or stored_dtype(source)
            shapes = {
                name: torch.empty(info.shape, dtype=info.dtype, device="meta").as_subclass(_Shape)
                for name, info in source.tensors.items()
            }
            skeleton, info = _load(_without_values(made), config, shapes, chosen)
            _check_names(skeleton, info, source)
        require_memory(str(source.path), _needed(source, chosen), CPU, SMALLER)
        tensors, sha256 = source.read()
        floats = {name: t for name, t in tensors.items() if t.is_floating_point()}
        require_finite(source.path, floats, floats, kind)
        model, _ = _load(made, config, tensors, chosen)
        _check_tied(model, skeleton, source)
    model.config.name_or_path = str(folder)
    return Read(model.eval().requires_grad_(False), sha256)


# --- the configuration


def read_settings(folder: Path) -> dict[str, Any]:
    """What config.json says, if nothing in it has anything loaded from elsewhere.

    Raises FileError.
    """
    path = folder / CONFIG
    refuse_lookalike(path, "a configuration")
    # Not finite: time steps of state-space models really end at Infinity.
    settings = read_json_object(path, "a configuration", MOST_CONFIG, finite=False)
    if (folder / ADAPTER).exists():
        raise FileError(
            f"{folder / ADAPTER}: is of an adapter (expected a whole model)",
            "Merge it into its model and save that.",
        )
    for name, value in _fields(settings):
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


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """All names with their values, at any depth."""
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, (dict, list)):
            yield from _fields(item)
    if isinstance(value, dict):
        yield from value.items()


def _check_field(name: str, value: Any, path: Path) -> None:
    if value is None:
        return
    if name in REFUSED:
        raise FileError(f"{path}: {name} is not supported ({REFUSED[name]})")
    if IMPLEMENTATIONS.fullmatch(name):
        for each in value.values() if isinstance(value, dict) else [value]:
            if each is not None and not (isinstance(each, str) and PLAIN_NAME.fullmatch(each)):
                raise FileError(
                    f"{path}: {name} is {quoted(each)} (expected a plain name, as sdpa)",
                    "kvtool loads no code for a checkpoint.",
                )
    labels = value if name in ("num_labels", "_num_labels") else 0
    if isinstance(labels, (int, float)) and labels > MOST_LABELS:
        raise FileError(f"{path}: {name} is {value} (expected {MOST_LABELS:,} or fewer)")
    if name in ("dtype", "torch_dtype"):
        for each in value.values() if isinstance(value, dict) else [value]:
            plain = each.removeprefix("torch.") if isinstance(each, str) else ""
            if each is not None and plain not in (*FORMATS, "auto"):
                raise FileError(
                    f"{path}: {name} is {quoted(each)} (expected one of {', '.join(FORMATS)})"
                )


def _check_depths(settings: Mapping[str, Any], source: WeightFile, folder: Path) -> None:
    """Raise FileError for more layers than tensors: a configuration lists them all at once."""
    most = max(TIED * len(source.tensors), SLACK)
    for name, value in _fields(settings):
        if name in DEPTHS and isinstance(value, (int, float)) and value > most:
            raise FileError(
                f"{folder / CONFIG}: {name} is {value}, but {source.path.name} holds "
                f"{len(source.tensors)} tensors"
            )


def make_config(settings: Mapping[str, Any]) -> Any:
    """What transformers makes of the fields of a configuration. Raises what it raises."""
    from transformers import AutoConfig

    # Through a folder of our own: which class a type means is decided where it reads one.
    with tempfile.TemporaryDirectory(prefix="kvtool-") as folder:
        Path(folder, CONFIG).write_text(json.dumps(settings), encoding="utf-8")
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _named_dtype(config: Any) -> torch.dtype | None:
    found = getattr(config, "dtype", None)
    return found if isinstance(found, torch.dtype) else None


def _class_of(config: Any, where: Path) -> tuple[Any, Any]:
    """The class of the model that a configuration describes, as AutoModel would choose it, and the
    configuration of that class: of a part, where a type that reads images has a decoder of text."""
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
        named = {each.__name__: each for each in found}
        listed = getattr(config, "architectures", None) or []
        found = next((named[name] for name in listed if name in named), found[0])
    if found.config_class is not None and not isinstance(config, found.config_class):
        config = config.get_text_config()
    return found, config


# --- the model


def _load(made: Any, config: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """The model, and what of its tensors was not there or left over."""
    return made.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        ignore_mismatched_sizes=True,  # they are told, as the others are
        output_loading_info=True,
    )


class _Shape(Tensor):
    """A tensor without values, which stays so when it is moved to where values would be."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in (Tensor.to, Tensor.cpu):
            return super().__torch_function__(func, types, args, kwargs)
        given = (*args[1:], *(kwargs or {}).values())
        dtype = next((each for each in given if isinstance(each, torch.dtype)), args[0].dtype)
        return super().__torch_function__(Tensor.to, types, (args[0], dtype))


def _without_values(made: Any) -> Any:
    """The class, but of models that stay without values where the file has none."""

    def nothing(self: Any, *given: Any, **named: Any) -> None:
        """In place of drawing what is missing."""

    steps = ("_move_missing_keys_from_meta_to_device", "_initialize_missing_keys")
    names = dict.fromkeys(steps, nothing)
    return type(made.__name__, (made,), {**names, "__module__": made.__module__})


@contextmanager
def counted(source: WeightFile, folder: Path) -> Iterator[None]:
    """Raise FileError as soon as more is built than the file can fill."""
    most = TIED * len(source.tensors) + SLACK
    most_numbers = TIED * sum(math.prod(info.shape) for info in source.tensors.values()) + MOST_FREE
    seen: set[tuple[int, str]] = set()
    numbers = tables = 0

    def count(module: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal numbers, tables
        if value is None or (id(module), name) in seen:
            return
        seen.add((id(module), name))
        if isinstance(value, nn.Parameter):
            numbers += value.numel()
        else:
            tables += value.nbytes
        if len(seen) > most or numbers > most_numbers:
            raise FileError(
                f"{folder / CONFIG}: describes a larger model than {source.path.name} holds "
                f"({len(source.tensors)} tensors, {n_bytes(source):,} bytes)"
            )
        require_tables(folder / CONFIG, tables, source)

    with ExitStack() as hooks:
        for register in (
            registration.register_module_parameter_registration_hook,
            registration.register_module_buffer_registration_hook,
        ):
            hooks.callback(register(count).remove)
        yield


def _check_names(model: Any, info: Mapping[str, Any], source: WeightFile) -> None:
    """Raise FileError for tensors that are missing, left over or misshapen, as transformers maps
    their names; what it computes itself may be missing, and what it ignores be left over."""
    missing, extra = (sorted(info.get(name) or ()) for name in ("missing_keys", "unexpected_keys"))
    extra = extra or _second_names(model, source)
    refuse_names(source.path, missing, extra, len(model.state_dict()))
    for name, found, expected in sorted(info.get("mismatched_keys") or ()):
        raise wrong_shape(f"{source.path}: {short(name)}", tuple(found), tuple(expected))
    for errors in (info.get("error_msgs"), info.get("conversion_errors")):
        if errors:
            said = " ".join(str(errors).split())
            raise FileError(f"{source.path}: does not fit {CONFIG} ({short(said)})")
    prefix = f"{model.base_model_prefix}."
    for name, _ in model.named_parameters():
        for stored in (name, prefix + name, name.removeprefix(prefix)):
            held = source.tensors.get(stored)
            if held is not None and not held.dtype.is_floating_point:
                raise FileError(
                    f"{source.path}: {stored} has dtype {dtype_name(held.dtype)} "
                    f"(expected one of {', '.join(DTYPES)})",
                    "Weights are floating-point numbers.",
                )


def _second_names(model: Any, source: WeightFile) -> list[str]:
    """Tensors that transformers would take for one that is there under another name as well."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:  # a release that has these elsewhere: it says what is left over itself
        return []
    steps: list[Any] = get_model_conversion_mapping(model)
    merges = [step for step in steps if isinstance(step, WeightConverter)]
    renames = [step for step in steps if not isinstance(step, WeightConverter)]
    state, found = model.state_dict(), dict[str, list[str]]()
    merged: set[str] = set()  # of several, which are as many as they should be, by their shape
    for name in sorted(source.tensors):
        theirs, pattern = rename_source_key(name, renames, merges, model.base_model_prefix, state)
        found.setdefault(theirs, []).append(name)
        if pattern is not None:
            merged.add(name)
    return [
        name
        for theirs, names in found.items()
        if len(names) > 1 and not merged.issuperset(names)
        for name in ([name for name in names if name != theirs] or names)
    ]


def _check_tied(model: Any, skeleton: Any, source: WeightFile) -> None:
    """Raise FileError for tensors that differ although the configuration ties them: transformers
    would not tie them then."""
    for name, owner in skeleton.all_tied_weights_keys.items():
        if not torch.equal(model.get_parameter(name), model.get_parameter(owner)):
            raise FileError(
                f"{source.path}: {name} differs from {owner} (expected the same values, as "
                f"{CONFIG} ties them)",
                "Set tie_word_embeddings to false to keep both, or leave one out of the file.",
            )


def _needed(source: WeightFile, dtype: torch.dtype) -> int:
    """Bytes of the weights as stored, and of those that are converted."""
    others = (info for info in source.tensors.values() if info.dtype != dtype)
    return n_bytes(source) + dtype.itemsize * sum(math.prod(info.shape) for info in others)


@contextmanager
def in_one_line(where: Path) -> Iterator[None]:
    """What transformers raises, as FileError in one line, and nothing of what it warns of."""
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
