"""Does a server compute what its weights say? Its logprobs beside our float64 run of them.

The text is the server's own continuation of a prompt; each position of it is compared, cold. How
far a right server may be is measured: by our own run with the rounding that the format asks for,
and by the server's own noise. Faults of known size, in our run, say what that would hide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from kvtool.core.models import Model
from kvtool.core.reference import rounding
from kvtool.core.servers.engine import Engine
from kvtool.core.servers.texts import TOP, Answer, Prompt, vector
from kvtool.core.verify import noise
from kvtool.errors import FileError, ServerError

LIMIT = 2.0  # times what is expected: a right server of llama.cpp is at 1.2 to 1.4
FAR = 2.0  # times LIMIT, of a single prompt or position
MIN_NATS = 1e-6  # nats of what is expected: logprobs are float32
SUMMED = 1e-5  # how far probabilities of 256 tokens in float32 may sum up wrongly
AGREES, DIFFERS, HIDDEN = "agrees", "differs", "cannot tell"
FAULTS = ("a token replaced", "a token missing", "weights of 4 bits")

Logprobs = NDArray[np.float64]


@dataclass(frozen=True)
class ServedPosition:
    """The token after one history. Distances are the root mean square over our likeliest tokens, in
    nats."""

    prompt: int
    position: int  # tokens before it
    token: int  # the last of these
    gap: float
    expected: float  # of our run with the format's rounding
    noise: float | None  # of the server's cold answers among each other
    kl: float  # nats, from ours to the server's, over what it tells
    same_top1: bool


@dataclass
class ServedPrompt:
    """One prompt as the server goes on from it, and what our runs say of it."""

    number: int
    ids: list[int]
    n_prompt: int
    answers: dict[int, list[Answer]]
    right: Logprobs | None = None  # (T, V), of the float64 run
    runs: dict[str, Logprobs] = field(default_factory=dict)  # by what was rounded, or by the fault


@dataclass(frozen=True)
class Verdict:
    """What all positions say together."""

    verdict: str
    ratio: float  # of the gap over what is expected: the median over prompts
    worst: float  # the largest of a prompt
    controls: dict[str, float]  # the same of each fault
    first: ServedPosition | None  # where it differs first


def ask(
    engine: Engine, prompts: Sequence[Sequence[int]], tail: int, n_vocab: int,
    progress: Callable[[str], None],
) -> list[ServedPrompt]:  # fmt: skip
    """What the server says of each prompt and of `tail` tokens after it, without its cache.

    Raises ServerError, and FileError for a token that a model of `n_vocab` does not have.
    """
    found = []
    for number, ids in enumerate(prompts):
        progress(f"prompt {number + 1}")
        prompt = Prompt(engine, number, ids, tail)
        answers = prompt.cold.answers
        if not answers:  # llama.cpp leaves out tokens that end within a letter
            continue
        largest = max(max(answer) for some in answers.values() for answer in some)
        if max(largest, *prompt.ids) >= n_vocab:
            raise FileError(
                f"{engine.client.url}: names token {largest:,} (the model has {n_vocab:,})",
                "Give --model what the server serves.",
            )
        found.append(ServedPrompt(number, prompt.ids, prompt.n_prompt, answers))
    if not found:
        raise ServerError(
            f"{engine.client.url}: gave no logprobs behind any of the prompts",
            "Give others with --prompts.",
        )
    return found


@torch.inference_mode()
def logprobs(model: Model, ids: Sequence[int]) -> Logprobs:
    """(T, V): of the token after each of `ids`, in float64."""
    device = next(model.parameters()).device
    found = model(torch.tensor([list(ids)], device=device))[0]
    return found.double().log_softmax(-1).cpu().numpy()


def run_exact(precise: Model, prompts: Sequence[ServedPrompt]) -> None:
    """The float64 run of each prompt, and what it says where a token is wrong."""
    for prompt in prompts:
        prompt.right = logprobs(precise, prompt.ids)
        at = prompt.n_prompt // 2
        other = next((i for i in prompt.ids[at:] if i != prompt.ids[at]), prompt.ids[0])
        replaced = [*prompt.ids[:at], other, *prompt.ids[at + 1 :]]
        prompt.runs[FAULTS[0]] = logprobs(precise, replaced)
        missing = logprobs(precise, [*prompt.ids[:at], *prompt.ids[at + 1 :]])
        prompt.runs[FAULTS[1]] = np.concatenate([missing[:1], missing])  # as far from the end


def run_rounded(model: Model, prompts: Sequence[ServedPrompt], stored: str, block: int) -> None:
    """The run with the rounding of a format, and that with other weights, in float32."""
    with rounding.expected(model, stored, block):
        for prompt in prompts:
            prompt.runs["expected"] = logprobs(model, prompt.ids)
    with rounding.coarser_weights(model):
        for prompt in prompts:
            prompt.runs[FAULTS[2]] = logprobs(model, prompt.ids)


def positions(prompts: Sequence[ServedPrompt]) -> list[ServedPosition]:
    """Each history that the server was asked about."""
    found = []
    for prompt in prompts:
        assert prompt.right is not None
        for length, answers in sorted(prompt.answers.items()):
            right = prompt.right[length - 1]
            top = _likeliest(right)
            told = [vector(answer, top) for answer in answers]
            among = _rms(told[0] - np.mean(told, axis=0)) if len(told) > 1 else None
            found.append(
                ServedPosition(
                    prompt.number, length, prompt.ids[length - 1], _rms(told[0] - right[top]),
                    _rms(prompt.runs["expected"][length - 1][top] - right[top]), among,
                    divergence(right, answers[0]),
                    max(answers[0], key=lambda i: answers[0][i]) == top[0],
                )
            )  # fmt: skip
    return found


def judge(prompts: Sequence[ServedPrompt], found: Sequence[ServedPosition]) -> Verdict:
    """Whether the server is as far from our run as its format's rounding, or further."""
    ratios: list[float] = []
    controls: dict[str, list[float]] = {name: [] for name in FAULTS}
    scales: dict[int, float] = {}
    for prompt in prompts:
        own = [p for p in found if p.prompt == prompt.number]
        scale = max(
            _pooled([p.expected for p in own]), _pooled([p.noise or 0.0 for p in own]), MIN_NATS
        )
        scales[prompt.number] = scale
        ratios.append(_pooled([p.gap for p in own]) / scale)
        for name in FAULTS:
            controls[name].append(_pooled(_gaps_of(prompt, name)) / scale)
    sizes = {name: median(values) for name, values in controls.items()}
    ratio, worst = median(ratios), max(ratios)
    said = noise.judge(max(ratio, worst / FAR), list(sizes.values()), LIMIT)
    verdict = {noise.WITHIN: AGREES, noise.BEYOND: DIFFERS, noise.HIDDEN: HIDDEN}[said]
    first = None
    if verdict == DIFFERS:
        beyond = [p for p in found if not p.gap <= FAR * LIMIT * scales[p.prompt]]
        first = next(iter(beyond), max(found, key=lambda p: p.gap / scales[p.prompt]))
    return Verdict(verdict, ratio, worst, sizes, first)


def divergence(right: Logprobs, answer: Answer) -> float:
    """KL in nats from ours to the server's, over the tokens that it tells and all others as one."""
    ids = list(answer)
    ours, theirs = right[ids], np.array([answer[i] for i in ids])
    p = np.exp(ours)
    rest = max(1 - float(p.sum()), SUMMED)
    their_rest = max(1 - float(np.exp(theirs).sum()), SUMMED)
    return max(float(np.sum(p * (ours - theirs))) + rest * math.log(rest / their_rest), 0.0)


def _gaps_of(prompt: ServedPrompt, run: str) -> list[float]:
    assert prompt.right is not None
    found = []
    for length in prompt.answers:
        right = prompt.right[length - 1]
        top = _likeliest(right)
        found.append(_rms(prompt.runs[run][length - 1][top] - right[top]))
    return found


def _likeliest(right: Logprobs) -> list[int]:
    return [int(i) for i in np.argsort(-right, kind="stable")[:TOP]]


def _rms(difference: NDArray[np.float64]) -> float:
    found = float(np.sqrt(np.mean(np.square(difference))))
    return found if math.isfinite(found) else math.inf


def _pooled(values: Sequence[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / max(len(values), 1))
