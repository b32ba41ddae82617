"""Oracles of adversarial training of attention: perturbations, the model, and the measurements."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from reattend.text_matching.attention_iat import (
    PAD,
    AttentionClassifier,
    BiLSTM,
    Technique,
    Texts,
    adversarial,
    interpretable,
    interpretable_word,
    log_odds,
    nearest_words,
    normalised,
    official_interpretable,
    pearson,
    random_perturbation,
    reversal,
    scaled,
    score_differences,
    score_perturbation,
    total_variation,
    training_loss,
    word_directions,
    word_importance,
)

SEEDS = [0, 1, 2]
WORDS, WIDTH, HIDDEN = 37, 6, 5
SCORES = Technique("scores", "adversarial")
TECHNIQUES = {
    "rp": Technique("scores", "random"),
    "at": SCORES,
    "iat": Technique("scores", "interpretable"),
    "iat-unit": Technique("scores", "interpretable", norm="unit"),
    "official": Technique("scores", "official"),
    "word-at": Technique("words", "adversarial"),
    "word-iat": Technique("words", "interpretable"),
}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def some_mask(lengths, longest=None):
    lengths = torch.tensor(lengths)
    return torch.arange(longest or int(lengths.max())) < lengths[:, None]


def some_texts(lengths=(7, 1, 4, 2), seconds=None, classes=3, seed=0):
    def tokens(lengths):
        mask = some_mask(lengths)
        return torch.randint(2, WORDS, mask.shape, generator=rng(seed)) * mask

    targets = torch.randint(classes, (len(lengths),), generator=rng(seed + 7))
    return Texts(tokens(lengths), targets, tokens(seconds) if seconds else None)


def some_model(paired=False, classes=3, seed=0, trainable=False):
    torch.manual_seed(seed)
    table = normal(WORDS, WIDTH, seed=seed)
    near = nearest_words(table, 3)
    model = AttentionClassifier(table, HIDDEN, classes, paired, trainable, near).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(3)  # scores that differ, so that attention is far from uniform
    return model


def loss_under(model, texts, perturbation=None):
    """Loss of every text with its attention scores perturbed."""
    logits, _ = model.read(model.encode(texts, model.embed(texts)), perturbation)
    return functional.cross_entropy(logits, texts.targets, reduction="none")


def score_gradient(model, texts):
    zero = torch.zeros(texts.first.shape, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(loss_under(model, texts, zero).sum(), zero)[0]


def gradients(model, loss):
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


# Perturbations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_perturbations_have_length_epsilon_and_leave_padding(seed, size):
    mask = some_mask([9, 2, 5])
    gradient, scores = normal(3, 9, seed=seed) * mask, normal(3, 9, seed=seed + 10)
    found = [
        random_perturbation(mask, size, rng(seed)).double(),
        adversarial(gradient, size),
        official_interpretable(gradient, size),
        *(interpretable(gradient, scores, mask, size, n) for n in ("none", "unit", "per_word")),
    ]
    for r in found:
        torch.testing.assert_close(
            r.norm(dim=1), torch.full((3,), size).double(), rtol=1e-6, atol=0
        )
        assert (r[~mask] == 0).all()


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e30])
def test_scaling_survives_gradients_of_any_size(magnitude):
    direction = torch.tensor([[3.0, 4.0], [0.0, 0.0]]) * magnitude
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0]])
    torch.testing.assert_close(scaled(direction, 1.0), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_unit_norm_makes_iat_equal_at(seed):
    model, texts = some_model(seed=seed), some_texts((7, 3, 5, 2), seed=seed)
    gradient = score_gradient(model, texts)
    scores = model.encode(texts, model.embed(texts)).scores
    unit = interpretable(gradient, scores, texts.mask, 2.0, "unit")
    torch.testing.assert_close(unit, adversarial(gradient, 2.0), rtol=1e-12, atol=1e-12)
    raw = interpretable(gradient, scores, texts.mask, 2.0, "none")
    assert (raw - unit).norm(dim=1)[0] > 1e-2  # and the raw differences do not


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("norm", ["none", "unit", "per_word"])
def test_closed_form_equals_the_gradient_with_respect_to_alpha(norm, seed):
    model, texts = some_model(seed=seed), some_texts((7, 3, 5, 2), seed=seed)
    encoded = model.encode(texts, model.embed(texts))
    differences = score_differences(encoded.scores.detach(), texts.mask)
    if norm == "unit":
        differences = functional.normalize(differences, dim=-1)
    alpha = torch.zeros_like(differences, requires_grad=True)
    loss = loss_under(model, texts, (alpha * differences).sum(-1)).sum()
    (gradient,) = torch.autograd.grad(loss, alpha)
    axis = 2 if norm == "per_word" else (1, 2)
    length = gradient.norm(dim=axis, keepdim=True)
    direction = gradient / length.masked_fill(length == 0, 1)
    if norm == "per_word":
        differences = functional.normalize(differences, dim=-1)
    literal = (direction * differences).sum(-1)
    literal = 2.0 * literal / literal.norm(dim=1, keepdim=True)
    ours = interpretable(score_gradient(model, texts), encoded.scores, texts.mask, 2.0, norm)
    torch.testing.assert_close(ours, literal, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_raw_differences_push_the_words_whose_score_differs_most(seed):
    mask = some_mask([8, 5])
    scores = normal(2, 8, seed=seed)
    r = interpretable(mask.double(), scores, mask, 1.0)
    for row, length in enumerate((8, 5)):
        own = scores[row, :length]
        spread = length * (own - own.mean()).square() + (own - own.mean()).square().sum()
        torch.testing.assert_close(r[row, :length], spread / spread.norm())
        assert r[row, :length].argsort().equal((own - own.mean()).abs().argsort())


def test_equal_scores_leave_iat_nothing_to_perturb():
    mask = some_mask([4, 1])
    r = interpretable(normal(2, 4) * mask, torch.full((2, 4), 0.3).double(), mask, 1.0)
    assert (r == 0).all()


@pytest.mark.parametrize("paired", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("seed", SEEDS)
def test_at_raises_the_loss_by_epsilon_times_the_gradient(seed, paired):
    model = some_model(paired, seed=seed)
    texts = some_texts((7, 3, 5, 2), (2, 6, 1, 3) if paired else None, seed=seed)
    gradient, size = score_gradient(model, texts), 1e-4
    clean = loss_under(model, texts)
    rise = loss_under(model, texts, adversarial(gradient, size)) - clean
    torch.testing.assert_close(rise / size, gradient.norm(dim=1), rtol=1e-2, atol=1e-6)
    fall = loss_under(model, texts, official_interpretable(gradient, size)) - clean
    assert (fall < 0).all()
    torch.testing.assert_close(fall, -rise, rtol=1e-2, atol=1e-9)
    draws = [random_perturbation(texts.mask, size, rng(k)).double() for k in range(100)]
    rises = torch.stack([loss_under(model, texts, r) - clean for r in draws])
    assert ((rises <= rise * (1 + 1e-3)).double().mean(0) >= 0.95).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_may_shift_together(seed):
    model, texts = some_model(seed=seed), some_texts(seed=seed)
    gradient = score_gradient(model, texts)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(4).double(), atol=1e-14, rtol=0)
    assert (gradient[~texts.mask] == 0).all()
    shift = torch.full(texts.first.shape, 3.0).double()
    torch.testing.assert_close(loss_under(model, texts, shift), loss_under(model, texts))
    scores = normal(4, 7, seed=seed)
    one, other = (interpretable(gradient, s, texts.mask, 1.0) for s in (scores, scores + 5))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("seed", SEEDS)
def test_word_iat_equals_the_gradient_with_respect_to_alpha(seed):
    words, near = normal(2, 5, WIDTH, seed=seed), normal(2, 5, 3, WIDTH, seed=seed + 5)
    directions, weights = word_directions(words, near), normal(2, 5, WIDTH, seed=seed + 9)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(2, 5, 3).double())
    alpha = torch.zeros(2, 5, 3, dtype=torch.float64, requires_grad=True)
    moved = words + (alpha.unsqueeze(-1) * directions).sum(2)
    (gradient,) = torch.autograd.grad((moved * weights).sin().sum(), alpha)
    best = 2.0 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None]
    by_words = weights * (words * weights).cos()
    ours = interpretable_word(by_words, directions, 2.0)
    torch.testing.assert_close(ours, (best.unsqueeze(-1) * directions).sum(2))


# Training loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("paired", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("name", TECHNIQUES)
def test_weight_zero_is_vanilla_bit_for_bit(name, paired):
    model = some_model(paired)
    texts = some_texts(seconds=(2, 6, 1, 3) if paired else None)
    plain = training_loss(model, texts, Technique())
    ours = training_loss(model, texts, replace(TECHNIQUES[name], weight=0.0), None, rng())
    assert ours.item() == plain.item()
    for one, other in zip(*(gradients(model, x).values() for x in (ours, plain)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_size_zero_counts_the_loss_twice_and_a_half(name):
    model, texts = some_model(), some_texts()
    plain = training_loss(model, texts, Technique())
    ours = training_loss(model, texts, replace(TECHNIQUES[name], size=0.0, weight=1.5), None, rng())
    torch.testing.assert_close(ours, 2.5 * plain)
    for one, other in zip(*(gradients(model, x).values() for x in (ours, plain)), strict=True):
        torch.testing.assert_close(one, 2.5 * other)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["at", "iat", "iat-unit", "official"])
def test_no_gradient_passes_through_the_perturbation(name, seed):
    model, texts = some_model(seed=seed), some_texts(seed=seed)
    technique = replace(TECHNIQUES[name], size=1.7, weight=0.6)
    encoded = model.encode(texts, model.embed(texts))
    r = score_perturbation(technique, score_gradient(model, texts), encoded).detach().clone()
    expected = loss_under(model, texts).mean() + 0.6 * loss_under(model, texts, r).mean()
    ours = training_loss(model, texts, technique)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    theirs = gradients(model, expected)
    for parameter, gradient in gradients(model, ours).items():
        torch.testing.assert_close(gradient, theirs[parameter], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("name", ["word-at", "word-iat"])
def test_word_perturbation_is_constant_and_has_its_length(name, trainable):
    model, texts = some_model(trainable=trainable), some_texts()
    words = model.embed(texts)
    words = words if trainable else words.requires_grad_()

    def loss(perturbation):
        logits, _ = model.read(model.encode(texts, words + perturbation))
        return functional.cross_entropy(logits, texts.targets)

    (gradient,) = torch.autograd.grad(loss(0.0), words, retain_graph=True)
    assert (gradient[~texts.mask] == 0).all()
    if name == "word-at":
        r = 0.5 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None]
    else:
        directions = word_directions(words.detach(), model.table[model.neighbours[texts.first]])
        r = interpretable_word(gradient, directions.detach(), 0.5)
    ours = training_loss(model, texts, replace(TECHNIQUES[name], size=0.5))
    expected = loss(0.0) + loss(r.detach())
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert ours > 2 * loss(0.0)
    mine, theirs = gradients(model, ours), gradients(model, expected)
    assert ("table" in mine) == trainable
    for parameter in mine:
        torch.testing.assert_close(mine[parameter], theirs[parameter], rtol=1e-10, atol=1e-12)


def test_class_weights_reach_both_losses():
    model, texts = some_model(), some_texts()
    weights = torch.tensor([1.0, 4.0, 0.5]).double()
    logits, _ = model(texts)
    expected = functional.cross_entropy(logits, texts.targets, weight=weights)
    ours = training_loss(model, texts, replace(SCORES, size=0.0), weights)
    torch.testing.assert_close(ours, 2 * expected)


# Model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("lengths", [(7, 1, 4, 2), (3,), (1, 1)], ids=str)
def test_two_lstms_equal_a_packed_bidirectional_one(lengths, seed):
    torch.manual_seed(seed)
    ours = BiLSTM(WIDTH, HIDDEN).double()
    theirs = nn.LSTM(WIDTH, HIDDEN, batch_first=True, bidirectional=True).double()
    mine = {"": ours.onward.state_dict(), "_reverse": ours.back.state_dict()}
    theirs.load_state_dict({n + end: w for end, part in mine.items() for n, w in part.items()})
    mask = some_mask(lengths, longest=8)
    words = normal(len(lengths), 8, WIDTH, seed=seed).requires_grad_()
    states, end = ours(words, mask)
    packed = pack_padded_sequence(words, torch.tensor(lengths), True, enforce_sorted=False)
    packed_states, (last, _) = theirs(packed)
    expected, _ = pad_packed_sequence(packed_states, batch_first=True, total_length=8)
    torch.testing.assert_close(states[mask], expected[mask])
    torch.testing.assert_close(end, torch.cat([last[0], last[1]], -1))
    one, other = (
        torch.autograd.grad((out * mask.unsqueeze(2)).sin().sum(), words)[0]
        for out in (states, expected)
    )
    torch.testing.assert_close(one, other)


def test_reversal_turns_words_and_leaves_padding():
    assert reversal(some_mask([3, 1, 4])).tolist() == [[2, 1, 0, 3], [0, 1, 2, 3], [3, 2, 1, 0]]


@pytest.mark.parametrize("paired", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("seed", SEEDS)
def test_model_against_its_equations_text_by_text(seed, paired):
    model = some_model(paired, seed=seed)
    texts = some_texts(seconds=(2, 6, 1, 3) if paired else None, seed=seed)
    logits, weights = model(texts)
    for row in range(len(texts)):
        own = texts.first[row][texts.first[row] != PAD]
        states, _ = model.encoder(model.table[own][None], torch.ones(1, len(own)).bool())
        inner = states[0] @ model.keys.weight.T + model.keys.bias
        if paired:
            other = texts.second[row][texts.second[row] != PAD]
            everything = torch.ones(1, len(other)).bool()
            _, question = model.second_encoder(model.table[other][None], everything)
            inner = inner + question[0] @ model.query.weight.T
        attention = (inner.tanh() @ model.score.weight[0]).exp()
        attention = attention / attention.sum()
        context = attention @ states[0]
        if paired:
            context = torch.cat([context, question[0]])
        torch.testing.assert_close(weights[row, : len(own)], attention)
        expected = model.output.weight @ context + model.output.bias
        torch.testing.assert_close(logits[row], expected)
    assert (weights[~texts.mask] == 0).all()


@pytest.mark.parametrize("name", ["at", "iat", "word-at", "word-iat"])
def test_more_padding_changes_nothing(name):
    model, texts = some_model(), some_texts()
    wider = Texts(functional.pad(texts.first, (0, 3)), texts.targets)
    losses = [training_loss(model, t, TECHNIQUES[name]) for t in (texts, wider)]
    torch.testing.assert_close(*losses)
    one, other = (gradients(model, loss) for loss in losses)
    for parameter in one:
        torch.testing.assert_close(one[parameter], other[parameter])


def test_fixed_attention_passes_no_gradient():
    model, texts = some_model(), some_texts()
    encoded = model.encode(texts, model.embed(texts))
    free, fixed = (model.read(encoded, fixed=f)[0] for f in (False, True))
    assert torch.equal(free, fixed)
    assert torch.autograd.grad(free.sum(), encoded.scores, retain_graph=True)[0].abs().max() > 1e-3
    assert torch.autograd.grad(fixed.sum(), encoded.scores, allow_unused=True) == (None,)


def test_texts_are_cut_to_the_longest_chosen():
    texts = some_texts((7, 1, 4, 2), (2, 6, 1, 3))
    chosen = texts.take(torch.tensor([3, 2]))
    assert (chosen.first.shape, chosen.second.shape, len(chosen)) == ((2, 4), (2, 3), 2)
    assert torch.equal(chosen.first[1], texts.first[2, :4])
    assert torch.equal(chosen.targets, texts.targets[[3, 2]])


def test_normalised_embeddings():
    table, frequency = normal(11, 4) * 3 + 2, torch.rand(11, generator=rng()).double().softmax(0)
    found = normalised(table, frequency)
    torch.testing.assert_close(frequency @ found, torch.zeros(4).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(frequency @ found.square(), torch.ones(4).double())


def test_nearest_words_against_brute_force():
    table = normal(9, 4).numpy()
    found = nearest_words(torch.from_numpy(table), 3)
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    for word in range(9):
        others = [k for k in range(9) if k not in (word, PAD)]
        expected = sorted(others, key=lambda k: -unit[word] @ unit[k])[:3]
        assert found[word].tolist() == expected


# Measurements -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_pearson_equals_scipy(seed):
    mask = some_mask([8, 3, 5])
    x, y = normal(3, 8, seed=seed), normal(3, 8, seed=seed + 20)
    for row, length in enumerate((8, 3, 5)):
        expected = pearsonr(x[row, :length], y[row, :length]).statistic
        assert pearson(x, y, mask)[row].item() == pytest.approx(expected, abs=1e-12)
    assert pearson(torch.ones(1, 8).double(), y[:1], mask[:1]).isnan().all()


def test_importance_in_a_linear_bag_model_is_its_weights():
    weights, words = normal(2, 5, 4, seed=1), normal(2, 5, 4, seed=2)

    def bag(x):
        return (x * weights).sum((1, 2))

    torch.testing.assert_close(word_importance(bag, words), weights.abs().sum(-1))
    expected = (words * weights).sum(-1).abs()
    torch.testing.assert_close(word_importance(bag, words, times_input=True), expected)


def test_log_odds_of_the_predicted_class():
    logits = normal(6, 4)
    p = logits.softmax(-1).amax(-1)
    torch.testing.assert_close(log_odds(logits), (p / (1 - p)).log())
    torch.testing.assert_close(log_odds(logits[:, :2]), (logits[:, 0] - logits[:, 1]).abs())


def test_total_variation():
    p, q = torch.tensor([[0.7, 0.3, 0.0]]), torch.tensor([[0.2, 0.3, 0.5]])
    assert total_variation(p, q).item() == pytest.approx(0.5)
    assert total_variation(p, p).item() == 0


# Errors -------------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong():
    model, texts = some_model(), some_texts()
    with pytest.raises(ValueError, match="words have no perturbation 'random'"):
        training_loss(model, texts, Technique("words", "random"))
    wrong = Technique("scores")
    object.__setattr__(wrong, "direction", "up")  # past the check of types in the tests
    with pytest.raises(ValueError, match="unknown direction 'up'"):
        training_loss(model, texts, wrong)
    with pytest.raises(ValueError, match="vocabulary of 4 has no 3 neighbours"):
        nearest_words(normal(4, 2), 3)
    model.neighbours = None
    with pytest.raises(ValueError, match="needs a model with the `neighbours`"):
        training_loss(model, texts, TECHNIQUES["word-iat"])
    mask = some_mask([3])
    unchecked = getattr(interpretable, "__wrapped__", interpretable)
    with pytest.raises(ValueError, match=r"norm must be .* not 'max'"):
        unchecked(normal(1, 3), normal(1, 3), mask, 1.0, "max")
