"""kvtool/data/architectures.json: what transformers' configurations say where a file says nothing.

python tests/support/architectures.py        writes it from the transformers that is installed
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import kvtool
from kvtool.core.plan.architectures import FIELDS, LAYERS
from kvtool.core.plan.layers import UNPLANNED
from kvtool.core.verify.hf.library import CAUSAL, SEQ2SEQ, known_types

LETTERS = {kind: letter for letter, kind in LAYERS.items()}
TABLE = Path(kvtool.__file__).parent / "data" / "architectures.json"


def architectures() -> dict[str, Any]:
    """An entry for each type, and for the parts of those that are several models."""
    from transformers import CONFIG_MAPPING

    found: dict[str, Any] = {}
    for name in sorted({*known_types(CAUSAL), *known_types(SEQ2SEQ)} - UNPLANNED.keys()):
        try:
            config = CONFIG_MAPPING[name]()
            text = config.get_text_config(decoder=True)
        except Exception:  # it has no default: such a type is not planned
            continue
        if text is config or text.model_type == config.model_type:
            found[name] = entry(config)
            continue
        part = next((key for key, value in vars(config).items() if value is text), "")
        if not part:  # made of several
            continue
        found[name] = {"part": part, "type": text.model_type, **otherwise(text)}
        found.setdefault(text.model_type, entry(text))
    return dict(sorted(found.items()))


def entry(config: Any) -> dict[str, Any]:
    """The names of its fields, what they are where a file does not say, and its layers."""
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    names = {known: own for known, own in config.attribute_map.items() if known in FIELDS}
    own = {known: names.get(known, known) for known in FIELDS}  # two may be one
    found = {known: fields.get(name, fields.get(known)) for known, name in own.items()}
    defaults = {known: value for known, value in found.items() if plain(value)}
    kinds = getattr(config, "layer_types", None) or ()
    letters = "".join(LETTERS.get(kind, "?") for kind in kinds)
    layers = {"layers": letters} if len(set(letters)) > 1 else {}
    return {"names": names, "defaults": defaults, **layers}


def otherwise(text: Any) -> dict[str, Any]:
    """What a part has otherwise than its type alone has."""
    usual, own = vars(type(text)()), entry(text)
    names = {known: own["names"].get(known, known) for known in own["defaults"]}
    changed = {
        known: vars(text)[name]
        for known, name in names.items()
        if plain(vars(text).get(name)) and vars(text)[name] != usual.get(name)
    }
    return {"defaults": changed} if changed else {}


def plain(value: Any) -> bool:
    """Whether JSON has it, and it says something."""
    return isinstance(value, (bool, int, float, str, dict)) and value is not dataclasses.MISSING


def written() -> str:
    """What the file holds."""
    rows = [f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in architectures().items()]
    return "{\n" + ",\n".join(rows) + "\n}\n"


if __name__ == "__main__":
    TABLE.write_text(written(), encoding="utf-8")
