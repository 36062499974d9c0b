"""config.json of a Hugging Face folder, field by field. A field that no family reads is refused."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from kvtool.config import check_bool, check_float, check_int
from kvtool.errors import UsageError
from kvtool.reading import quoted, short

# Fields that change no logit of a decoder in evaluation, whatever their value, grouped by topic.
_HARMLESS = {
    "names and bookkeeping": "_commit_hash _model_name_or_path _name_or_path architectures "
    "dtype finetuning_task is_decoder is_llama_config model_type name_or_path prefix "
    "task_specific_params tokenizer_class torch_dtype transformers.js_config "
    "transformers_version unsloth_fixed unsloth_version",
    "how to run": "_attn_implementation _attn_implementation_autoset cache_implementation "
    "chunk_size_feed_forward "
    "gradient_checkpointing output_attentions output_hidden_states pretraining_tp "
    "reorder_and_upcast_attn return_dict return_dict_in_generate tf_legacy_loss torchscript "
    "output_past use_bfloat16 use_cache xla_device",
    "training and other tasks": "attention_dropout attn_pdrop classifier_dropout embd_pdrop "
    "_num_labels hidden_dropout id2label initializer_range label2id num_labels problem_type "
    "resid_pdrop predict_special_tokens n_special "
    "summary_activation summary_first_dropout summary_proj_to_labels summary_type "
    "summary_use_proj",
    "token ids (`end_ids` reads eos_token_id)": "bos_token_id decoder_start_token_id eos_token_id "
    "forced_bos_token_id forced_eos_token_id pad_token_id sep_token_id unk_token_id",
    "generation, kept here by older versions": "bad_words_ids begin_suppress_tokens "
    "diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
    "exponential_decay_length_penalty length_penalty max_length min_length no_repeat_ngram_size "
    "num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values "
    "repetition_penalty suppress_tokens temperature top_k top_p typical_p",
    "GPT-2's n_positions, once more": "n_ctx",
}
HARMLESS = frozenset(" ".join(_HARMLESS.values()).split())

# Fields that may change the logits, each with the one value that does not.
NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
    "use_mrope": False,
}

# Flags and numbers for which transformers itself takes null.
NULLABLE = frozenset({"partial_rotary_factor", "rope_theta", "use_bidirectional_attention"})


class Fields:
    """The fields of one configuration. Raises UsageError, naming the field. Null is not given, but
    for what transformers takes no null for: flags, numbers that are not whole, and names."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = {name: value for name, value in data.items() if value is not None}
        self._null = {name for name, value in data.items() if value is None}
        self._taken: set[str] = set()

    def is_null(self, name: str) -> bool:
        """Whether the field is there, and null."""
        return name in self._null

    def assume(self, **values: Any) -> None:
        """Set the values of fields that are absent."""
        for name, value in values.items():
            if name not in self._null:
                self.data.setdefault(name, value)

    def require(self, **values: Any) -> None:
        """Raise UsageError for a field that is present with another value."""
        for name, value in values.items():
            if isinstance(value, bool):
                self._refuse_null(name, "true or false")
            if self.take(name, value) != value:
                found = short(str(self.data[name]))
                raise UsageError(f"{name}: {found} is not supported (expected {value})")

    def take(self, name: str, default: Any = None) -> Any:
        """The value as it is."""
        self._taken.add(name)
        return self.data.get(name, default)

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number, 1 or more."""
        value = self.take(name, default)
        if value is None:
            raise UsageError(f"{name} is missing")
        check_int(name, value, 1)
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        self._refuse_null(name, "a number")
        value = self.take(name, default)
        if value is None:
            raise UsageError(f"{name} is missing")
        check_float(name, value, 0.0, 1e30, open_low=True)
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        self._refuse_null(name, "true or false")
        value = self.take(name, default)
        check_bool(name, value)
        return bool(value)

    def one_of(self, name: str, choices: Mapping[str, str], default: str | None = None) -> str:
        """What the value stands for among `choices`."""
        self._refuse_null(name, f"one of {', '.join(choices)}")
        value = self.take(name, default)
        if not isinstance(value, str) or value not in choices:
            raise UsageError(
                f"{name}: {quoted(value)} is not supported (expected one of {', '.join(choices)})"
            )
        return choices[value]

    def _refuse_null(self, name: str, expected: str) -> None:
        if name in self._null - NULLABLE:
            raise UsageError(f"{name}: is null (expected {expected})", "Leave it out.")

    def finish(self, harmless: Set[str] = HARMLESS, neutral: Mapping[str, Any] = NEUTRAL) -> None:
        """Raise UsageError for a field that was not taken and might change the mathematics."""
        for name, value in self.data.items():
            if name in self._taken or name in harmless:
                continue
            if name not in neutral:
                found = f"{quoted(name)} (found {quoted(str(value))})"
                raise UsageError(
                    f"unknown field {found} might change the model",
                    "kvtool ignores only what is known to change no logit.",
                )
            if value != neutral[name]:
                raise UsageError(
                    f"{name}: {short(str(value))} is not supported (expected {neutral[name]})"
                )


def head_size(f: Fields, heads: str, width: str, own: int | None = None) -> tuple[int, int, int]:
    """(width, heads, width of a head) from the fields of those names; `own` is the default of
    head_dim where that is not the quotient. Raises UsageError for heads that do not divide."""
    d_model, n_heads = f.size(width), f.size(heads)
    if own is None and "head_dim" not in f.data:
        if d_model % n_heads:
            raise UsageError(f"{heads}: {n_heads} heads do not divide {width} {d_model}")
        return d_model, n_heads, d_model // n_heads
    return d_model, n_heads, f.size("head_dim", own)
