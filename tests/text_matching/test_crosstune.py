"""CrossTune: pooling, the scorer, its loss and the switch, against what must hold."""

import math

import pytest
import torch
from torch.nn import functional as F

from reattend.text_matching.crosstune import (
    CrossTune,
    cross_validated,
    intended,
    label_loss,
    switch,
    zero_shot,
)

SEEDS = (0, 1, 2)
SHAPES = [(1, 2, 6, 2), (5, 3, 7, 1), (7, 6, 15, 5)]  # items, classes, width, heads


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def scorer_of(width, heads, seed=0, noise=0.5, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return CrossTune(width, heads, scale, noise, generator).double()


# The scorer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("items", "classes", "width", "heads"), SHAPES)
def test_weights_are_those_of_multi_head_attention(items, classes, width, heads, seed):
    texts, labels = normal(items, width, seed=seed), normal(classes, width, seed=seed + 10)
    scorer = scorer_of(width, heads, seed, scale=(width // heads) ** -0.5)
    reference = torch.nn.MultiheadAttention(width, heads, bias=False, batch_first=True).double()
    with torch.no_grad():
        reference.in_proj_weight[:width] = scorer.query.T
        reference.in_proj_weight[width : 2 * width] = scorer.key.T
    _, weights = reference(texts[None], labels[None], labels[None], average_attn_weights=False)
    found = scorer.attention(texts, labels)
    torch.testing.assert_close(found, weights[0].transpose(0, 1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(scorer(texts, labels), weights[0].mean(0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("items", "classes", "width", "heads"), SHAPES)
def test_probabilities_follow_the_labels(items, classes, width, heads, seed):
    texts, labels = normal(items, width, seed=seed), normal(classes, width, seed=seed + 10)
    scorer = scorer_of(width, heads, seed)
    p = scorer(texts, labels)
    torch.testing.assert_close(
        p.sum(-1), torch.ones(items, dtype=torch.float64), rtol=1e-12, atol=0
    )
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(scorer(texts, labels[order]), p[:, order], rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_label_given_twice_shares_by_head(seed):
    texts, labels = normal(4, 9, seed=seed), normal(5, 9, seed=seed + 10)
    scorer = scorer_of(9, 3, seed)
    once = scorer.attention(texts, labels)
    twice = scorer.attention(texts, torch.cat([labels, labels[2:3]]))
    # e^l / (Z + e^l) in terms of a = e^l / Z
    expected = once[..., 2] / (1 + once[..., 2])
    torch.testing.assert_close(twice[..., 2], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(twice[..., 5], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [0.1, 10.0, 300.0])
def test_one_head_at_the_identity_is_zero_shot(scale):
    texts, labels = (F.normalize(normal(n, 8, seed=n), dim=-1) for n in (40, 5))
    scorer = scorer_of(8, 1, noise=0.0, scale=scale)
    cosines = zero_shot(texts, labels)
    assert (scorer(texts, labels).argmax(1) == cosines.argmax(1)).all()
    torch.testing.assert_close(
        scorer(texts, labels), (scale * cosines).softmax(-1), rtol=1e-5, atol=1e-9
    )


def test_zero_shot_is_the_cosine():
    texts, labels = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0], [-5.0, 0.0]])
    torch.testing.assert_close(zero_shot(texts, labels), torch.tensor([[0.8, -0.6]]))


def test_a_head_at_the_identity_reads_its_slice():
    texts, labels = normal(3, 6), normal(4, 6, seed=1)
    attention = scorer_of(6, 3, noise=0.0, scale=2.0).attention(texts, labels)
    for head in range(3):
        own = slice(2 * head, 2 * head + 2)
        expected = (2.0 * texts[:, own] @ labels[:, own].T).softmax(-1)
        torch.testing.assert_close(attention[:, head], expected, rtol=1e-6, atol=0)


def test_the_start_is_the_identity_with_the_noise_that_was_asked_for():
    scorer = CrossTune(200, 4, 10.0, 0.01, torch.Generator().manual_seed(0))
    for weight in (scorer.query, scorer.key):
        rest = weight.detach() - torch.eye(200)
        assert rest.std().item() == pytest.approx(0.01, rel=0.02)
        assert abs(rest.mean().item()) < 2e-4
    assert not torch.equal(scorer.query, scorer.key)
    assert scorer.log_scale.exp().item() == pytest.approx(10.0)
    again = CrossTune(200, 4, 10.0, 0.01, torch.Generator().manual_seed(0))
    assert torch.equal(scorer.query, again.query)
    assert torch.equal(scorer.key, again.key)


@pytest.mark.parametrize("classes", [1, 2, 7])
def test_equal_labels_give_a_uniform_distribution(classes):
    texts, labels = normal(5, 6), normal(1, 6, seed=1).expand(classes, -1)
    p = scorer_of(6, 2)(texts, labels)
    torch.testing.assert_close(p, torch.full_like(p, 1 / classes), rtol=1e-12, atol=0)
    loss = label_loss(p, torch.zeros(5, dtype=torch.long))
    assert loss.item() == pytest.approx(math.log(classes), abs=1e-8)


def test_refusals():
    with pytest.raises(ValueError, match="heads must divide the width"):
        CrossTune(10, 3)
    with pytest.raises(ValueError, match="scale must be positive"):
        CrossTune(10, 2, scale=0.0)


# The loss -----------------------------------------------------------------------------------------


def test_one_confident_wrong_head_caps_the_probability():
    heads = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    loss = label_loss(heads.mean(0, keepdim=True), torch.tensor([0]))
    assert loss.item() == pytest.approx(-math.log(3 / 4), abs=1e-8)
    certain = label_loss(torch.tensor([[0.0, 1.0]], dtype=torch.float64), torch.tensor([0]))
    assert certain.item() == pytest.approx(-math.log(1e-9))


@pytest.mark.parametrize("seed", SEEDS)
def test_gradient_by_head(seed):
    # -log mean_m a_y^m has the gradient r_m (a^m - onehot_y), r_m = a_y^m / sum a_y, in the logits of m.
    logits = normal(6, 4, 5, seed=seed).requires_grad_()
    labels = torch.tensor([0, 4, 2, 2, 1, 3])
    attention = logits.softmax(-1)
    (label_loss(attention.mean(1), labels) * 6).backward()
    right = attention.gather(-1, labels[:, None, None].expand(-1, 4, 1))
    shares = right / right.sum(1, keepdim=True)
    expected = shares * (attention - F.one_hot(labels, 5)[:, None])
    torch.testing.assert_close(logits.grad, expected.detach(), rtol=1e-6, atol=1e-9)


def test_training_follows_the_gradient_of_queries_keys_and_scale_alone():
    texts, labels = normal(8, 6), normal(3, 6, seed=1)
    scorer = scorer_of(6, 2)
    assert {n: tuple(p.shape) for n, p in scorer.named_parameters()} == {
        "query": (6, 6),
        "key": (6, 6),
        "log_scale": (),
    }

    def loss(query, key, log_scale):
        parameters = {"query": query, "key": key, "log_scale": log_scale}
        p = torch.func.functional_call(scorer, parameters, (texts, labels))
        return label_loss(p, torch.arange(8) % 3)

    assert torch.autograd.gradcheck(loss, tuple(scorer.parameters()), atol=1e-7)


# The switch ---------------------------------------------------------------------------------------

CENTRES = 2.0 * torch.eye(4, dtype=torch.float64)[:3]


def clusters(per_class, seed, spread=0.9):
    labels = torch.arange(3).repeat_interleave(per_class)
    return CENTRES[labels] + spread * normal(3 * per_class, 4, seed=seed), labels


def nearest_mean(texts, labels, others):
    """Probabilities by squared distance to the class means."""
    means = torch.stack([texts[labels == c].mean(0) for c in range(3)])
    return (-0.5 * torch.cdist(others, means) ** 2).softmax(-1)


def folds_of(labels):
    return torch.arange(len(labels)) % 2


@pytest.mark.parametrize("seed", range(5))
def test_switch_accepts_right_texts_and_rejects_wrong_ones(seed):
    shots, labels = clusters(2, seed)
    more, right = clusters(60, seed + 100)
    kept = switch(nearest_mean, shots, labels, folds_of(labels), more, right)
    assert kept.double().mean() > 0.6
    wrong = (right + 1) % 3
    kept = switch(nearest_mean, shots, labels, folds_of(labels), more, wrong)
    assert kept.double().mean() < 0.2
    # With no filter on single texts the set as a whole decides.
    assert switch(nearest_mean, shots, labels, folds_of(labels), more, right, least=0.0).all()
    assert not switch(nearest_mean, shots, labels, folds_of(labels), more, wrong, least=0.0).any()


def test_intended_asks_for_the_label_of_each_text():
    def teacher(texts, labels, others):
        return torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.2, 0.8]])

    nothing = torch.zeros(1, 1)
    labels = torch.tensor([0, 1, 0])
    kept = intended(teacher, nothing, torch.tensor([0]), torch.zeros(3, 1), labels, 0.5)
    assert kept.tolist() == [True, True, False]


def test_cross_validation_holds_out_the_fold_and_nothing_else():
    seen = []

    def teacher(texts, labels, others):
        seen.append((texts[:, 0].tolist(), labels.tolist(), others[:, 0].tolist()))
        return torch.tensor([[0.25, 0.75]] * len(others))

    shots, labels = torch.arange(4.0)[:, None], torch.tensor([0, 1, 0, 1])
    more, more_labels = torch.tensor([[9.0]]), torch.tensor([1])
    folds = torch.tensor([0, 0, 7, 7])
    value = cross_validated(teacher, shots, labels, folds, more, more_labels)
    assert seen == [
        ([2.0, 3.0, 9.0], [0, 1, 1], [0.0, 1.0]),
        ([0.0, 1.0, 9.0], [0, 1, 1], [2.0, 3.0]),
    ]
    assert value == pytest.approx((math.log(0.25) + math.log(0.75)) / 2)


def test_switch_needs_something_to_hold_out():
    shots, labels = clusters(1, 0)
    with pytest.raises(ValueError, match="at least two folds"):
        switch(nearest_mean, shots, labels, torch.zeros_like(labels), shots, labels)
