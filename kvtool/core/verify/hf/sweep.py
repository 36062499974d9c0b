"""Every model type that transformers knows, each judged in a process of its own.

A type that hangs, crashes or eats the memory ends its process, and not the sweep.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvtool import ending
from kvtool.core.verify.hf.task import Swept, Task
from kvtool.core.verify.outcome import ERROR
from kvtool.core.verify.resume_log import ResumeLog
from kvtool.outside import elsewhere

PRELOADED = [
    "kvtool.core.verify.hf.sweep_worker",
    "kvtool.core.verify.hf.check",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
]
ALONE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def sweep(
    tasks: Sequence[Task],
    seconds: float,
    log: ResumeLog[Swept] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Swept]:
    """Judge one type after the other, each for at most `seconds`.

    log: what is in it is not judged again, and each result is appended as soon as it is there.
    Raises FileError if it cannot be written.
    """
    logged = {} if log is None else {(swept.type, swept.kind): swept for swept in log.results}
    for task in tasks:
        progress(task.type)
        found = logged.get((task.type, task.kind))
        if found is None:
            found = judge_type(task, seconds)
            ending.check()  # the signal may have ended its process, which is no result
            if log is not None:
                log.append(found)
        yield found


def judge_type(task: Task, limit: float) -> Swept:
    """Run one type in a process of its own for `limit` seconds, with its threads and no network."""
    from kvtool.core.verify.hf.sweep_worker import answer

    os.environ.update(ALONE)  # of the server too, which starts with the first type
    started = time.perf_counter()
    receiver, sender = _processes().Pipe(duplex=False)
    process = _processes().Process(target=answer, args=(task, sender), daemon=True)
    with elsewhere():  # where modules beside the user are not its own
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
