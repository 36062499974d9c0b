"""What is known of a model before anything of it is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from kvtool.core.plan.layers import Shapes

CONFIGURATION = "configuration"
PART = "configuration of the language model"  # of a model that has other parts too
EXPERT = re.compile(r"(^|\.)experts(\.|$)|_exps\.")


@dataclass(frozen=True)
class Weights:
    """Bytes of all weights, and of those that a step reads at least; how they are known."""

    nbytes: int
    read: int
    said_by: str  # CONFIGURATION, PART, "headers" or "option"


@dataclass(frozen=True)
class Described:
    """A model as far as its configuration says."""

    name: str
    model_type: str
    dtype: str  # of keys and values
    shapes: Shapes
    weights: Weights | None
    unknown: str = ""  # why weights is None
    dtype_assumed: bool = False  # as nothing says it
    read_share: Fraction = Fraction(1)  # of the weights, by a step at least, if weights is None
