"""Python processes that need not load torch: forked from one that has, with arguments, streams,
folder and environment of their own.

`command` gives what to start in place of sys.executable: a small process that has a child forked,
hands signals on to it, and ends as it ends. What a process loads, how Python ends, and limits that
a process is started with, are tested on sys.executable itself.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

STREAMS = (0, 1, 2)
LONGEST = 100  # characters that the name of a socket may have
_server: subprocess.Popen[bytes] | None = None


def command(folder: Path, *modules: str) -> str:
    """A program to start as one starts Python: `-m MODULE`, `-c CODE` or a file, and arguments.

    folder: of this process's tests, for what it needs; modules: what the child has loaded already,
    beside torch.
    """
    global _server
    place = folder / "socket"
    if not hasattr(os, "pidfd_open") or len(str(place)) > LONGEST:
        return sys.executable
    if _server is None or _server.poll() is not None:
        _server = subprocess.Popen(
            [sys.executable, __file__, "serve", str(place)],
            stdin=subprocess.PIPE,  # it ends with this process
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert _server.stdout is not None
        assert _server.stdout.readline() == b"ready\n"
    program = folder / "-".join(("warm-python", *modules))
    words = [sys.executable, "-I", "-S", __file__, "ask", str(place), json.dumps(modules)]
    quoted = " ".join(f"'{word}'" for word in words)
    program.write_text(f'#!/bin/sh\nexec {quoted} "$@"\n')
    program.chmod(0o700)
    return str(program)


# The process that is started


def ask(place: str, modules: str, *words: str) -> None:
    """Have a child forked, and end as it ends."""
    sent: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sent.append(number))
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    asked = {"words": words, "modules": json.loads(modules), "folder": os.getcwd()}
    asked["environment"] = dict(os.environ)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(place)
        data = json.dumps(asked).encode()
        socket.send_fds(server, [len(data).to_bytes(4, "big")], STREAMS)
        server.sendall(data)
        for stream in STREAMS:
            os.close(stream)
        answered, more = b"", b" "  # the child's number, and how it ended, a line each
        while more and answered.count(b"\n") < 2:
            while sent and answered.endswith(b"\n"):
                os.kill(int(answered), sent.pop())
            ready, _, _ = select.select([server, told], [], [])
            if told in ready:
                os.read(told, 64)
            if server in ready:
                more = server.recv(64)
                answered += more
    end(int(answered.split()[1]) if more else 1)


def end(code: int) -> NoReturn:
    """As os.waitstatus_to_exitcode has it."""
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no other handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


# The process that has loaded torch


def serve(place: str) -> None:
    """Answer each that asks, until stdin ends."""
    import torch  # noqa: F401

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen()
        print("ready", flush=True)
        while sys.stdin not in select.select([sys.stdin, listener], [], [])[0]:
            asks, _ = listener.accept()
            asked, streams = request(asks)
            for module in asked["modules"]:
                importlib.import_module(module)
            if not os.fork():
                listener.close()
                watch(asks, asked, streams)
            for handle in (asks.detach(), *streams):
                os.close(handle)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def request(asks: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What is asked, and the streams that the child is to have."""
    size, streams, _, _ = socket.recv_fds(asks, 4, len(STREAMS))
    data = asks.makefile("rb").read(int.from_bytes(size, "big"))
    return json.loads(data), streams


def watch(asks: socket.socket, asked: dict[str, Any], streams: list[int]) -> NoReturn:
    """Tell who asks the number of the child, and how it ends; without either, end the other."""
    child = os.fork()
    if not child:
        asks.close()
        for stream, handle in enumerate(streams):
            os.dup2(handle, stream)
            os.close(handle)
        end(code_of(lambda: become(asked)))
    for handle in (*STREAMS, *streams):
        os.close(handle)
    with contextlib.suppress(OSError):  # who asks has ended already
        asks.sendall(f"{child}\n".encode())
    ended = os.pidfd_open(child)
    if ended not in select.select([ended, asks], [], [])[0]:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        asks.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def code_of(work: Callable[[], object]) -> int:
    """Work, and end as Python does, but for taking apart what is loaded, which takes as long as to
    load it -> the exit code."""
    code: Any = 0
    try:
        work()
    except SystemExit as error:
        code = error.code or 0
    except KeyboardInterrupt:
        code = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            try:
                stream.flush()
            except OSError:
                code = 120
    return code


def become(asked: dict[str, Any]) -> None:
    """Do as Python does that is started with these words."""
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    for at, name in enumerate(("stdin", "stdout", "stderr")):
        mode, errors = "w" if at else "r", "backslashreplace" if at == 2 else "strict"
        buffering = 1 if at == 2 or os.isatty(at) else -1
        stream = open(at, mode, buffering, "utf-8", errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    words = [word for word in asked["words"] if word != "-u"]
    if words[0] == "-m":
        sys.path[0], sys.argv = os.getcwd(), words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path[0], sys.argv = "", ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.abspath(words[0])), words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    {"ask": ask, "serve": serve}[sys.argv[1]](*sys.argv[2:])
