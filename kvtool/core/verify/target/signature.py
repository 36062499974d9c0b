"""The meaning of a method's parameters, by their names."""

from __future__ import annotations

import inspect
import typing
from typing import Any

IDS = (
    "input_ids", "ids", "idx", "in_idx", "tokens", "token_ids", "tok", "toks", "piece_ids",
    "input_tokens", "decoder_input_ids", "tgt", "x", "input", "inputs", "inp",
)  # fmt: skip
CACHES = (
    "past_key_values", "kv_cache", "kv_caches", "cache", "caches", "past_kv", "past_kvs", "past",
    "past_kv_cache", "past_kv_caches", "layer_past", "layer_pasts", "past_key_value", "pasts",
    "past_states", "past_state", "cache_params", "key_value_cache", "kv", "kvs", "kvcache",
    "incremental_state", "inference_params", "memory", "memories", "state", "states", "mems",
    "hidden", "hidden_state", "hiddens", "prev_state", "decoder_cache", "layer_caches",
)  # fmt: skip
# Under these names some decoders answer with what they take under another.
ANSWERED = ("present", "presents", "present_key_values", "new_cache", "next_cache", "new_state")
FLAGS = (
    "use_cache", "return_cache", "use_kv_cache", "return_kv", "return_state", "store_cache",
    "return_kv_cache", "return_past", "return_past_key_values", "return_present", "output_cache",
    "use_kv", "cached", "incremental", "return_intermediates",
)  # fmt: skip
POSITIONS = (
    "position_ids", "positions", "input_pos", "cache_position", "start_pos", "start_position",
    "pos", "position", "offset", "pos_offset", "position_offset", "past_length", "past_len",
    "past_key_values_length", "cur_pos", "current_pos", "start", "start_index", "cache_index",
    "cache_len", "cache_length", "prefix_len", "seq_offset", "pos_ids", "tok_idx",
)  # fmt: skip
MASKS = (
    "attention_mask", "mask", "attn_mask", "causal_mask", "attn_bias", "masks", "tgt_mask",
)  # fmt: skip


class Signature:
    """The parameters of a callable that have names, in order, and what each is for."""

    def __init__(self, called: Any) -> None:
        self.called = called
        found = inspect.signature(called).parameters.values()
        variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        self.parameters = {p.name: p for p in found if p.kind not in variable}

    def __contains__(self, name: str) -> bool:
        return name in self.parameters

    def __str__(self) -> str:
        return ", ".join(self.parameters)

    def required(self, name: str) -> bool:
        """Whether a parameter has no default."""
        return self.parameters[name].default is inspect.Parameter.empty

    def of(self, names: tuple[str, ...]) -> list[str]:
        """Those of `names` that are parameters, and not the ids, in the order of `names`."""
        return [name for name in names if name in self.parameters and name != self.ids]

    @property
    def ids(self) -> str:
        """The parameter that takes the ids: the first, unless its name is that of something
        else and another has one of their names."""
        names = list(self.parameters)
        first = names[0] if names else ""
        if first in IDS:
            return first
        other = {*CACHES, *FLAGS, *POSITIONS, *MASKS}
        named = next((name for name in IDS if name in self.parameters), "")
        return named if named and (first in other or self.required(named)) else first

    def wrapper(self, name: str) -> Any:
        """The class that a parameter's annotation names, if it is one to be built from a tensor;
        else None."""
        try:
            hint = typing.get_type_hints(self.called).get(name)
        except Exception:  # names that only a type checker knows
            return None
        found = [kind for kind in (hint, *typing.get_args(hint)) if isinstance(kind, type)]
        own = [k for k in found if k.__module__.split(".")[0] not in ("torch", "builtins", "types")]
        return own[0] if own else None

    @property
    def positional(self) -> bool:
        """Whether the ids can be given without their name."""
        parameter = next(iter(self.parameters.values()), None)
        return (
            parameter is not None
            and parameter.name == self.ids
            and parameter.kind != inspect.Parameter.KEYWORD_ONLY
        )

    @property
    def unknown(self) -> tuple[str, ...]:
        """Required parameters whose names are not known."""
        known = {self.ids, *FLAGS, *CACHES, *POSITIONS, *MASKS}
        return tuple(name for name in self.parameters if name not in known and self.required(name))
