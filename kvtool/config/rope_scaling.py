"""How rotary positions are scaled for a longer context."""

from __future__ import annotations

from dataclasses import dataclass

from kvtool.config.checks import check_bool, check_float, check_int
from kvtool.errors import UsageError
from kvtool.reading import quoted
from kvtool.registry import choose

ROPE_SCALINGS = ("linear", "llama3", "yarn", "longrope")


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
