"""The decoder that FILE.py:NAME names: the user's own code, which is run."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import io
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from kvtool.core.verify.target.spec import FLAG, parse_spec
from kvtool.core.verify.target.subject import TargetSubject, is_decoder
from kvtool.errors import FileError, UsageError, first_line, pass_on_shortage
from kvtool.reading import sha256


def target_subject(spec: str, vocab_size: int = 0, context: int = 0) -> TargetSubject:
    """Load FILE.py:NAME, the decoder or its builder, as a subject.

    vocab_size, context: 0 looks for them. What the file prints goes to stderr, what the decoder
    prints while it is tried out nowhere. Raises UsageError and FileError, each with one line that
    says what to change.
    """
    with contextlib.redirect_stdout(sys.stderr):
        given = load_target(spec)
    with contextlib.redirect_stdout(io.StringIO()):
        return TargetSubject(given, spec, vocab_size, context)


def identity(spec: str) -> dict[str, str]:
    """The identity of a loaded FILE.py:NAME in a report: its name, and the SHA-256 of the file."""
    return {"model": spec, "sha256": sha256(Path(spec.rpartition(":")[0]))}


def load_target(spec: str) -> Any:
    """The object that FILE.py:NAME is, or that it returns when called without arguments."""
    place, name = parse_spec(spec)
    path = spec.rpartition(":")[0]
    module = _imported(place)
    if not hasattr(module, name):
        raise _no_such_name(path, name, module)
    found = getattr(module, name)
    if not isinstance(found, type) and (isinstance(found, nn.Module) or is_decoder(found)):
        return found
    if not callable(found):
        raise UsageError(
            f"{FLAG} {spec}: is no decoder and no function that builds one "
            f"(found {type(found).__name__})"
        )
    return _built(found, path, name)


def _imported(path: Path) -> ModuleType:
    """Run a file as `python FILE` would: what lies beside it can be imported."""
    name = path.stem if path.stem not in sys.modules else f"kvtool_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FileError(f"{path}: is no Python file (expected a name that ends in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        pass_on_shortage(error)
        sys.modules.pop(name, None)
        raise FileError(f"{path}: importing it raised {describe(error, path)}") from error
    return module


def _built(factory: Any, path: str, name: str) -> Any:
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise UsageError(
            f"{path}:{name}: {name}() cannot be called without arguments ({error})",
            "Give them defaults, or write a function that builds it.",
        ) from error
    except ValueError:  # a callable that does not tell its signature
        pass
    try:
        return factory()
    except (Exception, SystemExit) as error:
        pass_on_shortage(error)
        raise FileError(f"{path}: {name}() raised {describe(error, Path(path))}") from error


def _no_such_name(path: str, name: str, module: ModuleType) -> UsageError:
    names = [n for n in vars(module) if not n.startswith("_")]
    own = [n for n in names if getattr(getattr(module, n), "__module__", "") == module.__name__]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"It has {', '.join(own) or 'no names'}."
    return UsageError(f"{path}: has no {name}", hint)


def describe(error: BaseException, path: Path) -> str:
    """An error's type and message, and the last line of the file that it came through."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} (line {error.lineno})"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path) or Path(frame.filename) == path.resolve()
    ]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {first_line(error)}{where}"
