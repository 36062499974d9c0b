"""Every model type that transformers knows, each judged in a process of its own.

A type that hangs, crashes or eats the memory ends its process, and not the sweep.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtool.core.verify.outcome import (
    BUG,
    ERROR,
    IDENTICAL,
    NOT_CAUSAL,
    PRECISION,
    ROUNDING,
    UNDECIDED,
    UNSUPPORTED,
    VACUOUS,
)
from kvtool.errors import FileError
from kvtool.files import read_bytes

NOT_BUILT = "not built"  # the model, by its default configuration or for want of a package
VERDICTS = (
    IDENTICAL, ROUNDING, PRECISION, BUG, NOT_CAUSAL, UNDECIDED, VACUOUS, UNSUPPORTED, ERROR,
    NOT_BUILT,
)  # fmt: skip
JUDGED = (IDENTICAL, ROUNDING, PRECISION, BUG, NOT_CAUSAL)  # a verdict, good or bad
PRELOADED = [
    "kvtool.core.verify.sweep_worker",
    "kvtool.core.verify.seq2seq_subject",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
]
ALONE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
BEGINNING = b'{"type": "'  # of a line of results
MEMORY = 4 << 30  # bytes that a process may take


@dataclass(frozen=True)
class Swept:
    """What one type came to; gaps are those of its worst finding, None if not needed."""

    type: str
    verdict: str
    right: bool
    reason: str = ""
    gap: float | None = None
    gap_float64: float | None = None
    gap_promoted: float | None = None
    seconds: float = 0.0
    by_cache: dict[str, str] = dataclasses.field(default_factory=dict)  # its worst verdict
    kind: str = "causal"  # of TRANSFORMERS_MODELS

    @property
    def judged(self) -> bool:
        return self.verdict in JUDGED

    @property
    def wrong(self) -> bool:
        """Whether it was run, and the answer is no, or cannot be given."""
        return not self.right and (self.judged or self.verdict in (UNDECIDED, ERROR))


@dataclass(frozen=True)
class Task:
    """What a process is asked to do."""

    type: str
    caches: tuple[str, ...]
    scenarios: tuple[str, ...]
    tokens: int
    seed: int
    memory: int = MEMORY
    kind: str = "causal"


def sweep(
    tasks: Sequence[Task],
    seconds: float,
    results: Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Swept]:
    """Judge one type after the other, each for at most `seconds`.

    results: a file of JSON lines; what stands in it is not judged again, and each result is
    appended as soon as it is there. Raises FileError if it cannot be read or written.
    """
    known = {} if results is None else read_results(results)
    for task in tasks:
        tell(task.type)
        found = known.get((task.type, task.kind))
        if found is None:
            found = judge_type(task, seconds)
            if results is not None:
                append_result(results, found)
        yield found


def judge_type(task: Task, limit: float) -> Swept:
    """Run one type in a process of its own for `limit` seconds, with one thread and no network."""
    from kvtool.core.verify.sweep_worker import answer

    os.environ.update(ALONE)  # of the server too, which starts with the first type
    started = time.perf_counter()
    receiver, sender = _processes().Pipe(duplex=False)
    process = _processes().Process(target=answer, args=(task, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(limit):
            found: Swept = receiver.recv()
        else:
            found = Swept(task.type, ERROR, False, f"took longer than {limit:g} s")
    except EOFError:
        process.join()
        reason = f"its process ended without an answer (code {process.exitcode})"
        found = Swept(task.type, ERROR, False, reason)
    finally:
        process.kill()
        process.join()
        receiver.close()
    seconds = time.perf_counter() - started
    return dataclasses.replace(found, seconds=seconds, kind=task.kind)


@functools.cache
def _processes() -> Any:
    """Processes forked from one that has imported everything, where the system can fork."""
    ways = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
    if "forkserver" in ways:
        multiprocessing.set_forkserver_preload(PRELOADED)
    return context


def read_results(path: Path) -> dict[tuple[str, str], Swept]:
    """The results in a file, by type and kind; none if it does not exist. Raises FileError.

    A last line that was cut off in the middle does not count.
    """
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return {}
    lines = read_bytes(path, "results of a sweep", "--resume").split(b"\n")
    found: dict[tuple[str, str], Swept] = {}
    for i, line in enumerate(lines):
        if i == len(lines) - 1 and line.startswith(BEGINNING[: len(line)]):
            continue  # nothing, or what was cut off
        try:
            swept = Swept(**json.loads(line))
        except (ValueError, TypeError) as error:
            hint = "It takes a file that a sweep wrote, or a new one."
            where = f"--resume {path}: line {i + 1}"
            raise FileError(f"{where} is no result of a sweep", hint) from error
        found[swept.type, swept.kind] = swept
    return found


def append_result(path: Path, swept: Swept) -> None:
    """Add a line to a file of results, in place of one that was cut off. Raises FileError."""
    line = json.dumps(dataclasses.asdict(swept)) + "\n"
    try:
        with path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line.encode())
    except OSError as error:
        raise FileError(f"--resume {path}: cannot be written ({error.strerror})") from error
