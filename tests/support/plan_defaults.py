"""Default configurations, whole and in raw files: has DynamicCache the layers that plan says?

A forward pass is not needed: `DynamicCache(config=...)` says of each layer whether it has a window.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvtool.core.plan.layers import UNPLANNED
from kvtool.core.plan.source import describe
from kvtool.core.verify.hf.library import SEQ2SEQ, known_types
from kvtool.errors import KvtoolError

WINDOW = 7
# Its DynamicCache counts the layers of the encoder, and grows when the decoder's are used.
UNLIKE = ("blenderbot",)
# What a file may say; a type takes those that are fields of its configuration.
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"num_hidden_layers": 5},
    {"sliding_window": WINDOW},
    {"sliding_window": None},
    {"use_sliding_window": False, "sliding_window": WINDOW},
    {"use_sliding_window": True, "sliding_window": WINDOW},
    {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3},
    {"attention_chunk_size": WINDOW},
    {"num_key_value_heads": None},
)


def differences(name: str) -> Iterator[str]:
    """In which changes of its defaults a causal type's plan is not its cache, and how."""
    from transformers import CONFIG_MAPPING

    if name in UNPLANNED or name in UNLIKE:
        return
    fields = CONFIG_MAPPING[name].__dataclass_fields__
    for changes in CHANGES:
        if not changes.keys() <= fields.keys():
            continue
        try:
            config = CONFIG_MAPPING[name](**changes)
            found = windows(config, name)
        except Exception:  # transformers itself refuses it
            continue
        raw = {"model_type": name, **changes}
        for how, data in (("raw", raw), ("whole", config.to_dict())):
            planned = _planned(data, name)
            refused = how == "raw" and changes and isinstance(planned, str)  # never guessed
            if planned != found and not refused:
                yield f"{how} {changes}: planned {planned}, allocated {found}"


def windows(config: Any, name: str) -> list[int]:
    """The window of each layer of a type's cache that keeps keys, 0 for none."""
    from transformers import DynamicCache

    if name in known_types(SEQ2SEQ):
        config.is_encoder_decoder = False
    layers = DynamicCache(config=config).layers
    kept = [layer for layer in layers if type(layer).__name__ != "DummyLayer"]
    return [getattr(layer, "sliding_window", None) or 0 for layer in kept]


def _planned(data: dict[str, Any], name: str) -> list[int] | str:
    if name in known_types(SEQ2SEQ):
        data = {**data, "is_encoder_decoder": False}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(data, default=str))
        try:
            return [layer.window for layer in describe(str(path), "float32").shapes.layers]
        except KvtoolError as error:
            return error.message.partition("config.json: ")[2]
