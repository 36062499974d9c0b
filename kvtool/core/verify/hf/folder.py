"""A model of transformers from a saved folder, of which transformers itself opens no file.

All that lies in the folder is read by kvtool, by the rules of its own models: the configuration
strictly, weights by their header, shards beside their index, pickles bounded. transformers is given
what was read. It builds the model first without weights, within limits, and says which tensors it
misses, does not know or finds misshapen; any of them is refused, since it would draw what is
missing at random and judge that.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from kvtool.core.checkpoint.first_layers import FirstLayers
from kvtool.core.checkpoint.safetensors_file import DTYPES, STORED_DTYPES
from kvtool.core.checkpoint.sizes import CPU, SMALLER, n_bytes, require_tables, stored_dtype
from kvtool.core.checkpoint.weight_files import (
    CONFIG,
    WeightFile,
    open_weights,
    refuse_names,
    require_finite,
    wrong_shape,
)
from kvtool.core.limited import limited
from kvtool.core.machine import dtype_name, require_memory
from kvtool.core.verify.hf.configuration import all_fields, class_of, make_config, read_settings
from kvtool.core.verify.hf.library import in_one_line, quiet_transformers
from kvtool.core.verify.hf.shrink import LAYERS
from kvtool.errors import CapacityError, FileError, UsageError
from kvtool.hub import offline
from kvtool.reading import quoted, short

DEPTHS = (*LAYERS, "encoder_layers")  # fields that say how often something is built
# Of what a model is built without its weights: tied tensors are built more than once, and a
# thousand of them, or a few million numbers, cost nothing.
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")  # of transformers' device_map
TIED, SLACK, FREE_NUMBERS = 8, 1000, 2**24


class Read(NamedTuple):
    """What a folder holds."""

    model: Any  # a PreTrainedModel, in eval mode, on the CPU
    sha256: str  # of the weights


class Placed(NamedTuple):
    """On which devices a model is put, as transformers' device_map says, and in which format."""

    device_map: str  # a strategy, or a device
    dtype: torch.dtype


def read_folder(
    folder: Path,
    dtype: torch.dtype | None = None,
    kind: type[Exception] = FileError,
    layers: int = 0,
    placed: Placed | None = None,
) -> Read:
    """The model in a saved folder, in `dtype` or else in the one that its configuration names; of
    `layers`, only the first ones, 0 for all. placed: spread over devices, in its own format.

    Nothing is downloaded, and no code that lies beside the weights is run. Raises FileError for
    what is missing, damaged or contradictory, CapacityError, and `kind` for weights that are NaN.
    """
    offline()
    if placed is not None:
        _require_accelerate(placed.device_map)
    path = folder / CONFIG
    settings = read_settings(folder)
    first = FirstLayers(layers) if layers else None
    settings = settings if first is None else first.settings(settings)
    source = open_weights(folder, STORED_DTYPES, first)
    _check_depths(settings, source, folder)
    with quiet_transformers(), in_one_line(folder):
        with limited(f"{path}: what it describes"), bounded_build(source, folder):
            made, config = class_of(make_config(settings), path)
            chosen = dtype or _named_dtype(config) or stored_dtype(source)
            shapes = {
                name: torch.empty(info.shape, dtype=info.dtype, device="meta").as_subclass(_Shape)
                for name, info in source.tensors.items()
            }
            skeleton, info = _load(_without_values(made), config, shapes, chosen)
            _check_names(skeleton, info, source)
        require_memory(str(source.path), _needed(source, chosen), CPU, SMALLER)
        tensors, digest = source.read()
        floats = [(name, t, t) for name, t in tensors.items() if t.is_floating_point()]
        require_finite(source.path, floats, kind)
        if placed is None:
            model, _ = _load(made, config, tensors, chosen)
        else:
            model, _ = _load(made, config, tensors, placed.dtype, device_map=placed.device_map)
            require_all(model)
        _check_tied(model, skeleton, source)
    model.config.name_or_path = str(folder)
    return Read(model.eval().requires_grad_(False), digest())


def _check_depths(settings: Mapping[str, Any], source: WeightFile, folder: Path) -> None:
    """Raise FileError for more layers than tensors: a configuration lists them all at once."""
    most = max(TIED * len(source.tensors), SLACK)
    for name, value in all_fields(settings):
        if name in DEPTHS and isinstance(value, (int, float)) and value > most:
            raise FileError(
                f"{folder / CONFIG}: {name} is {value}, but {source.path.name} holds "
                f"{len(source.tensors)} tensors"
            )


def _named_dtype(config: Any) -> torch.dtype | None:
    found = getattr(config, "dtype", None)
    return found if isinstance(found, torch.dtype) else None


def _require_accelerate(device_map: str) -> None:
    """Raise UsageError for a map that is neither a strategy nor a device, or without accelerate."""
    if device_map not in STRATEGIES:
        try:
            torch.device(device_map)
        except RuntimeError as error:
            text = f"--device-map: {quoted(device_map)} is none"
            names = ", ".join(STRATEGIES)
            raise UsageError(f"{text} (expected {names}, or a device)") from error
    if importlib.util.find_spec("accelerate") is None:
        text = "--device-map: transformers needs accelerate for it"
        raise UsageError(text, "Install it with: pip install accelerate")


def require_all(model: Any) -> None:
    """Raise CapacityError for weights that were left on the CPU or on the disk, to be brought back
    for each use: they are not there in float64."""
    lost = [name for name, weight in model.named_parameters() if weight.is_meta]
    if lost:
        raise CapacityError(
            f"--device-map: {lost[0]} and {len(lost) - 1} other weights do not fit the devices",
            "Give more devices, a lower --dtype, or --layers N.",
        )


def _load(
    made: Any, config: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype, **more: Any
) -> Any:
    """The model, and what of its tensors was not there or left over."""
    return made.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        ignore_mismatched_sizes=True,  # they are told, as the others are
        output_loading_info=True,
        **more,
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
def bounded_build(source: WeightFile, folder: Path) -> Iterator[None]:
    """Raise FileError as soon as more is built than the file can fill."""
    most = TIED * len(source.tensors) + SLACK
    most_numbers = (
        TIED * sum(math.prod(info.shape) for info in source.tensors.values()) + FREE_NUMBERS
    )
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
    _check_floating(model, source)


def _check_floating(model: Any, source: WeightFile) -> None:
    """Raise FileError for weights that are stored as whole numbers."""
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
    state, stored_as = model.state_dict(), dict[str, list[str]]()
    merged: set[str] = set()  # of several, which are as many as they should be, by their shape
    for name in sorted(source.tensors):
        theirs, pattern = rename_source_key(name, renames, merges, model.base_model_prefix, state)
        stored_as.setdefault(theirs, []).append(name)
        if pattern is not None:
            merged.add(name)
    second = []
    for theirs, names in stored_as.items():
        if len(names) > 1 and not merged.issuperset(names):
            second += [name for name in names if name != theirs] or names
    return second


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
