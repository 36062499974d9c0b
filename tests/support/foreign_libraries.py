"""Tiny random decoders of public libraries, each built as its users build it."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

V, CONTEXT = 101, 256  # ids, tokens


def seeded(module: nn.Module) -> nn.Module:
    """The module with weights of std 1/sqrt(in), with which a wrong past shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() > 1:
                weight.normal_(0, weight.shape[-1] ** -0.5)
    return module.eval()


def litgpt_llama() -> nn.Module:
    from litgpt import GPT, Config

    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_query_groups": 2, "intermediate_size": 64}
    named = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "rotary_percentage": 1.0}
    config = Config(
        block_size=CONTEXT, vocab_size=V, padded_vocab_size=V, bias=False,
        parallel_residual=False, **sizes, **named,
    )  # fmt: skip
    return seeded(GPT(config))


def x_transformers_rotary() -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, rotary_pos_emb=True)
    return seeded(TransformerWrapper(num_tokens=V, max_seq_len=CONTEXT, attn_layers=layers))


class TransformerLens:
    """HookedTransformer, whose cache is made before the first step, and which has no tokenizer."""

    vocab_size, context = V, CONTEXT

    def __init__(self) -> None:
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        sizes = {"n_layers": 2, "d_model": 32, "d_head": 8, "n_heads": 4, "rotary_dim": 8}
        config = HookedTransformerConfig(
            n_ctx=CONTEXT, d_vocab=V, act_fn="gelu", normalization_type="LN",
            positional_embedding_type="rotary", **sizes,
        )  # fmt: skip
        self.module = seeded(HookedTransformer(config))

    def start(self, batch: int, capacity: int) -> Any:
        from transformer_lens import HookedTransformerKeyValueCache

        return HookedTransformerKeyValueCache.init_cache(self.module.cfg, "cpu", batch)

    def full(self, ids: Tensor) -> Tensor:
        return self.module(ids, attention_mask=torch.ones_like(ids))

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        mask = torch.ones_like(ids)
        return self.module(ids, past_kv_cache=state, attention_mask=mask), state


def torchtune_llama3() -> nn.Module:
    from torchtune.models.llama3 import llama3

    sizes = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32}
    model = llama3(vocab_size=V, max_seq_len=CONTEXT, intermediate_dim=64, **sizes)
    return seeded(model)


def torchtune_gemma2() -> nn.Module:
    from torchtune.models.gemma2 import gemma2

    sizes = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "head_dim": 8}
    model = gemma2(
        vocab_size=V, max_seq_len=CONTEXT, intermediate_dim=64, sliding_window_size=16,
        query_pre_attn_scalar=8, **sizes,
    )  # fmt: skip
    return seeded(model)


def curated_llama() -> nn.Module:
    from curated_transformers.models import LlamaCausalLM, LlamaConfig

    sizes = {"n_hidden_layers": 2, "n_query_heads": 4, "n_key_value_heads": 2, "n_pieces": V}
    config = LlamaConfig(
        hidden_width=32, intermediate_width=64, dtype=torch.float32,
        rotary_embedding_fraction=1.0, **sizes,
    )  # fmt: skip
    return seeded(LlamaCausalLM(config))


FROM_SCRATCH = {
    "vocab_size": V, "context_length": CONTEXT, "emb_dim": 32, "n_heads": 4, "n_layers": 2,
    "drop_rate": 0.0, "qkv_bias": False, "hidden_dim": 64, "n_kv_groups": 2, "rope_base": 1e4,
    "dtype": torch.float32, "rope_freq": None, "head_dim": 8, "qk_norm": True,
}  # fmt: skip


def from_scratch_gpt2() -> nn.Module:
    from llms_from_scratch.kv_cache.gpt2 import GPTModel

    return seeded(GPTModel(FROM_SCRATCH))


def from_scratch_qwen3() -> nn.Module:
    from llms_from_scratch.kv_cache.qwen3 import Qwen3Model

    return seeded(Qwen3Model(FROM_SCRATCH))


class Keras:
    """A causal model of keras-hub: call_with_cache is told where a step begins."""

    vocab_size, context = V, CONTEXT

    def __init__(self, kind: str, n_kv_heads: int, **sizes: Any) -> None:
        os.environ["KERAS_BACKEND"] = "torch"
        import keras_hub

        backbone = getattr(keras_hub.models, f"{kind}Backbone")(
            vocabulary_size=V, num_layers=2, hidden_dim=32, intermediate_dim=64, **sizes
        )
        self.module = getattr(keras_hub.models, f"{kind}CausalLM")(backbone=backbone)
        self.n_kv_heads = n_kv_heads
        generator = torch.Generator().manual_seed(0)
        for weight in self.module.weights:
            if len(weight.shape) > 1:
                drawn = torch.randn(*weight.shape, generator=generator)
                weight.assign(drawn * weight.shape[-1] ** -0.5)

    def start(self, batch: int, capacity: int) -> Any:
        return torch.zeros(batch, 2, 2, capacity, self.n_kv_heads, 8), 0

    def full(self, ids: Tensor) -> Tensor:
        return self.module({"token_ids": ids, "padding_mask": torch.ones_like(ids)})

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, _, cache = self.module.call_with_cache(ids, *state)
        return logits, (cache, state[1] + ids.shape[1])


def keras_gpt2() -> Keras:
    return Keras("GPT2", 4, num_heads=4, max_sequence_length=CONTEXT)


def keras_mistral() -> Keras:
    return Keras("Mistral", 2, num_query_heads=4, num_key_value_heads=2, sliding_window=16)


def keras_gemma() -> Keras:
    return Keras("Gemma", 2, num_query_heads=4, num_key_value_heads=2, head_dim=8)
