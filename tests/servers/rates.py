"""How often is kvtool wrong about a running server? Trials with fresh prompts, right and faulty.

    python tests/servers/rates.py URL --trials 30 [--arms prefix turns] [--promoted URL2]

Each pair of trials draws other words for its prompts. A healthy trial asks the server as it is; a
faulty one asks through a proxy that plants one of the faults in turn, and takes the answers to cold
requests, which no fault touches, from the healthy one: that saves half of its time. Counted are
false alarms, misses, and what could not be told. A line a trial, then the sums; --json FILE keeps
every ratio. --keep FOLDER keeps all answers, and --again FOLDER judges kept ones anew, after the
rule changed; --faults seldom plants faults that show in few answers alone. --model FOLDER counts
how often verify-logits is wrong instead.
"""

from __future__ import annotations

import argparse
import gzip
import json
import pickle
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from fault_proxy import FAULTS, SELDOM, UNSEEN, FaultProxy, WrongEverywhere, proxied
from kvtool.core.servers.client import Client
from kvtool.core.servers.engines import connect
from kvtool.core.servers.prompts import LENGTHS, TEXTS
from kvtool.core.servers.session import Visit, visit
from kvtool.core.servers.verdict import ArmVerdict, with_promoted

FIGURES = ("ratio", "worst", "gap", "floor", "fault", "limit")
PATIENCE = 1800.0  # seconds for a request, beside other work
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
    return [engine.tokenize(t)[: LENGTHS[i % len(LENGTHS)]] for i, t in enumerate(texts)]


Memory = dict[tuple[str, str], "dict[str, Any]"]  # cold answers, by path and request


class Remembering(Client):
    """A client that keeps the answers to cold requests, or takes them from those that were kept."""

    def __init__(self, url: str, memory: Memory, known: bool) -> None:
        super().__init__(url, PATIENCE)
        self.memory, self.known = memory, known

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """As Client.post."""
        salts = {field: body[field] for field in ("cache_salt", "extra_key") if field in body}
        cold = any("-cold-" in salt for salt in salts.values()) or body.get("cache_prompt") is False
        key = path, json.dumps({**body, **dict.fromkeys(salts)})
        if cold and self.known and key in self.memory:
            return self.memory[key]
        answer = super().post(path, body)
        if cold and not self.known:
            self.memory[key] = answer
        return answer


def ask(client: Client, prompts: list[list[int]], arms: list[str], tail: int) -> Visit:
    """The answers of one server."""
    found = Visit()
    visit(connect(client), prompts, arms, [], tail, lambda _: None, found)
    return found


def trial(given: Any, prompts: list[list[int]], name: str, memories: list[Memory]) -> list[Visit]:
    """One trial, healthy without a name, else with that fault: the answers of each server."""
    asked = []
    for url, memory in zip(filter(None, (given.url, given.promoted)), memories, strict=False):
        warm = WARMER if name == "temperature" else 1.0
        if name:
            proxy = FaultProxy(url, {**FAULTS, **SELDOM}.get(name), warm)
            with proxied(proxy) as address:
                client = Remembering(address, memory, known=True)
                asked.append(ask(client, prompts, given.arms, given.tail))
            if not proxy.planted:
                raise SystemExit(f"{name}: no answer had it, so this is no trial of it")
        else:
            client = Remembering(url, memory, known=False)
            asked.append(ask(client, prompts, [*given.arms, *given.also], given.tail))
    return asked


def told(visits: list[Visit]) -> dict[str, list[ArmVerdict]]:
    """What each server says alone, and both together."""
    asked = [v.verdicts(list(dict.fromkeys(m.arm for m in v.measured))) for v in visits]
    if len(asked) == 1:
        return {"plain": asked[0]}
    both = [with_promoted(plain, promoted) for plain, promoted in zip(*asked, strict=True)]
    return {"plain": asked[0], "promoted": asked[1], "both": both}


def outcome(verdicts: list[ArmVerdict]) -> str:
    """What a user is told: wrong, right, or nothing."""
    words = {v.verdict for v in verdicts}
    if words & {"beyond noise", "bug", "contradicts itself"}:
        return "wrong"
    return "right" if all(v.right for v in verdicts) else "cannot tell"


def rounded(figure: float | None) -> float | None:
    """For people to read."""
    return None if figure is None else float(f"{figure:.4g}")


def tell(name: str, visits: list[Visit], counts: dict[str, Counter[str]], kept: list[Any]) -> None:
    """Print and count one trial."""
    kind = "healthy" if not name else "seldom" if name in SELDOM else "faulty"
    kind = "unseen" if name in UNSEEN or name == "temperature" else kind
    for by, verdicts in told(visits).items():
        said = outcome(verdicts)
        counts.setdefault(f"{kind}, {by}", Counter())[said] += 1
        for v in verdicts:
            counts.setdefault(f"{kind}, {by}, {v.arm} alone", Counter())[outcome([v])] += 1
        figures = {k: [rounded(getattr(v, k)) for v in verdicts] for k in FIGURES}
        kept.append({"planted": name, "by": by, "said": said, **figures})
        words = f"ratio {figures['ratio']} worst {figures['worst']}"
        print(f"{name or 'healthy':40} {by:8} {said:12} {words}", flush=True)


def trials(given: Any, names: list[str]) -> Iterator[tuple[str, list[Visit]]]:
    """The trials one by one, kept if that is asked for."""
    for n in range(given.first, given.trials):
        prompts = fresh_prompts(given.url, given.seed + 1000 * n, given.prompts)
        memories: list[Memory] = [{}, {}]
        for name in ("", names[n % len(names)]):
            if given.only and given.only != ("faulty" if name else "healthy"):
                continue
            found = trial(given, prompts, name, memories)
            if given.keep:
                given.keep.mkdir(exist_ok=True)
                path = given.keep / f"{n:04}-{'faulty' if name else 'healthy'}.pickle.gz"
                with gzip.open(path, "wb", 3) as file:
                    pickle.dump((name, found), file)
            yield name, found


def kept_trials(folder: Path) -> Iterator[tuple[str, list[Visit]]]:
    """The trials that --keep wrote."""
    for path in sorted(folder.glob("*.pickle.gz")):
        with gzip.open(path) as file:
            yield pickle.load(file)


WRONG_MODELS = ["a token replaced", "a token missing", "half of the prefix lost"]
WRONG_MODELS += ["two tokens swapped", "a stale block", "temperature"]


def logits_trials(given: Any) -> None:
    """Trials of verify-logits: print and count each."""
    import torch

    from kvtool.core.checkpoint import checkpoint
    from kvtool.core.reference import served

    precise = checkpoint.load(given.model, torch.device("cpu"), torch.float64).model
    loaded = checkpoint.load(given.model, torch.device("cpu"), torch.float32)
    counts: Counter[str] = Counter()
    for n in range(given.first, given.trials):
        prompts = fresh_prompts(given.url, given.seed + 1000 * n, given.prompts)
        for name in ("", WRONG_MODELS[n % len(WRONG_MODELS)]):
            warm = WARMER if name == "temperature" else 1.0
            with proxied(WrongEverywhere(given.url, FAULTS.get(name), warm)) as address:
                engine = connect(Client(address, PATIENCE))
                size = loaded.config.vocab_size
                asked = served.ask(engine, prompts, given.tail, size, lambda _: None)
            served.run_exact(precise, asked)
            served.run_rounded(loaded.model, asked, loaded.stored_dtype, 1)
            found = served.judge(asked, served.positions(asked))
            counts[f"{'faulty' if name else 'healthy'}: {found.verdict}"] += 1
            words = f"ratio {found.ratio:.3g} worst {found.worst:.3g}"
            print(f"{name or 'healthy':40} {found.verdict:12} {words}", flush=True)
    print(dict(counts))


def main() -> None:
    """Run the trials."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url", nargs="?", default="")
    parser.add_argument("--promoted", default="")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--first", type=int, default=0, help="to go on where a run was ended")
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--tail", type=int, default=32)
    parser.add_argument("--arms", nargs="+", default=["prefix", "turns"])
    parser.add_argument("--also", nargs="+", default=[], help="arms of healthy trials alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["healthy", "faulty"], default="")
    parser.add_argument("--faults", choices=["all", "plain", "seldom"], default="all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--again", type=Path)
    parser.add_argument("--model", default="", help="of verify-logits: what the server serves")
    given = parser.parse_args()
    if given.model:
        logits_trials(given)
    else:
        cache_trials(given)


def cache_trials(given: Any) -> None:
    """Trials of verify-cache: print and count each."""
    plain = [*FAULTS, "temperature"]
    names = {"plain": plain, "seldom": [*SELDOM], "all": [*SELDOM, *plain]}[given.faults]
    counts: dict[str, Counter[str]] = {}
    kept: list[Any] = []
    for name, visits in kept_trials(given.again) if given.again else trials(given, names):
        tell(name, visits, counts, kept)
        if given.json:
            given.json.write_text(json.dumps(kept, indent=1))
    for kind, found in counts.items():
        print(f"{kind}: {dict(found)} of {sum(found.values())}")


if __name__ == "__main__":
    main()
