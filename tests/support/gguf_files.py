"""Tiny GGUF files of every family, with random weights, as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

V, CONTEXT = 300, 128
Array = NDArray[np.float32]


@dataclass
class Made:
    """What to write: sizes of one family, and what a test asks for beside."""

    arch: str = "llama"
    n_layers: int = 2
    d_model: int = 64
    d_ff: int = 96
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 16
    vocab: int = V
    tied: bool = False
    formats: tuple[str, ...] = ("Q4_1", "Q8_0", "F16", "BF16", "Q4_0", "Q5_1", "F32")
    fields: dict[str, Any] = field(default_factory=dict)  # more of the architecture's own
    tensors: dict[str, Array] = field(default_factory=dict)  # more, or others
    tokens: list[str] | None = None
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None  # writes its fields
    seed: int = 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, as NumPy has them."""
        d = self.d_model
        found: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.vocab, d)}
        if self.arch == "gpt2":
            found["position_embd.weight"] = (CONTEXT, d)
        for i in range(self.n_layers):
            block = self._gpt2_block() if self.arch == "gpt2" else self._llama_block()
            found |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
        found["output_norm.weight"] = (d,)
        if self.arch == "gpt2":
            found["output_norm.bias"] = (d,)
        if not self.tied:
            found["output.weight"] = (self.vocab, d)
        return found

    def _gpt2_block(self) -> dict[str, tuple[int, ...]]:
        d, ff = self.d_model, self.d_ff
        matrices = {"attn_qkv": (3 * d, d), "attn_output": (d, d), "ffn_up": (ff, d)}
        matrices |= {"ffn_down": (d, ff), "attn_norm": (d,), "ffn_norm": (d,)}  # type: ignore[dict-item]
        return {
            f"{name}.{part}": shape if part == "weight" else shape[:1]
            for name, shape in matrices.items()
            for part in ("weight", "bias")
        }

    def _llama_block(self) -> dict[str, tuple[int, ...]]:
        d, ff, w = self.d_model, self.d_ff, self.head_dim
        q, kv = self.n_heads * w, self.n_kv_heads * w
        found: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (d,), "ffn_norm.weight": (d,), "attn_q.weight": (q, d),
            "attn_k.weight": (kv, d), "attn_v.weight": (kv, d), "attn_output.weight": (d, q),
            "ffn_gate.weight": (ff, d), "ffn_up.weight": (ff, d), "ffn_down.weight": (d, ff),
        }  # fmt: skip
        if self.arch == "qwen2":
            found |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        if self.arch == "qwen3":
            found |= {"attn_q_norm.weight": (w,), "attn_k_norm.weight": (w,)}
        return found

    def values(self) -> dict[str, Array]:
        """Random tensors; those of one dimension are near 1 where they are norms."""
        drawn = np.random.default_rng(self.seed)
        found = {}
        for name, shape in self.shapes.items():
            values = drawn.standard_normal(shape).astype(np.float32) / np.sqrt(shape[-1])
            norm = "norm" in name and name.endswith("weight")
            found[name] = (1 + 0.2 * values if norm else 2 * values).astype(np.float32)
        return {**found, **self.tensors}

    def write(self, path: Path) -> Path:
        """Write the file, and return its path."""
        writer = gguf.GGUFWriter(path, self.arch)
        self._write_fields(writer)
        kinds = [getattr(Type, name) for name in self.formats]
        for n, (name, values) in enumerate(self.values().items()):
            kind = Type.F32 if values.ndim < 2 else kinds[n % len(kinds)]
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _write_fields(self, writer: gguf.GGUFWriter) -> None:
        writer.add_name("tiny")
        writer.add_file_type(3)
        writer.add_context_length(CONTEXT)
        writer.add_embedding_length(self.d_model)
        writer.add_block_count(self.n_layers)
        writer.add_feed_forward_length(self.d_ff)
        writer.add_head_count(self.n_heads)
        if self.arch == "gpt2":
            writer.add_layer_norm_eps(1e-5)
        else:
            writer.add_head_count_kv(self.n_kv_heads)
            writer.add_layer_norm_rms_eps(1e-5)
            writer.add_rope_freq_base(10_000.0)
            writer.add_vocab_size(self.vocab)
            if self.arch == "llama":
                writer.add_rope_dimension_count(self.head_dim)
            if self.head_dim * self.n_heads != self.d_model or self.arch == "qwen3":
                writer.add_key_length(self.head_dim)
                writer.add_value_length(self.head_dim)
        for name, value in self.fields.items():
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](name, value)
        if self.tokenizer is not None:
            self.tokenizer(writer)
        else:
            byte_level(writer, self.tokens or bytes_and(self.vocab))


def bytes_and(n: int) -> list[str]:
    """The alphabet of byte-level BPE, a special token, and merges of two and three letters."""
    from tokenizers import pre_tokenizers

    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pairs = [a + b for a in "Ġabehilnorst" for b in "aehilnorst"]
    return [*tokens, *pairs][:n] + [f"<unused{i}>" for i in range(n - len(tokens) - len(pairs))]


def byte_level(
    writer: gguf.GGUFWriter,
    tokens: list[str],
    pre: str = "gpt-2",
    merges: list[str] | None = None,
    special: Collection[str] = (),
) -> None:
    """The fields of a tokenizer as GPT-2's; without `merges`, each token of two letters is one, and
    what begins as <|end|> does is special."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    special = special or [t for t in tokens if t.startswith("<") and len(t) > 2]
    writer.add_token_types([3 if t in special else 1 for t in tokens])
    pairs = [f"{t[0]} {t[1]}" for t in tokens if len(t) == 2 and not t.startswith("<")]
    writer.add_token_merges(pairs if merges is None else merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
