"""llama.cpp's own server, of the package xllamacpp, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CODE = """
import sys
import xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.hostnames, p.port = sys.argv[1], ["127.0.0.1"], 0
p.n_ctx, p.n_parallel, p.warmup, p.fit_params = int(sys.argv[2]), 2, False, False
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(sys.argv[3])
for name, value in zip(sys.argv[4::2], sys.argv[5::2]):
    kind = type(getattr(p, name))
    setattr(p, name, kind(int(value)) if value.lstrip("-").isdigit() else value)
server = xllamacpp.Server(p)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_server(
    model: Path, context: int = 512, threads: int = 1, **params: object
) -> Iterator[str]:
    """The address of llama.cpp's server of a GGUF file, within; of `context` tokens for 2 slots.

    params: of xllamacpp.CommonParams, such as n_cache_reuse=8.
    """
    words = [str(word) for item in params.items() for word in item]
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(model), str(context), str(threads), *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        yield next(line.strip() for line in lines if line.startswith("http"))
    finally:
        process.stdin.close()
        process.kill()
        process.stdout.close()
        process.wait()
