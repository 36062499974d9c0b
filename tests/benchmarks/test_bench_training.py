"""A training step of the default models, beside the same of torch.nn's Transformer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import cycle
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from kvtool.config import ModelConfig
from kvtool.core.decoding.sources import pad
from kvtool.core.models import build_model
from kvtool.core.models.decoder import Decoder
from kvtool.core.models.layers import sinusoids
from kvtool.core.models.seq2seq import Seq2Seq
from kvtool.core.native import context
from kvtool.core.text.tokenizer import BOS, Tokenizer
from kvtool.core.training.lm import Blocks, LanguageModelling
from kvtool.core.training.pairs import load_cmudict
from kvtool.core.training.translation import Translation

PAIRS = 4000  # of the dictionary
SEQ2SEQ_TOKENS, LM_TOKENS, LM_CONTEXT = 2048, 4608, 1152  # of the commands' defaults
UNTIMED = 8  # without a clock, lengths and texts are so many times smaller
N_BATCHES = 8  # each seen once before the clock runs, so that all memory and code is there
SMOOTHING = 0.1
CPU = torch.device("cpu")
Loss = Callable[[Any], Tensor]


class Peer(nn.Module):
    """nn.Transformer between embeddings and head, as its users write it, with our weights.

    It drops where a Seq2Seq does, and besides at attention's weights and within MLPs.
    """

    def __init__(self, model: Seq2Seq) -> None:
        super().__init__()
        c = model.config
        sides = model.encoder, model.decoder
        self.tables = nn.ModuleList(
            nn.Embedding.from_pretrained(side.embed.tokens.weight.detach().clone(), freeze=False)
            for side in sides
        )
        self.register_buffer("positions", sinusoids(c.context, c.d_model).float())
        self.dropout = nn.Dropout(c.dropout)
        self.body = nn.Transformer(
            c.d_model, c.n_heads, c.n_encoder_layers, c.n_layers, c.d_ff, c.dropout, "gelu",
            batch_first=True, norm_first=True,
        )  # fmt: skip
        for ours, theirs in zip(sides, (self.body.encoder, self.body.decoder), strict=True):
            theirs.norm.load_state_dict(ours.norm.state_dict())
            for block, layer in zip(ours.layers, theirs.layers, strict=True):
                layer.load_state_dict(renamed(block.state_dict()))

    def forward(self, source: Tensor, absent: Tensor, target: Tensor) -> Tensor:
        x, y = (
            self.dropout(table(ids) * math.sqrt(table.embedding_dim) + self.positions[: len(ids.T)])
            for table, ids in zip(self.tables, (source, target), strict=True)
        )
        causal = nn.Transformer.generate_square_subsequent_mask(y.shape[1])
        y = self.body(
            x, y, tgt_mask=causal, tgt_is_causal=True,
            src_key_padding_mask=absent, memory_key_padding_mask=absent,
        )  # fmt: skip
        return F.linear(y, self.tables[1].weight)


class LMPeer(nn.Module):
    """nn.TransformerEncoder with a causal mask between an embedding and the same as a head, as
    those who want a decoder alone write it, with our weights."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        c = model.config
        table = model.embed.tokens.weight.detach().clone()
        self.table = nn.Embedding.from_pretrained(table, freeze=False)
        self.register_buffer("positions", sinusoids(c.context, c.d_model).float())
        self.dropout = nn.Dropout(c.dropout)
        layer = nn.TransformerEncoderLayer(
            c.d_model, c.n_heads, c.d_ff, c.dropout, "gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, c.n_layers, nn.LayerNorm(c.d_model))
        self.body.norm.load_state_dict(model.norm.state_dict())
        for block, theirs in zip(model.layers, self.body.layers, strict=True):
            theirs.load_state_dict(renamed(block.state_dict()))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.table(tokens) * math.sqrt(self.table.embedding_dim) + self.positions[positions]
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return F.linear(self.body(self.dropout(x), causal, is_causal=True), self.table.weight)


def renamed(block: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of one of our blocks under the names of nn.Transformer's layers."""
    found = {}
    last_norm = "norm3" if "cross.q.weight" in block else "norm2"
    for part in ("weight", "bias"):
        found[f"self_attn.in_proj_{part}"] = block[f"attn.qkv.{part}"]
        found[f"self_attn.out_proj.{part}"] = block[f"attn.out.{part}"]
        found[f"linear1.{part}"] = block[f"mlp.up.{part}"]
        found[f"linear2.{part}"] = block[f"mlp.down.{part}"]
        found[f"norm1.{part}"] = block[f"norm1.{part}"]
        found[f"{last_norm}.{part}"] = block[f"norm2.{part}"]
        if last_norm == "norm3":
            found[f"norm2.{part}"] = block[f"norm_cross.{part}"]
            both = block[f"cross.q.{part}"], block[f"cross.kv.{part}"]
            found[f"multihead_attn.in_proj_{part}"] = torch.cat(both)
            found[f"multihead_attn.out_proj.{part}"] = block[f"cross.out.{part}"]
    return found


@pytest.fixture(autouse=True)
def with_gradients(one_thread_without_gradients: None) -> Iterator[None]:
    with torch.inference_mode(False):
        yield


class Pair(NamedTuple):
    """Our model and its peer with the same weights, what each loses on a batch, and batches."""

    ours: nn.Module
    our_loss: Loss
    theirs: nn.Module
    their_loss: Loss
    batches: list[Any]


@cache
def translation(part: int) -> Translation:
    splits = load_cmudict()
    splits = replace(splits, train=splits.train[: PAIRS // part], valid=splits.valid[:10], test=())
    source = Tokenizer.train("char", [pair.source for pair in splits.train])
    target = Tokenizer.train("symbol", [x for pair in splits.train for x in pair.targets])
    tokens = SEQ2SEQ_TOKENS // part
    return Translation(splits, source, target, 256, tokens, SMOOTHING, 0, CPU)


def seq2seq(dropout: float, part: int) -> Pair:
    task = translation(part)
    config = ModelConfig(
        task.tokenizer.vocab_size,
        n_layers=1,
        n_encoder_layers=1,
        source_vocab_size=task.source_tokenizer.vocab_size,
        context=256,
        dropout=dropout,
    )
    model = build_model(config)
    assert isinstance(model, Seq2Seq)
    peer = Peer(model)

    def theirs(batch: list[int]) -> Tensor:
        source, mask = pad([task.rows[i][0] for i in batch], task.device)
        target, real = pad([task.rows[i][1] for i in batch], task.device)
        logits = peer(source, ~mask, F.pad(target[:, :-1], (1, 0), value=BOS))
        wanted = target.masked_fill(~real, -100)
        return F.cross_entropy(
            logits.flatten(0, 1).float(), wanted.flatten(), label_smoothing=SMOOTHING
        )

    return Pair(
        model, lambda batch: task.loss(model, batch)[0], peer, theirs, list(task.batches(0))
    )


@cache
def language_modelling(part: int) -> LanguageModelling:
    text = " ".join(pair.source for pair in load_cmudict().train[: 4 * PAIRS // part])
    tokenizer = Tokenizer.train("bpe", [text], 1024, specials=False)
    return LanguageModelling(text, tokenizer, LM_CONTEXT // part, LM_TOKENS // part, 0, CPU)


def lm(dropout: float, part: int) -> Pair:
    task = language_modelling(part)
    config = ModelConfig(
        task.tokenizer.vocab_size,
        n_layers=2,
        context=LM_CONTEXT // part,
        tied=True,
        dropout=dropout,
    )
    model = build_model(config)
    assert isinstance(model, Decoder)
    peer = LMPeer(model)

    def theirs(batch: Blocks) -> Tensor:
        columns = torch.arange(batch.length + 1)
        ids = task.train_ids[batch.starts[:, None] + columns]
        logits = peer(ids[:, :-1], batch.offsets[:, None] + columns[:-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    one_of_each = {batch.length: batch for epoch in range(9) for batch in task.batches(epoch)}
    return Pair(
        model, lambda batch: task.loss(model, batch)[0], peer, theirs, list(one_of_each.values())
    )


def trainer(module: nn.Module, loss: Loss, amp: bool) -> Callable[[Any], float]:
    """One optimizer step on a batch, as Trainer does it; returns the loss."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step(batch: Any) -> float:
        with context.within(training=True), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            value = loss(batch)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        return float(value.detach())

    return step


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # nn.Transformer, of its own default
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", [seq2seq, lm], ids=["seq2seq", "lm"])
def test_a_training_step_learns_what_nn_transformer_does(
    benchmark: BenchmarkFixture, make: Callable[[float, int], Pair], amp: bool, dropout: float
) -> None:
    """In turns with its step, so that a slow moment hits both."""
    tokens = LM_TOKENS if make is lm else SEQ2SEQ_TOKENS
    benchmark.group = f"a training step of {make.__name__}, {tokens} tokens"
    torch.manual_seed(0)
    pair = make(dropout, UNTIMED if benchmark.disabled else 1)
    batches = pair.batches[:N_BATCHES]
    with torch.no_grad():
        sides = (pair.ours.eval(), pair.our_loss), (pair.theirs.eval(), pair.their_loss)
        losses = [float(loss(batches[0])) for _, loss in sides]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    mine = trainer(pair.ours.train(), pair.our_loss, amp)
    other = trainer(pair.theirs.train(), pair.their_loss, amp)
    times: list[float] = []
    turn = cycle(batches)

    def other_first() -> Any:
        batch = next(turn)
        started = time.perf_counter()
        other(batch)
        times.append(time.perf_counter() - started)
        return (batch,), {}

    warm, rounds = len(batches), 3 * len(batches)
    loss = benchmark.pedantic(mine, setup=other_first, rounds=rounds, warmup_rounds=warm)
    assert 0 < loss < 2 * losses[0]
    if not benchmark.disabled:
        ratio = median(times[warm:]) / benchmark.stats.stats.median
        benchmark.extra_info.update(
            kind="bfloat16" if amp else "float32",
            length=tokens,
            tokens=tokens,
            nn_transformer_times=ratio,
        )
