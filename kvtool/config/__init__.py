"""Settings: of a model (`model`, `rope_scaling`) and of what runs it (`runs`). Imports no torch.

Values are checked when an object is made (`checks`), so that a bad one is refused before anything
is built.
"""

from kvtool.config.checks import (
    LARGEST_SIZE,
    check_bool,
    check_float,
    check_int,
    check_setting,
    require_cache_kind,
)
from kvtool.config.model import (
    ACTIVATIONS,
    GATED,
    NORMS,
    OWN,
    POSITIONS,
    ModelConfig,
    own_types,
)
from kvtool.config.rope_scaling import RopeScaling
from kvtool.config.runs import (
    DECODE_TOKENS,
    DEVICES,
    DTYPES,
    LENGTH_PENALTY,
    SCHEDULES,
    GenerateConfig,
    RunConfig,
    TrainConfig,
    TrainLength,
    is_main_rank,
    process_rank,
)

__all__ = [
    "ACTIVATIONS",
    "DECODE_TOKENS",
    "DEVICES",
    "DTYPES",
    "GATED",
    "LARGEST_SIZE",
    "LENGTH_PENALTY",
    "NORMS",
    "OWN",
    "POSITIONS",
    "SCHEDULES",
    "GenerateConfig",
    "ModelConfig",
    "RopeScaling",
    "RunConfig",
    "TrainConfig",
    "TrainLength",
    "check_bool",
    "check_float",
    "check_int",
    "check_setting",
    "is_main_rank",
    "own_types",
    "process_rank",
    "require_cache_kind",
]
