"""llama.cpp as a peer: our weights as a GGUF file, decoded through llama-cpp-python's bindings."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvtool.core.bench.timing import TimedRun
from kvtool.core.models import Model

# Of each block: our names and those of GGUF's GPT-2.
NAMES = {
    "norm1": "attn_norm",
    "attn.qkv": "attn_qkv",
    "attn.out": "attn_output",
    "norm2": "ffn_norm",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}


def write_gguf(path: Path, model: Model) -> None:
    """A decoder of GPT-2's form (learned positions, layer norm, gelu_tanh, biases) in float32."""
    import gguf

    c = model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_block_count(c.n_layers)
    writer.add_head_count(c.n_heads)
    writer.add_layer_norm_eps(c.norm_eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(c.vocab_size)
    weights = {"embed.tokens.weight": "token_embd.weight"}
    weights |= {"embed.positions.weight": "position_embd.weight"}
    weights |= {f"norm.{part}": f"output_norm.{part}" for part in ("weight", "bias")}
    weights |= {
        f"layers.{i}.{ours}.{part}": f"blk.{i}.{theirs}.{part}"
        for i in range(c.n_layers)
        for ours, theirs in NAMES.items()
        for part in ("weight", "bias")
    }
    state = model.state_dict()
    for ours, theirs in weights.items():
        writer.add_tensor(theirs, state[ours].float().contiguous().numpy())
    writer.add_tensor("output.weight", state["embed.tokens.weight"].float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """Greedy decoding by `llama_decode`, with a float32 cache as large as the run needs.

    The loop is as short as Python allows: logits are read in place and NumPy finds the likeliest.
    """

    def __init__(self, path: Path, vocab_size: int, prompt: torch.Tensor, threads: int) -> None:
        import llama_cpp

        self.lib, self.vocab_size, self.threads = llama_cpp, vocab_size, threads
        self.prompt = prompt[0].tolist()
        quiet = llama_cpp.llama_log_callback(lambda *_: None)
        self._quiet = quiet  # kept: C holds no reference
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )

    def run(self, kind: str, length: int) -> TimedRun:
        """Generate `length` tokens; memory for them is allocated first, as in ours."""
        started = time.perf_counter()
        context = self._context(len(self.prompt) + length)
        try:
            stamps = [time.perf_counter() for _ in self._tokens(context, length)]
        finally:
            self.lib.llama_free(context)
        return TimedRun.of(started, stamps)

    def tokens(self, length: int) -> list[int]:
        """The tokens that it generates."""
        context = self._context(len(self.prompt) + length)
        try:
            return list(self._tokens(context, length))
        finally:
            self.lib.llama_free(context)

    def _context(self, n: int) -> Any:
        params = self.lib.llama_context_default_params()
        params.n_ctx = n
        params.n_batch = params.n_ubatch = max(len(self.prompt), 32)
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = self.lib.GGML_TYPE_F32
        return self.lib.llama_init_from_model(self.model, params)

    def _tokens(self, context: Any, length: int) -> Any:
        ids = self.prompt
        for _ in range(length):
            array = (self.lib.llama_token * len(ids))(*ids)
            if self.lib.llama_decode(context, self.lib.llama_batch_get_one(array, len(ids))):
                raise RuntimeError("llama_decode failed")
            row = self.lib.llama_get_logits_ith(context, -1)
            token = int(np.ctypeslib.as_array(row, shape=(self.vocab_size,)).argmax())
            ids = [token]
            yield token
