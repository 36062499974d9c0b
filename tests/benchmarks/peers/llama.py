"""llama.cpp as a peer: our weights as a GGUF file, decoded by xllamacpp's server."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import torch

from kvtool.core.bench.timing import TimedRun
from kvtool.core.checkpoint.gguf.config import GGUF_FAMILIES, names
from kvtool.core.models import Model

SLACK = 64  # tokens of context that no request uses


def write_gguf(path: Path, model: Model, arch: str) -> None:
    """A decoder of the form of `arch`, gpt2 or llama, in float32, with tokens of no meaning."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    _write_fields(writer, model)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(model.config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * model.config.vocab_size)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(0)
    state, family = model.state_dict(), GGUF_FAMILIES[arch]
    for ours, stored in names(model.config, family).items():
        if ours not in state:
            continue
        sizes = [shape[0] for _, shape in stored.parts]
        for (theirs, _), part in zip(stored.parts, state[ours].float().split(sizes), strict=True):
            heads = {"attn_q": model.config.n_heads, "attn_k": model.config.n_kv_heads}
            n = heads.get(theirs.split(".")[-2]) if family.permuted else None
            values = part if n is None else _in_pairs(part, n)
            writer.add_tensor(theirs, values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_fields(writer: Any, model: Model) -> None:
    c = model.config
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_block_count(c.n_layers)
    writer.add_head_count(c.n_heads)
    if c.norm == "layernorm":
        writer.add_layer_norm_eps(c.norm_eps)
        return
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_vocab_size(c.vocab_size)


def _in_pairs(rows: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows (n_heads * head_dim,...) of which halves of a head turn together, as neighbours."""
    halves = rows.reshape(n_heads, 2, rows.shape[0] // n_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


class LlamaCpp:
    """Greedy decoding by a server, with a float32 cache. Times are the server's own, so that none
    of HTTP or JSON is in them: of the prompt, and of all tokens behind the first."""

    def __init__(self, url: str, prompt: torch.Tensor) -> None:
        self.url, self.prompt = url, prompt[0].tolist()

    def run(self, kind: str, length: int) -> TimedRun:
        """Generate `length` tokens."""
        timings = self._ask(length)["timings"]
        prefill, decode = timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3
        return TimedRun.of(0.0, [prefill, prefill + decode])

    def tokens(self, length: int) -> list[int]:
        """The tokens that it generates."""
        return list(self._ask(length)["tokens"])

    def _ask(self, length: int) -> dict[str, Any]:
        body = {
            "prompt": self.prompt, "n_predict": length, "cache_prompt": False, "top_k": 1,
            "samplers": ["top_k"], "return_tokens": True, "ignore_eos": True,
        }  # fmt: skip
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/completion", data, headers)
        with urllib.request.urlopen(request, timeout=600) as answer:
            found: dict[str, Any] = json.loads(answer.read())
        return found
