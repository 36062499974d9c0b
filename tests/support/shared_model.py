"""`python shared_model.py HOW verify-cache ...` is `kvtool verify-cache ...`, started by torchrun,
in which one process is not like the others.

HOW: `widens`: only the leader takes a copy in float64 for too large; `fails`: the other cannot load
the model.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from kvtool.app import main
from kvtool.core.verify.hf import check, shared
from kvtool.errors import FileError

how, *words = sys.argv[1:]
leads = os.environ["RANK"] == "0"
LOAD, TWIN = check.load_model, shared.twin


def load_model(*args: Any) -> Any:
    if not leads:
        raise FileError("shard 2: cannot be read")
    return LOAD(*args)


def twin(*args: Any) -> Any:
    print("widened", file=sys.stderr, flush=True)
    return TWIN(*args)


if how == "widens":
    shared.copy_crowds, shared.twin = lambda *_: leads, twin  # type: ignore[assignment]
elif how == "fails":
    check.load_model = load_model
main(words)
