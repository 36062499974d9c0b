"""How often is kvtool wrong about a running llama.cpp? Trials with fresh prompts, right and faulty.

    python tests/servers/rates.py URL --trials 30 [--prompts 5] [--arms prefix] [--promoted URL2]

Each trial draws other words for its prompts. A healthy trial asks the server as it is; a faulty one
asks through a proxy that plants one of the faults in turn. Counted are false alarms, misses, and
what could not be told. A line a trial, then the sums; --json FILE keeps every ratio.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from fault_proxy import FAULTS, UNSEEN, FaultProxy, proxied
from kvtool.core.servers.client import Client
from kvtool.core.servers.engines import connect
from kvtool.core.servers.prompts import LENGTHS, TEXTS
from kvtool.core.servers.session import Visit, visit
from kvtool.core.servers.verdict import ArmVerdict, with_promoted

WARMER = 1.05  # the temperature of a server that scales its cached logits


def fresh_prompts(url: str, seed: int, n: int) -> list[list[int]]:
    """Prompts of words of the built-in texts, drawn anew: none is like another trial's."""
    draws, engine = random.Random(seed), connect(Client(url))
    words = " ".join(TEXTS).split()
    texts = []
    for _ in range(n):
        start = draws.randrange(len(words) - 12)
        drawn = [*words[start : start + 12], *draws.sample(words, 60)]
        texts.append(" ".join(drawn))
    return [engine.tokenize(t)[: draws.choice(LENGTHS)] for t in texts]


def ask(url: str, prompts: list[list[int]], arms: list[str], tail: int) -> list[ArmVerdict]:
    """The verdicts on one server."""
    found = Visit()
    visit(connect(Client(url)), prompts, arms, [], tail, lambda _: None, found)
    return found.verdicts(arms)


def trial(given: Any, seed: int, name: str) -> list[ArmVerdict]:
    """One trial: healthy without a name, else with that fault."""
    prompts = fresh_prompts(given.url, seed, given.prompts)
    asked = []
    for url in filter(None, (given.url, given.promoted)):
        warm = WARMER if name == "temperature" else 1.0
        proxy = FaultProxy(url, FAULTS.get(name), warm)
        if name:
            with proxied(proxy) as address:
                asked.append(ask(address, prompts, given.arms, given.tail))
        else:
            asked.append(ask(url, prompts, given.arms, given.tail))
    if len(asked) == 1:
        return asked[0]
    return [with_promoted(plain, promoted) for plain, promoted in zip(*asked, strict=True)]


def outcome(verdicts: list[ArmVerdict]) -> str:
    """What a user is told: wrong, right, or nothing."""
    words = {v.verdict for v in verdicts}
    if words & {"beyond noise", "bug"}:
        return "wrong"
    return "right" if all(v.right for v in verdicts) else "cannot tell"


def main() -> None:
    """Run the trials."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--promoted", default="")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--tail", type=int, default=32)
    parser.add_argument("--arms", nargs="+", default=["prefix"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["healthy", "faulty"], default="")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    faults = [*FAULTS, "temperature"]
    counts: dict[str, Counter[str]] = {}
    kept = []
    for n in range(given.trials):
        for name in ("", faults[n % len(faults)]):
            if given.only and given.only != ("faulty" if name else "healthy"):
                continue
            started = time.perf_counter()
            verdicts = trial(given, given.seed + 1000 * n + bool(name), name)
            said, seconds = outcome(verdicts), time.perf_counter() - started
            kind = "healthy" if not name else "unseen" if name in UNSEEN else "faulty"
            kind = "unseen" if name == "temperature" else kind
            counts.setdefault(kind, Counter())[said] += 1
            ratios = [round(v.ratio, 3) if v.ratio is not None else None for v in verdicts]
            worst = [round(v.worst, 3) if v.worst is not None else None for v in verdicts]
            kept.append({"fault": name, "said": said, "ratio": ratios, "worst": worst})
            line = f"{name or 'healthy':36} {said:12} ratio {ratios} worst {worst} {seconds:.0f} s"
            print(line, flush=True)
            if given.json:
                given.json.write_text(json.dumps(kept, indent=1))
    for kind, found in counts.items():
        print(f"{kind}: {dict(found)} of {sum(found.values())}")


if __name__ == "__main__":
    main()
