"""Whether uncached passes of a model can be compared: they must be reproducible and causal."""

from __future__ import annotations

import torch

from kvtool.core.verify.compare import ROUNDING_64, distances
from kvtool.core.verify.precision import Promote
from kvtool.core.verify.scenario_run import ScenarioRun
from kvtool.core.verify.subject import Subject


@torch.inference_mode()
def differs_from_itself(subject: Subject) -> str:
    """How two uncached passes over the same tokens differ; "" if they do not. If they do, nothing
    can be compared."""
    run = ScenarioRun(subject)
    start, ids = run.start(), run.next_ids(1, 10)
    with Promote():
        gap = max(distances([subject.full(ids, start)], [subject.full(ids, start)]))
    if gap <= ROUNDING_64:
        return ""
    same = "two uncached passes over the same tokens differ"
    return f"{same} ({gap:.1e}): is dropout on, or noise added?"


@torch.inference_mode()
def changed_by_later(subject: Subject) -> str:
    """How changing later tokens changes earlier logits of an uncached pass, "" if it does not."""
    run = ScenarioRun(subject)
    start = run.start()
    ids = run.next_ids(1, 10)
    with Promote():
        whole = subject.full(ids, start)
        for cut in (3, 7):
            other = ids.clone()
            other[:, cut:] = (ids[:, cut:] + 1) % subject.vocab_size
            changed = subject.full(other, start)
            gap = max(distances([changed[:, :cut]], [whole[:, :cut]]))
            if not gap <= ROUNDING_64:
                return f"changing token {cut} changes logits before it ({gap:.1e}), uncached"
    return ""
