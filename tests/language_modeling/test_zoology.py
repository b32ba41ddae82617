"""Oracles of the Zoology mixers, look-up layers and the AR split."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from reattend.data.mqar import RecallTask, recall_accuracy, recall_batch
from reattend.language_modeling.zoology import (
    BaseConv,
    BigramCounts,
    CausalAttention,
    Hyena,
    HyenaFilter,
    LongConvolution,
    LookUp,
    ShortConvolution,
    TaylorAttention,
    ar_hits,
    bigrams,
    causal_convolution,
    gap_share,
    matched_mean,
    positional_features,
    seen_before,
    taylor_features,
    top_positions,
)
from reattend.trunks.language import Trunk

SELECTIONS = ["full", "random", "programmatic", "learned"]
MIXERS = {
    "attention": lambda width, length: CausalAttention(width),
    "attention, 2 heads": lambda width, length: CausalAttention(width, heads=2),
    "short convolution": lambda width, length: ShortConvolution(width),
    "BaseConv, short": lambda width, length: BaseConv(width, ShortConvolution(width)),
    "BaseConv, long": lambda width, length: BaseConv(width, LongConvolution(width, length)),
    "Hyena": Hyena,
    "Taylor": lambda width, length: TaylorAttention(width, feature_width=3),
}


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def toeplitz(taps, length):
    """[width, length, length] with entry (t, s) = taps[t - s], zero above the diagonal and beyond."""
    lag = torch.arange(length)[:, None] - torch.arange(length)
    inside = (lag >= 0) & (lag < taps.shape[1])
    return torch.where(inside, taps[:, lag.clamp(0, taps.shape[1] - 1)], 0)


def assert_same_with_gradients(first, second, *inputs):
    """Equal values and equal gradients with respect to `inputs`."""
    torch.testing.assert_close(first, second)
    weights = normal(*first.shape, seed=99)
    for a, b in zip(
        torch.autograd.grad((first * weights).sum(), inputs),
        torch.autograd.grad((second * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


# --- convolutions


@pytest.mark.parametrize(("length", "lags"), [(1, 1), (7, 7), (13, 3), (5, 9), (64, 64)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fft_convolution_is_the_causal_toeplitz_product(length, lags, seed):
    x = normal(2, length, 5, seed=seed).requires_grad_()
    taps = normal(5, lags, seed=seed + 1).requires_grad_()
    direct = torch.einsum("dts,bsd->btd", toeplitz(taps, length), x)
    assert_same_with_gradients(causal_convolution(x, taps), direct, x, taps)


@pytest.mark.parametrize("lags", [1, 3, 4])
def test_short_convolution_is_conv1d_padded_on_the_left(lags):
    torch.manual_seed(0)
    short = ShortConvolution(6, lags).double()
    x = normal(2, 9, 6).requires_grad_()
    direct = torch.einsum("dts,bsd->btd", toeplitz(short.taps, 9), x) + short.bias
    assert_same_with_gradients(short(x), direct, x, short.taps, short.bias)


def test_baseconv_is_a_gate_times_a_toeplitz_product():
    torch.manual_seed(0)
    mixer = BaseConv(4, LongConvolution(4, 11)).double()
    x = normal(3, 11, 4).requires_grad_()
    convolution = mixer.convolution
    gate = x @ mixer.gate.weight.T + mixer.gate.bias
    mixed = torch.einsum("dts,bsd->btd", toeplitz(convolution.taps(11), 11), x) + convolution.bias
    first_layer = convolution.filter[0].weight
    assert_same_with_gradients(mixer(x), gate * mixed, x, mixer.gate.weight, first_layer)


def test_hyena_is_its_equation():
    torch.manual_seed(0)
    mixer = Hyena(4, 9).double()
    x = normal(2, 9, 4).requires_grad_()
    projected = mixer.project(x)
    short = torch.einsum("dts,bsd->btd", toeplitz(mixer.short.taps, 9), projected)
    x1, x2, v = (short + mixer.short.bias).split(4, dim=-1)
    long = torch.einsum("dts,bsd->btd", toeplitz(mixer.filter(9), 9), x2 * v)
    expected = mixer.out(x1 * (long + mixer.direct * x2 * v))
    assert_same_with_gradients(mixer(x), expected, x, mixer.direct, mixer.filter.out.weight)


def test_hyena_window_decays_to_one_percent_between_fast_and_slow():
    window = HyenaFilter(8, 101).window
    # The slowest channel reaches 1 % at 1.5 lengths, the fastest at 0.3 lengths.
    assert window[-1, 0].item() == pytest.approx(0.01 ** (1 / 1.5))
    assert window[30, -1].item() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(
    "mixer", [LongConvolution(4, 8), BaseConv(4, LongConvolution(4, 8)), Hyena(4, 8)]
)
def test_texts_longer_than_the_filter_are_refused(mixer):
    with pytest.raises(ValueError, match="9 tokens, but a filter of 8 lags"):
        mixer(torch.zeros(1, 9, 4))


# --- attention


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 7])
def test_attention_is_softmax_of_scaled_products(heads, length):
    torch.manual_seed(heads)
    mixer = CausalAttention(6, heads).double()
    x = normal(2, length, 6).requires_grad_()
    q, k, v = mixer.project(x).split(6, dim=-1)
    outputs = []
    for part in range(heads):
        here = slice(part * 6 // heads, (part + 1) * 6 // heads)
        scores = q[..., here] @ k[..., here].mT / math.sqrt(6 / heads)
        future = torch.ones(length, length).triu(1).bool()
        outputs.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[..., here])
    expected = mixer.out(torch.cat(outputs, dim=-1))
    assert_same_with_gradients(mixer(x), expected, x, mixer.project.weight)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="7 is not a multiple of 2"):
        CausalAttention(7, heads=2)


@pytest.mark.parametrize("d", [1, 4, 7])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_taylor_features_are_the_second_order_expansion(d, seed):
    q, k = normal(5, d, seed=seed), normal(5, d, seed=seed + 1)
    s = (q * k).sum(-1) / math.sqrt(d)
    product = (taylor_features(q) * taylor_features(k)).sum(-1)
    torch.testing.assert_close(product, 1 + s + s**2 / 2)


def test_taylor_attention_equals_its_recurrence():
    torch.manual_seed(0)
    mixer = TaylorAttention(6, feature_width=3).double()
    x = normal(2, 9, 6).requires_grad_()
    q, k = taylor_features(mixer.queries(x)), taylor_features(mixer.keys(x))
    memory, total, steps = 0, 0, []
    for t in range(9):
        memory = memory + k[:, t, :, None] * mixer.values(x)[:, t, None, :]
        total = total + k[:, t]
        read = (q[:, t, :, None] * memory).sum(1) / (q[:, t] * total).sum(-1, keepdim=True)
        steps.append(mixer.out(read))
    assert_same_with_gradients(mixer(x), torch.stack(steps, 1), x, mixer.keys.weight)


def test_hand_built_attention_solves_recall():
    """Layer 1 copies the previous token into a second slot, layer 2 looks the query up there."""
    task = RecallTask(vocabulary=20, length=24, pairs=6)
    tokens, labels = recall_batch(task, 64, torch.Generator().manual_seed(0))
    vocabulary, length = task.vocabulary, task.length
    width = 2 * vocabulary + length  # one-hot token | previous token | one-hot position
    token = slice(0, vocabulary)
    previous = slice(vocabulary, 2 * vocabulary)
    position = slice(2 * vocabulary, width)
    sharp = 100 * math.sqrt(width)

    layers = [CausalAttention(width).double() for _ in range(2)]
    for layer in layers:
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
        layer.out.weight.data = torch.eye(width, dtype=torch.float64)
        layer.q, layer.k, layer.v = layer.project.weight.data.split(width)
    back = torch.diag(torch.ones(length - 1, dtype=torch.float64), 1)
    layers[0].q[position, position] = sharp * back  # row t - 1 reads position t
    layers[0].k[position, position] = torch.eye(length, dtype=torch.float64)
    layers[0].v[previous, token] = torch.eye(vocabulary, dtype=torch.float64)
    layers[1].q[token, token] = sharp * torch.eye(vocabulary, dtype=torch.float64)
    layers[1].k[token, previous] = torch.eye(vocabulary, dtype=torch.float64)
    layers[1].v[token, token] = torch.eye(vocabulary, dtype=torch.float64)

    x = torch.zeros(*tokens.shape, width, dtype=torch.float64)
    x[..., token] = F.one_hot(tokens, vocabulary).double()
    x[..., position] = torch.eye(length, dtype=torch.float64)
    x[:, 1:, previous] += layers[0](x)[:, 1:, previous]  # the first token has none before it
    answers = layers[1](x)[..., token].argmax(-1)
    assert (recall_accuracy(answers, labels) == 1).all()
    no_lookup = layers[0](x)[..., token].argmax(-1)
    assert recall_accuracy(no_lookup, labels).mean() < 0.2


# --- all mixers


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("length", [1, 8, 13])
def test_every_mixer_is_causal(name, length):
    torch.manual_seed(0)
    mixer = MIXERS[name](6, length).double()
    x = normal(2, length, 6).requires_grad_()
    y = mixer(x)
    assert y.shape == x.shape
    for t in (0, length // 2, length - 1):
        (gradient,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert not (gradient[:, t + 1 :].abs() > 1e-12).any()
        assert gradient[:, t].abs().sum() > 0


def test_state_sizes():
    width, length = 6, 50
    sizes = {name: make(width, length).state_size(length) for name, make in MIXERS.items()}
    assert sizes == {
        "attention": 2 * 50 * 6,
        "attention, 2 heads": 2 * 50 * 6,
        "short convolution": 3 * 6,
        "BaseConv, short": 3 * 6,
        "BaseConv, long": 50 * 6,
        "Hyena": 50 * 6 + 3 * 18,
        "Taylor": (1 + 3 + 9) * 7,
    }


# --- hybrids


def lookup(selection, width=6, length=10, **options):
    torch.manual_seed(0)
    return LookUp(width, CausalAttention(width), selection, length, **options).double()


def tokens_of(rows=3, length=10, kinds=6, seed=0):
    return torch.randint(kinds, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_full_selection_is_the_attention_layer():
    x, tokens = normal(3, 10, 6), tokens_of()
    layer = lookup("full")
    torch.testing.assert_close(layer(x, tokens), layer.attention(x), atol=0, rtol=0)


def test_no_selection_leaves_the_residual_alone():
    torch.manual_seed(0)
    all_different = torch.arange(10).repeat(3, 1)
    make = lambda width: LookUp(width, CausalAttention(width), "programmatic", 10)  # noqa: E731
    model = Trunk(10, 6, [make]).double()
    expected = F.layer_norm(model.tokens(all_different), (6,))
    torch.testing.assert_close(model.hidden(all_different), expected)


def test_programmatic_selection_is_a_repeated_token():
    tokens = torch.tensor([[3, 0, 3, 0, 5, 3, 5]])
    assert seen_before(tokens).tolist() == [[False, False, True, True, False, True, True]]
    assert seen_before(tokens, ignore=0).tolist() == [
        [False, False, True, False, False, True, True]
    ]
    x, layer = normal(1, 7, 6), lookup("programmatic", length=7, ignore=0)
    chosen = seen_before(tokens, ignore=0)
    torch.testing.assert_close(layer(x, tokens)[chosen], layer.attention(x)[chosen])
    assert (layer(x, tokens)[~chosen] == 0).all()


@pytest.mark.parametrize("length", [9, 10, 17])
def test_random_selection_keeps_the_same_square_root_of_positions(length):
    x, layer = normal(3, length, 6), lookup("random", length=length)
    kept = (layer(x, tokens_of(length=length)) != 0).any(-1)
    assert (kept.sum(1) == math.ceil(math.sqrt(length))).all()
    assert (kept == kept[0]).all()


@pytest.mark.parametrize("length", [9, 10, 17])
def test_learned_selection_is_soft_in_training_and_hard_after(length):
    x, tokens = normal(3, length, 6), tokens_of(length=length)
    layer = lookup("learned", length=length)
    torch.nn.init.constant_(layer.gate.bias, 2)  # selects too much
    scores = layer.gate(x).squeeze(-1).sigmoid()
    budget = math.ceil(math.sqrt(length))

    torch.testing.assert_close(layer(x, tokens), scores[..., None] * layer.attention(x))
    excess = max(0.0, scores.mean().item() - budget / length)
    assert excess > 0
    assert layer.auxiliary_loss.item() == pytest.approx(1e-3 * excess)
    layer.auxiliary_loss.backward()
    assert layer.gate.weight.grad.abs().sum() > 0

    layer.eval()
    gates = layer.gates(x, tokens)
    kept = gates != 0
    assert (kept.sum(1) == budget).all()
    torch.testing.assert_close(gates[kept], scores[kept])
    assert (scores.masked_fill(~kept, 1).amin(1) >= scores.masked_fill(kept, 0).amax(1)).all()


def test_learned_selection_within_its_budget_costs_nothing():
    layer = lookup("learned")
    torch.nn.init.constant_(layer.gate.bias, -20)
    layer(normal(3, 10, 6), tokens_of())
    assert layer.auxiliary_loss.item() == 0


@pytest.mark.parametrize("selection", SELECTIONS)
def test_look_ups_are_causal_in_training(selection):
    layer = lookup(selection)
    x, tokens = normal(2, 10, 6).requires_grad_(), tokens_of(rows=2)
    (gradient,) = torch.autograd.grad(layer(x, tokens)[:, 4].sum(), x)
    assert (gradient[:, 5:] == 0).all()


def test_top_positions_keeps_all_when_there_are_fewer():
    assert top_positions(torch.rand(2, 3), 5).all()


# --- AR hits


def naive_hits(tokens, stream, threshold):
    seen_in_training = list(zip(stream.tolist()[:-1], stream.tolist()[1:], strict=True))
    hits = []
    for row in tokens.tolist():
        pairs = list(itertools.pairwise(row))
        hits.append(
            [p in pairs[:t] and seen_in_training.count(p) < threshold for t, p in enumerate(pairs)]
        )
    return torch.tensor(hits)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("threshold", [1, 4, 1000])
def test_ar_hits_match_a_direct_search(seed, threshold):
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randint(7, (151,), generator=generator)
    tokens = torch.randint(9, (4, 33), generator=generator)  # two words never seen in training
    counts = BigramCounts(stream, vocabulary=9)
    hits = ar_hits(tokens, counts, threshold)
    assert torch.equal(hits, naive_hits(tokens, stream, threshold))
    assert hits.any()


def test_bigram_counts_add_up():
    stream = torch.randint(5, (100,), generator=torch.Generator().manual_seed(0))
    counts = BigramCounts(stream, vocabulary=5)
    every = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    assert counts.of(every).sum().item() == 99
    assert bigrams(torch.tensor([2, 3]), 5).item() == 13


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_split_loses_nothing(seed):
    losses, reference = normal(200, seed=seed).abs(), normal(200, seed=seed + 1).abs()
    hits = normal(200, seed=seed + 2) > 1
    share = hits.double().mean()
    mean = share * losses[hits].mean() + (1 - share) * losses[~hits].mean()
    torch.testing.assert_close(mean, losses.mean())
    total = gap_share(losses, reference, hits) + gap_share(losses, reference, ~hits)
    torch.testing.assert_close(total, torch.ones_like(total))
    by_hand = share * (losses - reference)[hits].mean() / (losses - reference).mean()
    torch.testing.assert_close(gap_share(losses, reference, hits), by_hand)


def test_positional_features_turn_once_over_the_length():
    features = positional_features(8)
    torch.testing.assert_close(features[:, 0], torch.arange(8) / 7)
    one = positional_features(8, bands=2)
    angle = 2 * math.pi * torch.arange(8) / 8
    torch.testing.assert_close(one[:, 2], angle.cos(), rtol=0, atol=1e-6)  # second band: once
    torch.testing.assert_close(one[:, 4], -angle.sin(), rtol=0, atol=1e-6)
    torch.testing.assert_close(features[:, 1], (1e-4 * angle).cos(), rtol=0, atol=1e-6)


def test_matched_mean_weighs_classes_as_the_places_do():
    values = torch.tensor([1.0, 3.0, 10.0, 30.0, 50.0, 7.0])
    classes = torch.tensor([0, 0, 1, 1, 1, 2])
    places = torch.tensor([False, False, False, True, True, True])
    others = torch.tensor([True, True, True, False, False, False])
    # Class 1 alone holds both kinds.
    assert matched_mean(values, places, others, classes) == 10
    places = torch.tensor([False, True, False, True, True, True])
    others = torch.tensor([True, False, True, False, False, False])
    assert matched_mean(values, places, others, classes) == pytest.approx((1 + 2 * 10) / 3)
    with pytest.raises(ValueError, match="no class holds both"):
        matched_mean(values, places, torch.zeros(6).bool(), classes)


def test_matched_mean_of_the_places_themselves_is_their_mean():
    values, classes = normal(60), torch.randint(4, (60,))
    places = normal(60, seed=1) > 0
    torch.testing.assert_close(matched_mean(values, places, places, classes), values[places].mean())
