"""The shape of a model and the settings that every command shares. Imports no torch.

Sizes are checked when an object is made, so that a bad value is refused before anything is built.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtool.errors import FileError, UsageError
from kvtool.reading import quoted, short
from kvtool.registry import MODELS, choose, split_kind

DTYPES = ("float32", "bfloat16", "float16", "float64")
DEVICES = ("auto", "cpu", "cuda")
POSITIONS = ("sinusoidal", "learned", "rotary")
NORMS = ("layernorm", "rmsnorm")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "geglu", "swiglu")
GATED = ("geglu", "swiglu")  # activations with a gate beside them
ROPE_SCALINGS = ("linear", "llama3", "yarn", "longrope")
SCHEDULES = ("cosine", "inverse-sqrt", "constant")
OWN = "kvtool-"  # model_type of a checkpoint of kvtool: this and the family
LARGEST_SIZE = 2**31 - 1
MAY_BE_0 = ("sinks", "residual")  # settings of cache kinds; of others 1 is the least
LENGTH_PENALTY = 0.6  # of beam search (Wu 2016)
N_ADDED = 9  # the last fields of ModelConfig, which came after the first checkpoints


DECODE_TOKENS = 128  # that the scenario `decode` compares one by one behind its prompt


def process_rank() -> tuple[int, int]:
    """Which process this is, and of how many, where torchrun started several; else (0, 1)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_main_rank() -> bool:
    """Whether this process talks and writes: of several, the one of rank 0 does."""
    rank, size = process_rank()
    return size == 1 or rank == 0


def own_types() -> list[str]:
    """What model_type may be in a checkpoint of kvtool."""
    return [f"{OWN}{family}" for family in MODELS]


def check_int(flag: str, value: object, low: int, high: int = LARGEST_SIZE) -> None:
    """Raise UsageError, naming `flag`, unless `value` is an int within low..high."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{flag}: {quoted(value)} is not a whole number")
    if value < low:
        raise UsageError(f"{flag}: {value} is too small (expected {low} or more)")
    if value > high:
        raise UsageError(f"{flag}: {value} is too large (expected {high} or less)")


def check_float(
    flag: str, value: object, low: float, high: float = float("inf"), open_low: bool = False
) -> None:
    """Raise UsageError, naming `flag`, unless `value` is a finite number within low..high."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"{flag}: {quoted(value)} is not a number")
    inside = (low < value if open_low else low <= value) and value <= high
    if not inside or value in (float("inf"), float("-inf")):  # NaN fails both comparisons
        bound = f"above {low:g}" if open_low else f"{low:g} or more"
        limit = "" if high == float("inf") else f" and {high:g} or less"
        raise UsageError(f"{flag}: {value} is out of range (expected {bound}{limit})")


def check_bool(flag: str, value: object) -> None:
    """Raise UsageError, naming `flag`, unless `value` is True or False."""
    if not isinstance(value, bool):
        raise UsageError(f"{flag}: {quoted(value)} is not true or false")


def check_setting(flag: str, name: str, value: int) -> None:
    """Raise UsageError, naming `flag`, for a setting of a cache kind that is too small."""
    check_int(flag, value, 0 if name in MAY_BE_0 else 1)


def require_cache_kind(text: str, flag: str) -> str:
    """`text`, a cache kind, perhaps with settings. Raises UsageError with the nearest name, or for
    a setting that is too small."""
    kind, settings = split_kind(text, flag)
    for name, value in settings.items():
        check_setting(f"{flag}: {kind}: {name}", name, value)
    return text


@dataclass(frozen=True)
class RopeScaling:
    """How rotary angles are slowed down for a context longer than the first one trained on.

    linear (kaiokendev 2023) divides every rate by `factor`; llama3 (Llama 3.1) only those that turn
    less than `low` times within `original_context` tokens, and none that turns more than `high`
    times; yarn (Peng 2023) likewise between `beta_slow` and `beta_fast` turns; longrope (Ding 2024)
    divides each rate by a factor of its own. Both multiply queries and keys by `attention_factor`.
    """

    kind: str
    factor: float
    original_context: int = 1  # tokens
    low: float = 1.0
    high: float = 4.0
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    truncate: bool = True  # yarn: the ramp begins and ends at whole dimensions
    attention_factor: float = 1.0
    factors: tuple[float, ...] = ()  # longrope: of each pair of channels

    def __post_init__(self) -> None:
        choose(self.kind, ROPE_SCALINGS, "rope_scaling")
        if not isinstance(self.factors, (list, tuple)):
            raise UsageError(f"rope_scaling.factors: {quoted(self.factors)} is no list of numbers")
        object.__setattr__(self, "factors", tuple(self.factors))
        for factor in self.factors:
            check_float("rope_scaling.factors", factor, 0.0, 1e30, open_low=True)
        check_int("rope_scaling.original_context", self.original_context, 1)
        positive = ("factor", "low", "high", "beta_slow", "beta_fast", "attention_factor")
        for name in positive:
            check_float(f"rope_scaling.{name}", getattr(self, name), 0.0, 1e30, open_low=True)
        check_bool("rope_scaling.truncate", self.truncate)
        for below, above in (("low", "high"), ("beta_slow", "beta_fast")):
            least, most = getattr(self, below), getattr(self, above)
            if not least < most:
                raise UsageError(
                    f"rope_scaling.{above}: {most} is too small (expected above {below}, {least})"
                )


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes a model's mathematics and the shapes of its weights.

    `n_encoder_layers == 0` is a decoder-only model; otherwise an encoder-decoder one, whose encoder
    reads `source_vocab_size` symbols. Lengths are in tokens. A family with sizes of its own has a
    subclass with more fields, all of them with defaults (docs/extending.md).
    """

    vocab_size: int
    n_layers: int = 2
    n_encoder_layers: int = 0
    source_vocab_size: int = 0
    d_model: int = 256
    n_heads: int = 8
    n_kv_heads: int = 0  # 0: as many as query heads; fewer: grouped-query attention
    d_ff: int = 0  # 0: 4 * d_model
    context: int = 1152
    positions: str = "sinusoidal"
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    activation: str = "gelu"
    bias: bool = True
    tied: bool = True  # the logits head shares the weights of the token embedding
    rope_theta: float = 10_000.0
    dropout: float = 0.0  # training only
    # Not written where they are the default: see `to_dict`.
    head_size: int = 0  # 0: d_model / n_heads
    qk_norm: bool = False  # RMSNorm of each query and key, before it is rotated
    qkv_bias: bool | None = None  # None: as `bias`; so for the next two
    out_bias: bool | None = None
    mlp_bias: bool | None = None
    window: int = 0  # positions that a token sees, its own included; 0: all before it
    first_window_layer: int = 0  # layers before it see all
    rope_scaling: RopeScaling | None = None
    family: str = ""  # in registry.MODELS; "": decoder, or seq2seq with encoder layers

    def __post_init__(self) -> None:
        self._check_family()
        if not self.n_kv_heads:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if not self.d_ff and isinstance(self.d_model, int):
            object.__setattr__(self, "d_ff", 4 * self.d_model)
        sizes = ("vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "context")
        for name in sizes:
            check_int(FLAGS.get(name, name), getattr(self, name), 1)
        check_int("--encoder-layers", self.n_encoder_layers, 0)
        check_int("source_vocab_size", self.source_vocab_size, 1 if self.n_encoder_layers else 0)
        for name in ("bias", "tied", "qk_norm"):
            check_bool(name, getattr(self, name))
        for name in ("qkv_bias", "out_bias", "mlp_bias"):
            if getattr(self, name) is not None:
                check_bool(name, getattr(self, name))
        choose(self.positions, POSITIONS, "--positions")
        choose(self.norm, NORMS, "--norm")
        choose(self.activation, ACTIVATIONS, "--activation")
        check_float("norm_eps", self.norm_eps, 0.0, 1.0, open_low=True)
        check_float("rope_theta", self.rope_theta, 1.0, 1e30)
        check_float("--dropout", self.dropout, 0.0, 0.99)
        check_int("head_size", self.head_size, 0)
        self._check_heads()
        self._check_window()
        self._check_scaling()

    def _check_family(self) -> None:
        if not self.family:
            return
        choose(self.family, tuple(MODELS), "--family")
        usual = "seq2seq" if self.n_encoder_layers else "decoder"
        if self.family == usual:
            object.__setattr__(self, "family", "")
        elif self.family in ("decoder", "seq2seq"):
            raise UsageError(f"--family: {self.family} contradicts --encoder-layers")

    def _check_heads(self) -> None:
        if not self.head_size and self.d_model % self.n_heads:
            raise UsageError(
                f"--heads: {self.n_heads} heads do not divide --d-model {self.d_model}",
                "Choose a width that is a multiple of the number of heads.",
            )
        if self.n_heads % self.n_kv_heads:
            raise UsageError(
                f"--n-kv-heads: {self.n_kv_heads} key-value heads do not divide "
                f"{self.n_heads} heads"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise UsageError(
                f"--positions: rotary needs an even head width (found {self.head_dim})"
            )
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise UsageError(f"--positions: sinusoidal needs an even width (found {self.d_model})")

    def _check_window(self) -> None:
        check_int("window", self.window, 0)
        check_int("first_window_layer", self.first_window_layer, 0, self.n_layers)
        if self.window and self.n_encoder_layers:
            raise UsageError("window: is for decoder-only models")

    def _check_scaling(self) -> None:
        if self.rope_scaling is None:
            return
        if not isinstance(self.rope_scaling, RopeScaling):
            raise UsageError(f"rope_scaling: {quoted(self.rope_scaling)} is not an object")
        if self.positions != "rotary":
            raise UsageError(f"rope_scaling: contradicts --positions {self.positions}")
        n = self.rotary_width // 2 if self.rope_scaling.kind == "longrope" else 0
        if len(self.rope_scaling.factors) != n:
            found = len(self.rope_scaling.factors)
            raise UsageError(f"rope_scaling.factors: has {found} numbers (expected {n})")
        if self.rope_scaling.kind == "yarn" and self.rope_theta <= 1.0:
            raise UsageError(f"rope_theta: {self.rope_theta} is too small for yarn")

    @property
    def head_dim(self) -> int:
        """Channels of a head: `head_size`, or by default d_model / n_heads."""
        return self.head_size or self.d_model // self.n_heads

    @property
    def rotary_width(self) -> int:
        """Channels of a head that turn where positions are rotary."""
        return self.head_dim

    @property
    def n_turns(self) -> int:
        """In how many ways positions turn, each with a table of its own."""
        return 1

    def has_bias(self, part: str) -> bool:
        """Whether the linear layers of "qkv", "out" or "mlp" have one."""
        own = getattr(self, f"{part}_bias")
        return self.bias if own is None else own

    @property
    def shared_values(self) -> bool:
        """Whether values are the keys once more, so that a cache stores one of the two."""
        return False

    @property
    def gated(self) -> bool:
        """Whether the feed-forward network has a gate beside its activation."""
        return self.activation in GATED

    @property
    def kind(self) -> str:
        """The family's name in registry.MODELS."""
        return self.family or ("seq2seq" if self.n_encoder_layers else "decoder")

    def first_layers(self, n: int) -> ModelConfig:
        """The same with the first `n` layers of the decoder alone."""
        least = min(self.first_window_layer, n)
        return dataclasses.replace(self, n_layers=n, first_window_layer=least)

    def plain(self) -> ModelConfig:
        """The same without what the added fields say."""
        return dataclasses.replace(self, **_added())

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: added fields only if they say something."""
        added, values = _added(), dataclasses.asdict(self)
        del values["family"]  # model_type says it
        kept = {k: v for k, v in values.items() if k not in added or v != added[k]}
        return {"model_type": f"{OWN}{self.kind}", **kept}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> ModelConfig:
        """Read what `to_dict` wrote; `where` names the file in errors. Raises FileError."""
        known = {field.name for field in dataclasses.fields(cls)} - {"family"}
        kind = data.get("model_type")
        if kind not in own_types():
            raise FileError(
                f"{where}: model_type {quoted(kind)} is not supported "
                f"(expected {' or '.join(own_types())})",
                "Point --model at a folder written by kvtool.",
            )
        family = kind.removeprefix(OWN)
        unknown = sorted(set(data) - known - {"model_type"})
        if unknown:
            raise FileError(f"{where}: unknown field {quoted(unknown[0])} would change the model")
        if "vocab_size" not in data:
            raise FileError(f"{where}: vocab_size is missing")
        values = {key: value for key, value in data.items() if key in known}
        try:
            if isinstance(scaling := values.get("rope_scaling"), Mapping):
                values["rope_scaling"] = RopeScaling(**scaling)
            own = family not in ("decoder", "seq2seq")
            config = cls(**values, family=family if own else "")
        except (TypeError, UsageError) as error:
            raise FileError(f"{where}: {short(str(error), 300)}") from error
        if config.kind != family:
            raise FileError(f"{where}: model_type {kind} contradicts n_encoder_layers")
        return config


def _added() -> dict[str, Any]:
    """The fields that came later, and what they are where a file does not say."""
    return {field.name: field.default for field in dataclasses.fields(ModelConfig)[-N_ADDED:]}


FLAGS = {
    "n_layers": "--layers",
    "d_model": "--d-model",
    "n_heads": "--heads",
    "n_kv_heads": "--n-kv-heads",
    "d_ff": "--d-ff",
    "context": "--context",
}


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
