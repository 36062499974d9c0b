"""Bugs planted in decoders of public libraries: one line of theirs is changed for each.

    python tests/support/foreign_bugs.py [NAME ...]

judges each in a few scenarios, and prints what was planted beside what is said of it.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import foreign_libraries as libraries
import kvtool


class Bug(NamedTuple):
    """A line of a library, what it is replaced by, and what its name has to say."""

    build: Callable[[], Any]
    place: str  # module:Class.method
    line: str
    instead: str
    what: str  # it does
    named: str  # a pattern that a right name holds

    @property
    def package(self) -> str:
        return self.place.partition(".")[0]

    @property
    def installed(self) -> bool:
        return find_spec(self.package) is not None


def llama_of_transformers() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return libraries.seeded(LlamaForCausalLM(LlamaConfig(**SIZES)))


def mistral_of_transformers() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return libraries.seeded(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)))


def gemma2_of_transformers() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**SIZES, head_dim=8, sliding_window=16, attn_logit_softcapping=2.0)
    config._attn_implementation = "eager"
    return libraries.seeded(Gemma2ForCausalLM(config))


def from_scratch_llama3() -> nn.Module:
    from llms_from_scratch.kv_cache.llama3 import Llama3Model

    return libraries.seeded(Llama3Model(libraries.FROM_SCRATCH))


class XTransformers:
    """The decoder as it asks to be called: all ids so far, of which it computes the new ones."""

    vocab_size, context = libraries.V, libraries.CONTEXT

    def __init__(self) -> None:
        self.module = libraries.x_transformers_rotary()

    def full(self, ids: Tensor) -> Tensor:
        return self.module(ids)

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        if state is not None and ids.shape[1] > 1:
            raise NotImplementedError("it computes the last token alone")
        ids, cache = (ids, None) if state is None else (torch.cat([state[0], ids], 1), state[1])
        logits, cache = self.module(ids, return_intermediates=True, cache=cache)
        return logits[:, -1:] if state else logits, (ids, cache)


SIZES = {
    "vocab_size": libraries.V, "max_position_embeddings": libraries.CONTEXT, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SCENARIOS = ["decode", "chunks", "rows", "permuted", "crop"]

PLANTED: dict[str, Bug] = {
    "litgpt-position": Bug(
        libraries.litgpt_llama,
        "litgpt.model:GPT.forward",
        "cos = batched_index_select(self.cos, 0, input_pos)",
        "input_pos = input_pos - int(T == 1)\n"
        "        cos = batched_index_select(self.cos, 0, input_pos)",
        "steps of one token stand, and are stored, one too low",
        "over its last one|does not see token",
    ),
    "litgpt-heads": Bug(
        libraries.litgpt_llama,
        "litgpt.model:CausalSelfAttention.forward",
        "k = k.repeat_interleave(q_per_kv, dim=1)  # (B, nh_q, T, hs)",
        "k = k.repeat_interleave(q_per_kv, dim=1) if T > 1 else k.repeat(1, q_per_kv, 1, 1)",
        "steps of one token read the keys of another head",
        "the keys .* another's: head",
    ),
    "litgpt-scale": Bug(
        libraries.litgpt_llama,
        "litgpt.model:CausalSelfAttention.scaled_dot_product_attention",
        "scale = scale * self.mscale * self.mscale",
        "scale = scale if mask is None else 1.0 / math.sqrt(self.config.n_embd)",
        "scores are scaled otherwise through the cache",
        "the scale",
    ),
    "litgpt-mask": Bug(
        libraries.litgpt_llama,
        "litgpt.model:GPT.forward",
        "mask = batched_index_select(self.mask_cache, 2, input_pos)",
        "mask = self.mask_cache[:, :, :T]",
        "the mask is aligned top-left",
        "aligned top-left",
    ),
    "qwen3-position": Bug(
        libraries.from_scratch_qwen3,
        "llms_from_scratch.kv_cache.qwen3:Qwen3Model.forward",
        "start_pos=pos_start,",
        "start_pos=max(pos_start - 1, 0),",
        "positions one too low after the first step",
        "one too low|1 too low",
    ),
    "qwen3-layer": Bug(
        libraries.from_scratch_qwen3,
        "llms_from_scratch.kv_cache.qwen3:Qwen3Model.forward",
        "cache.update(i, new_blk_cache)",
        "cache.update(i, (new_blk_cache[0], (*next_cache, new_blk_cache)[0][1]))",
        "layer 1 stores the values of layer 0",
        "the values .* those of layer 0",
    ),
    "qwen3-causal": Bug(
        libraries.from_scratch_qwen3,
        "llms_from_scratch.kv_cache.qwen3:Qwen3Model.forward",
        ")[pos_start:pos_end, :pos_end]",
        ")[pos_start:pos_end, :pos_end] & (pos_start == 0)",
        "no causal mask once there is a past",
        "no causal mask",
    ),
    "llama3-rotated-twice": Bug(
        from_scratch_llama3,
        "llms_from_scratch.kv_cache.llama3:GroupedQueryAttention.forward",
        "keys = torch.cat([prev_k, keys_new], dim=2)",
        "keys = torch.cat([apply_rope(prev_k, cos, sin), keys_new], dim=2)",
        "stored keys are rotated again at each step",
        "rotated twice",
    ),
    "llama3-first": Bug(
        from_scratch_llama3,
        "llms_from_scratch.kv_cache.llama3:GroupedQueryAttention.forward",
        "attn_scores = attn_scores.masked_fill(mask, -torch.inf)",
        "attn_scores = attn_scores.masked_fill("
        "mask | ((torch.arange(keys.shape[2]) == 0) & (start_pos > 0)), -torch.inf)",
        "the first token is not seen after the first step",
        "first token is lost",
    ),
    "torchtune-slot": Bug(
        libraries.torchtune_llama3,
        "torchtune.modules.kv_cache:KVCache.update",
        "self.cache_pos.add_(seq_len)",
        "self.cache_pos.add_(seq_len - int(seq_len > 1 and self.size == 0))",
        "steps after the first are stored one slot too low",
        "one slot too low",
    ),
    "torchtune-values": Bug(
        libraries.torchtune_llama3,
        "torchtune.modules.kv_cache:KVCache.update",
        "v_out[:, :, self.cache_pos[:seq_len]] = v_val",
        "v_out[:, :, self.cache_pos[:seq_len]] = v_val if seq_len > 1 else k_val",
        "steps of one token store keys for values",
        "the values .* are the keys",
    ),
    "torchtune-keys-at-0": Bug(
        libraries.torchtune_llama3,
        "torchtune.modules.attention:MultiHeadAttention.forward",
        "k = self.pos_embeddings(k, input_pos=input_pos)",
        "k = self.pos_embeddings(k, input_pos=None)",
        "keys of each step are rotated as if it began at 0, queries are right",
        "keys .* began at position 0",
    ),
    "curated-length": Bug(
        libraries.curated_llama,
        "curated_transformers.layers.embeddings:QueryKeyRotaryEmbeddings.forward",
        "cache_len = cache.key.size(-2)",
        "cache_len = cache.key.size(-1)",
        "each step begins at position 8: the width of a head is taken for the length",
        "8 at most|at positions? 8",
    ),
    "curated-keys": Bug(
        libraries.curated_llama,
        "curated_transformers.layers.attention:SelfAttention.forward",
        "return output, KeyValueCache(key=key, value=value)",
        "return output, KeyValueCache(key=key, value=key)",
        "keys are stored for values",
        "the values .* are the keys",
    ),
    "curated-mask": Bug(
        libraries.curated_llama,
        "curated_transformers.layers.attention:ScaledDotProductAttention.forward",
        "if use_causal_mask:",
        "if use_causal_mask and query.shape[2] == key.shape[2]:",
        "no causal mask once there is a past",
        "no causal mask",
    ),
    "x-swapped": Bug(
        XTransformers,
        "x_transformers.x_transformers:Attention.forward",
        "ck, cv = cache.cached_kv",
        "cv, ck = cache.cached_kv",
        "keys and values of the past are exchanged",
        "the keys .* are the values|the values .* are the keys",
    ),
    "x-newest": Bug(
        libraries.x_transformers_rotary,
        "x_transformers.x_transformers:Attention.forward",
        "cached_kv = (k[..., mem_len:, :], v[..., mem_len:, :])",
        "cached_kv = (k[..., mem_len:, :], v[..., mem_len:, :].roll(1, -2)"
        " if exists(cache) else v[..., mem_len:, :])",
        "values are stored one slot off, once for each step",
        "the values",
    ),
    "lens-queries-at-0": Bug(
        libraries.TransformerLens,
        "transformer_lens.components.abstract_attention:AbstractAttention.forward",
        "q = self.hook_rot_q(self.apply_rotary(q, kv_cache_pos_offset, attention_mask))",
        "q = self.hook_rot_q(self.apply_rotary(q, 0, attention_mask[:, -q.shape[1]:]))",
        "queries of each step are rotated as if it began at 0, keys are right",
        "queries .* began at position 0",
    ),
    "lens-mask": Bug(
        libraries.TransformerLens,
        "transformer_lens.components.abstract_attention:AbstractAttention.apply_causal_mask",
        "final_mask = self.mask[None, None, -query_ctx_length:, -key_ctx_length:]",
        "final_mask = self.mask[None, None, :query_ctx_length, :key_ctx_length]",
        "the mask is aligned top-left",
        "aligned top-left",
    ),
    "lens-values": Bug(
        libraries.TransformerLens,
        "transformer_lens.past_key_value_caching:HookedTransformerKeyValueCacheEntry.append",
        "self.past_values = updated_values",
        "self.past_values = updated_values.roll(1, 2)",
        "values are stored under another head",
        "the values .* another's: head",
    ),
    "keras-position": Bug(
        libraries.keras_gpt2,
        "keras_hub.src.models.gpt2.gpt2_causal_lm:GPT2CausalLM.call_with_cache",
        "tokens, start_index=cache_update_index",
        "tokens, start_index=0",
        "positions restart in each step",
        "start at 0 again",
    ),
    "keras-window": Bug(
        libraries.keras_mistral,
        "keras_hub.src.models.mistral.mistral_transformer_decoder:"
        "MistralTransformerDecoder._compute_self_attention_mask",
        'causal_mask_upper = ops.cast(i < j + self.sliding_window, "int32")',
        "causal_mask_upper = ops.cast("
        'i < j + self.sliding_window + (self_attention_cache is not None), "int32")',
        "the window is one token too wide through the cache",
        "one token too wide",
    ),
    "keras-rows": Bug(
        libraries.keras_gemma,
        "keras_hub.src.models.gemma.gemma_attention:CachedGemmaAttention.call",
        "value_update = self.value_dense(x)",
        "value_update = ops.repeat(self.value_dense(x)[:1], ops.shape(x)[0], axis=0)",
        "every row stores the values of row 0",
        "row",
    ),
    "hf-crop": Bug(
        llama_of_transformers,
        "transformers.cache_utils:DynamicLayer.crop",
        "self.values = self.values[..., : -abs(tokens_to_remove), :]",
        "self.values = self.values[..., abs(tokens_to_remove) :, :]",
        "crop takes the oldest values, not the newest",
        "taken back are still read|the values",
    ),
    "hf-select": Bug(
        llama_of_transformers,
        "transformers.cache_utils:DynamicLayer.batch_select_indices",
        "self.values = self.values[indices, ...]",
        "self.values = self.values[: len(indices)]",
        "values are not reordered with their rows, and `reorder_cache` is right",
        "the values .* another's: row|rows read each other",
    ),
    "hf-window": Bug(
        mistral_of_transformers,
        "transformers.cache_utils:DynamicSlidingWindowLayer.get_mask_sizes",
        "kv_offset = max(self.cumulative_length - self.sliding_window + 1, 0)",
        "kv_offset = max(self.cumulative_length - self.sliding_window, 0)",
        "keys of a full window are masked as if each was one older",
        "one token too narrow|token 19 does not see token 4",
    ),
    "hf-softcap": Bug(
        gemma2_of_transformers,
        "transformers.models.gemma2.modeling_gemma2:eager_attention_forward",
        "if softcap is not None:",
        "if softcap is not None and query.shape[2] > 1:",
        "scores are not capped in steps of one token",
        "the cap",
    ),
    "hf-position": Bug(
        llama_of_transformers,
        "transformers.models.llama.modeling_llama:LlamaModel.forward",
        "past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0",
        "past_seen_tokens = 0",
        "positions start at 0 again where the caller gives none",
        "positions start at 0 again",
    ),
}


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """Within, the library's line is the other one. Raises LookupError if it has no such line."""
    module_name, _, path = bug.place.partition(":")
    owner: Any = import_module(module_name)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    right = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(right)))
    if bug.line not in source:
        raise LookupError(f"{bug.place} has no such line: another version")
    wrong = source.replace(bug.line, bug.instead)
    wrong = re.sub(r"\A(@.*\n)+", "", wrong).replace("super()", f"super({outer[-1:] or ''}, self)")
    made: dict[str, Any] = {}
    exec(compile(wrong, f"<{bug.place}, changed>", "exec"), inspect.unwrap(right).__globals__, made)
    setattr(owner, name, made[name])
    try:
        yield
    finally:
        setattr(owner, name, right)


def judged(bug: Bug, scenarios: Sequence[str] = SCENARIOS) -> kvtool.Verification:
    """What is found of a decoder with the bug."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    with planted(bug):
        return kvtool.verify(bug.build(), scenarios=scenarios)


def names_of(found: kvtool.Verification) -> list[str]:
    """The bugs that are named, in all scenarios."""
    named = (name for c in found.wrong for name in c.finding.diagnosis.bugs)
    return list(dict.fromkeys(named))


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or PLANTED:
        bug, began = PLANTED[name], time.perf_counter()
        try:
            found = judged(bug)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        seconds = time.perf_counter() - began
        names = names_of(found)
        right = [n for n in names if re.search(bug.named, n)]
        named = "not named" if not names else "named" if right == names else "NAMED OTHERWISE"
        caught = "caught" if found.wrong else "NOT CAUGHT"
        print(f"{name}: {caught}, {named} ({seconds:.0f} s)\n  planted: {bug.what}", flush=True)
        for checked in found.wrong:
            f = checked.finding
            said = f.diagnosis.hint or f.evidence
            print(f"  {f.scenario}: {f.verdict} {f.first_wrong}: {f.diagnosis.place}: {said}")
        if not found.wrong:
            print(f"  {found.conclusion}")


if __name__ == "__main__":
    main()
