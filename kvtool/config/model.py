"""What fixes a model: its sizes, and the mathematics of its blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvtool.config.checks import check_bool, check_float, check_int
from kvtool.config.rope_scaling import RopeScaling
from kvtool.errors import FileError, UsageError
from kvtool.reading import quoted, short
from kvtool.registry import MODELS, choose

POSITIONS = ("sinusoidal", "learned", "rotary")
NORMS = ("layernorm", "rmsnorm")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "geglu", "swiglu")
GATED = ("geglu", "swiglu")  # activations with a gate beside them
OWN = "kvtool-"  # model_type of a checkpoint of kvtool: this and the family
N_ADDED = 9  # the last fields of ModelConfig, which came after the first checkpoints
FLAGS = {
    "n_layers": "--layers",
    "d_model": "--d-model",
    "n_heads": "--heads",
    "n_kv_heads": "--n-kv-heads",
    "d_ff": "--d-ff",
    "context": "--context",
}


def own_types() -> list[str]:
    """What model_type may be in a checkpoint of kvtool."""
    return [f"{OWN}{family}" for family in MODELS]


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
