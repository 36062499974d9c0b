"""Both models: padding and later tokens change nothing, and the configuration is what is built."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtool.config import POSITIONS, ModelConfig
from kvtool.core.cache import Step
from kvtool.core.models import Model, build_model
from kvtool.core.models.layers import Dropout, Linear, sinusoids
from kvtool.core.models.rope import Rotary
from kvtool.core.models.seq2seq import Seq2Seq
from kvtool.errors import UsageError
from small_models import random_model

SOURCE = torch.tensor([[5, 6, 7, 8]])
TARGET = torch.tensor([[1, 9, 10, 11, 12]])
every_position = pytest.mark.parametrize("positions", POSITIONS)


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def seq2seq(**changes: Any) -> Seq2Seq:
    sizes = {"n_encoder_layers": 2, "source_vocab_size": 17, **changes}
    model = random_model(4, torch.float64, **sizes)
    assert isinstance(model, Seq2Seq)
    return model


def real(ids: Tensor) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool)


def padded(filler: int) -> tuple[Tensor, Tensor]:
    """SOURCE beside a longer one: ids (2,7) and the mask of what is real."""
    ids = torch.tensor([[5, 6, 7, 8, *[filler] * 3], [9, 8, 7, 6, 5, 4, 3]])
    return ids, torch.tensor([[True] * 4 + [False] * 3, [True] * 7])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# --- padding of the source


@every_position
@pytest.mark.parametrize("filler", [0, 16])
def test_source_padding_changes_nothing_in_the_encoder(positions: str, filler: int) -> None:
    encoder = seq2seq(positions=positions).encoder
    found = encoder(*padded(filler))
    close(found[:1, :4], encoder(SOURCE, real(SOURCE)))
    longer = padded(filler)[0][1:]
    close(found[1:], encoder(longer, real(longer)))


@every_position
@pytest.mark.parametrize("filler", [0, 16])
def test_source_padding_changes_nothing_in_the_decoder(positions: str, filler: int) -> None:
    model = seq2seq(positions=positions, n_kv_heads=2)
    alone = model(TARGET, source=model.encode(SOURCE, real(SOURCE)))
    together = model(TARGET.expand(2, 5), source=model.encode(*padded(filler)))
    close(together[:1], alone)


def test_source_padding_changes_nothing_in_cross_attention() -> None:
    """Not even where the keys and values of padding are large."""
    model = seq2seq()
    source = model.encode(*padded(0))
    expected = model(TARGET.expand(2, 5), source=source)
    for k, v in source.layers:
        k[0, :, 4:] = v[0, :, 4:] = 1e30
    assert model(TARGET.expand(2, 5), source=source).equal(expected)
    source.mask[0, 4:] = True
    assert not torch.allclose(model(TARGET.expand(2, 5), source=source)[0], expected[0])


def test_left_padding_changes_nothing_in_the_decoder() -> None:
    for positions in POSITIONS:
        model = random_model(4, torch.float64, positions=positions)
        ids = torch.cat([torch.tensor([[22, 22]]), TARGET], dim=1)
        step = Step.full(1, 7, left_padding=torch.tensor([2]))
        close(model(ids, step)[:, 2:], model(TARGET))


# --- who sees whom


def difference(found: Tensor, expected: Tensor) -> Tensor:
    """The largest difference at each position."""
    return (found - expected)[0].abs().amax(-1)


@every_position
@pytest.mark.parametrize("cross", [False, True], ids=["decoder", "seq2seq"])
def test_a_later_token_changes_no_earlier_logit(positions: str, cross: bool) -> None:
    model: Model = random_model(4, torch.float64, positions=positions)
    source = None
    if cross:
        model = seq2seq(positions=positions)
        source = model.encode(SOURCE, real(SOURCE))
    ids = torch.arange(12)[None] % 7
    changed = ids.clone()
    changed[0, 8] = 20
    found = difference(model(ids, source=source), model(changed, source=source))
    assert float(found[:8].max()) == 0.0
    assert float(found[8:].min()) > 1e-3


def test_every_source_token_changes_every_other_and_every_logit() -> None:
    model = seq2seq(n_encoder_layers=1)
    other = torch.tensor([[5, 6, 7, 3]])
    first, second = model.encoder(SOURCE, real(SOURCE)), model.encoder(other, real(other))
    assert float(difference(first, second).min()) > 1e-3  # position 0 sees position 3
    logits = [model(TARGET, source=model.encode(ids, real(ids))) for ids in (SOURCE, other)]
    assert float(difference(*logits).min()) > 1e-3


@every_position
def test_the_order_of_tokens_matters(positions: str) -> None:
    model = seq2seq(positions=positions)
    swapped = SOURCE[:, [1, 0, 2, 3]]
    found, expected = (model.encoder(ids, real(ids))[0, 3] for ids in (swapped, SOURCE))
    assert float((found - expected).abs().max()) > 1e-3


def test_rows_of_a_batch_do_not_mix() -> None:
    model = random_model(4, torch.float64)
    other = torch.tensor([[8, 8, 1, 2, 3]])
    both = model(torch.cat([TARGET, other]))
    close(both, torch.cat([model(TARGET), model(other)]))


def test_an_encoder_decoder_without_a_source_is_refused() -> None:
    with pytest.raises(ValueError, match="source"):
        seq2seq()(TARGET)
    with pytest.raises(NotImplementedError, match="no encoder"):
        random_model().encode(SOURCE, real(SOURCE))


@every_position
def test_a_position_beyond_the_context_is_an_error(positions: str) -> None:
    model = random_model(4, positions=positions, context=4)
    assert model(TARGET[:, :4]).shape == (1, 4, 23)
    with pytest.raises(IndexError, match="index out of range"):
        model(TARGET)


# --- positions and weights


def test_sinusoids_are_those_of_the_paper() -> None:
    table = sinusoids(50, 6)
    for pos, i in ((0, 0), (1, 0), (49, 2)):
        angle = torch.tensor(pos / 10_000 ** (2 * i / 6), dtype=torch.float64)
        close(table[pos, 2 * i], angle.sin())
        close(table[pos, 2 * i + 1], angle.cos())


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    rotary = Rotary(64, 8, 10_000.0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = [
        (rotary(q, torch.tensor([[shift + 5]])) * rotary(k, torch.tensor([[shift]]))).sum()
        for shift in (0, 1, 58)
    ]
    close(torch.stack(scores), scores[0].expand(3))
    assert float((scores[0] - (q * k).sum()).abs()) > 1e-3
    close(rotary(q, torch.tensor([[0]])), q)


def test_position_tables_stay_exact_in_every_format_and_are_no_part_of_a_checkpoint() -> None:
    positions = torch.arange(64)[None]
    added: Any = random_model(4, torch.bfloat16).double()
    assert added.embed.table(positions, torch.float64)[0].equal(sinusoids(64, 16))
    turned: Any = random_model(4, torch.bfloat16, positions="rotary").double()
    x = torch.randn(1, 4, 64, 4, dtype=torch.float64)
    assert turned.rotary(x, positions).equal(Rotary(64, 4, 10_000.0)(x, positions))
    for model in (added, turned):
        assert not any("table" in name for name in model.state_dict())


def test_random_weights_are_large_enough_to_show_bugs() -> None:
    """With the usual 0.02, attention is nearly uniform and a wrong position changes little."""
    torch.manual_seed(0)
    for module in build_model(ModelConfig(vocab_size=500)).modules():
        if isinstance(module, Linear):
            width = module.in_features
            assert float(module.weight.std()) == pytest.approx(width**-0.5, rel=0.02)


# --- what is configured is what is built


def test_the_defaults_are_two_layers_of_width_256_with_8_heads() -> None:
    config = ModelConfig(vocab_size=100)
    assert (config.n_layers, config.d_model, config.n_heads, config.d_ff) == (2, 256, 8, 1024)
    assert (config.activation, config.positions, config.kind) == ("gelu", "sinusoidal", "decoder")
    assert (config.n_kv_heads, config.head_dim, config.dropout) == (8, 32, 0.0)


def test_depth_and_sizes_are_what_the_configuration_says() -> None:
    model = build_model(
        ModelConfig(30, 3, 2, 40, d_model=24, n_heads=3, d_ff=50, context=16, positions="learned")
    )
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["decoder.layers.2.mlp.up.weight"] == (50, 24)
    assert shapes["decoder.layers.2.cross.kv.weight"] == (48, 24)
    assert shapes["encoder.layers.1.attn.qkv.weight"] == (72, 24)
    assert shapes["encoder.embed.tokens.weight"] == (40, 24)
    assert shapes["decoder.embed.positions.weight"] == (16, 24)
    assert not any(name.startswith(("decoder.layers.3", "encoder.layers.2")) for name in shapes)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_fewer_key_value_heads_have_fewer_weights(n_kv_heads: int) -> None:
    shapes = {name: tuple(p.shape) for name, p in seq2seq(n_kv_heads=n_kv_heads).named_parameters()}
    assert shapes["decoder.layers.0.attn.qkv.weight"] == (16 + 8 * n_kv_heads, 16)
    assert shapes["decoder.layers.0.cross.kv.weight"] == (8 * n_kv_heads, 16)


def test_dropout_works_in_training_alone() -> None:
    plain, model = random_model(4, torch.float64), random_model(4, torch.float64, dropout=0.5)
    assert model(TARGET).equal(plain(TARGET))
    plain.train()
    model.train()
    assert not model(TARGET).equal(model(TARGET))
    assert plain(TARGET).equal(plain(TARGET))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_the_share_it_was_told_and_keeps_the_mean(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dropped = Dropout(0.3).train()(torch.ones(100, 50, 41, dtype=dtype))
    assert float((dropped == 0).double().mean()) == pytest.approx(0.3, abs=0.005)
    assert float(dropped.double().mean()) == pytest.approx(1.0, abs=0.01)
    assert len(dropped.unique()) == 2 and dropped.dtype is dtype


def test_the_encoder_drops_too() -> None:
    model = seq2seq(dropout=0.5)
    assert model.encoder(SOURCE, real(SOURCE)).equal(model.encoder(SOURCE, real(SOURCE)))
    model.train()
    assert not model.encoder(SOURCE, real(SOURCE)).equal(model.encoder(SOURCE, real(SOURCE)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 3}, "--heads: 3 heads do not divide --d-model 256"),
        ({"n_kv_heads": 3}, "--n-kv-heads: 3 key-value heads do not divide 8 heads"),
        ({"n_kv_heads": 16}, "--n-kv-heads: 16 key-value heads do not divide 8 heads"),
        ({"n_kv_heads": -1}, "--n-kv-heads: -1 is too small"),
        ({"n_heads": 0}, "--heads: 0 is too small"),
        ({"d_model": 0}, "--d-model: 0 is too small"),
        ({"d_ff": -3}, "--d-ff: -3 is too small"),
        ({"n_layers": 0}, "--layers: 0 is too small"),
        ({"n_layers": 2**62}, "--layers: 4611686018427387904 is too large"),
        ({"n_layers": True}, "--layers: True is not a whole number"),
        ({"n_encoder_layers": -1}, "--encoder-layers: -1 is too small"),
        ({"context": "many"}, "--context: 'many' is not a whole number"),
        ({"context": 0}, "--context: 0 is too small"),
        ({"dropout": 1.0}, "--dropout: 1.0 is out of range"),
        ({"dropout": float("nan")}, "--dropout: nan is out of range"),
        ({"positions": "rotery"}, "--positions: 'rotery' is not known"),
        ({"norm": "batchnorm"}, "--norm: 'batchnorm' is not known"),
        ({"activation": "gelu2"}, "--activation: 'gelu2' is not known"),
        ({"positions": "rotary", "d_model": 24}, "--positions: rotary needs an even head width"),
        ({"d_model": 27, "n_heads": 9}, "--positions: sinusoidal needs an even width (found 27)"),
    ],
)
def test_a_configuration_that_means_nothing_names_its_flag(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
        ModelConfig(vocab_size=100, **changes)


def test_a_misspelt_choice_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        ModelConfig(vocab_size=100, positions="rotery")
    assert caught.value.hint == "Did you mean rotary?"
    assert "sinusoidal, learned, rotary" in caught.value.message
