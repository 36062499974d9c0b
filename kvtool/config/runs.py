"""How commands run, generate and train."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kvtool.config.checks import check_float, check_int, require_cache_kind
from kvtool.errors import UsageError
from kvtool.registry import choose

DTYPES = ("float32", "bfloat16", "float16", "float64")
DEVICES = ("auto", "cpu", "cuda")
SCHEDULES = ("cosine", "inverse-sqrt", "constant")
LENGTH_PENALTY = 0.6  # of beam search (Wu 2016)
DECODE_TOKENS = 128  # that the scenario `decode` compares one by one behind its prompt


def process_rank() -> tuple[int, int]:
    """Which process this is, and of how many, where torchrun started several; else (0, 1)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_main_rank() -> bool:
    """Whether this process talks and writes: of several, the one of rank 0 does."""
    rank, size = process_rank()
    return size == 1 or rank == 0


@dataclass(frozen=True)
class RunConfig:
    """The settings that every command takes. `threads` 0 leaves torch's own choice."""

    model: str = ""  # a folder, or the name of a shipped model; "" is the shipped decoder
    device: str = "auto"
    dtype: str = "float32"
    threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        choose(self.device, DEVICES, "--device")
        choose(self.dtype, DTYPES, "--dtype")
        check_int("--threads", self.threads, 0, 4096)
        check_int("--seed", self.seed, 0, 2**63 - 1)


@dataclass(frozen=True)
class GenerateConfig:
    """How tokens are chosen after a prompt, how many, and with which cache and kernels."""

    max_tokens: int | None = None  # None: a number that suits the model and the prompt
    temperature: float | None = None  # None: 0 for encoder-decoders, which is greedy, else 0.8
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    cache: str = "dynamic"
    kernels: str = "default"
    beams: int = 1
    length_penalty: float = LENGTH_PENALTY
    n_best: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_int("--max-tokens", self.max_tokens, 1)
        if self.temperature is not None:
            check_float("--temperature", self.temperature, 0.0)
        check_int("--top-k", self.top_k, 0)
        check_float("--top-p", self.top_p, 0.0, 1.0, open_low=True)
        check_int("--beams", self.beams, 1, 1000)
        check_float("--length-penalty", self.length_penalty, 0.0, 10.0)
        check_int("--n-best", self.n_best, 1)
        require_cache_kind(self.cache, "--cache")
        if self.n_best > self.beams:
            raise UsageError(
                f"--n-best: {self.n_best} of {self.beams} beams", "Give as many --beams at least."
            )
        if self.beams > 1 and (self.temperature or self.top_k or self.top_p < 1.0):
            flag = "--temperature" if self.temperature else "--top-k" if self.top_k else "--top-p"
            raise UsageError(f"{flag}: contradicts --beams", "Beam search draws nothing.")


@dataclass(frozen=True)
class TrainLength:
    """When training ends: exactly one of the three is set."""

    steps: int | None = None
    epochs: int | None = None
    minutes: float | None = None  # of training, evaluations not counted

    def __post_init__(self) -> None:
        given = {f"--{name}": value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise UsageError(f"--steps, --epochs, --minutes: give one (found {found})")
        if self.minutes is not None:
            check_float("--minutes", self.minutes, 0.0, 10_000_000.0, open_low=True)
        else:
            check_int(*next(iter(given.items())), 1)

    def done(self, step: int, epoch: int, seconds: float, steps_per_epoch: int) -> float:
        """The part that is done, from 0 to 1, after `step` steps, `epoch` epochs and `seconds`."""
        if self.minutes is not None:
            return min(seconds / (60 * self.minutes), 1.0)
        if self.epochs is not None:
            # Epochs may differ by a batch or two, so only their count says that all are over.
            return (
                1.0 if epoch >= self.epochs else min(step / (self.epochs * steps_per_epoch), 0.999)
            )
        return min(step / (self.steps or 1), 1.0)


@dataclass(frozen=True)
class TrainConfig:
    """How to train, and for how long."""

    out: Path
    length: TrainLength
    lr: float = 2e-3
    schedule: str = "cosine"  # of the learning rate, after its warm-up
    warmup: int = 200  # steps
    clip: float = 1.0  # norm of all gradients together
    weight_decay: float = 0.01
    beta2: float = 0.98
    eval_every: int = 500  # steps; a state is saved then too
    patience: int = 0  # evaluations without a better score before stopping; 0: never stop early
    amp: bool | None = False  # bfloat16 autocast; None: where the hardware multiplies in it
    average: int = 0  # evaluations whose weights are averaged, and scored too; 0: none
    seed: int = 0
    resume: bool = False
    tensorboard: bool = False  # events beside the log

    def __post_init__(self) -> None:
        check_float("--lr", self.lr, 0.0, open_low=True)
        choose(self.schedule, SCHEDULES, "--schedule")
        check_int("--warmup", self.warmup, 0)
        check_float("--clip", self.clip, 0.0, open_low=True)
        check_float("--weight-decay", self.weight_decay, 0.0)
        check_int("--eval-every", self.eval_every, 1)
        check_int("--patience", self.patience, 0)
        check_int("--average", self.average, 0, 100)
