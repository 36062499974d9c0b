"""Every type that transformers knows: is the plan what its caches take? For docs/plan.md.

Tiny models run; of causal types the default configurations are compared as well, and changes of
them (plan_defaults.py).

PYTHONPATH=tests/support python tests/support/plan_sweep.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from kvtool.core.plan.layers import UNPLANNED
from kvtool.core.plan.source import describe
from kvtool.core.plan.sums import Cache, Load
from kvtool.core.verify.hf.library import CAUSAL, SEQ2SEQ, known_types
from kvtool.core.verify.hf.tiny import tiny_model
from kvtool.errors import KvtoolError
from plan_cases import N_PROMPT, SOURCE, as_file, measured, stored_numbers
from plan_defaults import differences

EQUAL, UNEQUAL = "equal", "UNEQUAL"
KINDS = (("dynamic", 2 * N_PROMPT), ("static", 2 * N_PROMPT + 9))


@torch.no_grad()
def outcome(name: str, kind: str) -> str:
    """`equal`, with what was compared, or why not."""
    if name in UNPLANNED:
        return f"not planned: {UNPLANNED[name]}"
    try:
        model = tiny_model(name, kind=kind).model
    except KvtoolError as error:
        return f"not built: {error.message}"
    with tempfile.TemporaryDirectory() as folder:
        found = described(model.config, Path(folder), name, kind)
    load = Load(2, 0, SOURCE if kind == SEQ2SEQ else 0)
    compared = []
    for cache, capacity in KINDS:
        planned = Cache("transformers", cache, found.shapes, 4)
        try:
            taken = measured(model, cache, capacity, kind == SEQ2SEQ)
        except Exception as error:
            compared.append(f"no {cache} cache ({type(error).__name__})")
            continue
        held = planned.held(Load(2, capacity, load.source_tokens)).allocated
        compared.append(f"{cache} {EQUAL if held == taken else f'{UNEQUAL} ({held}, {taken})'}")
    if found.weights is not None and found.weights.said_by == "configuration":
        same = found.weights.nbytes == 4 * stored_numbers(model)
        compared.append(f"weights {EQUAL if same else UNEQUAL}")
    return ", ".join(compared)


def described(config: Any, folder: Path, name: str, kind: str) -> Any:
    """The plan of a configuration; of a decoder alone where that is what was built."""
    if kind == CAUSAL and name in known_types(SEQ2SEQ):
        config.is_encoder_decoder = False
    return describe(str(as_file(config, folder)), "float32")


def main() -> None:
    """Print a line for each type, and what all came to."""
    for kind in (CAUSAL, SEQ2SEQ):
        found = {name: outcome(name, kind) for name in known_types(kind)}
        if kind == CAUSAL:
            for name in found:
                found[name] += "".join(f", default {UNEQUAL}: {x}" for x in differences(name))
        for name, said in found.items():
            print(kind, name, said, sep="\t", flush=True)
        wrong = [name for name, said in found.items() if UNEQUAL in said]
        print(f"{kind}: {len(found)} types, {len(wrong)} unequal {wrong}", file=sys.stderr)


if __name__ == "__main__":
    main()
