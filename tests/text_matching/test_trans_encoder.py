"""Trans-Encoder: labels, losses, the contrastive start and the alternation, against what must hold."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, BertModel

from reattend.text_matching.trans_encoder import (
    SegmentCrossEncoder,
    alternate,
    asymmetry,
    best_cycle,
    bi_labels,
    bi_loss,
    both_orders,
    cross_labels,
    cross_loss,
    label_entropy,
    mask_spans,
    mean_labels,
    nt_xent,
    segment_masks,
)
from reattend.trunks.encoders import BiEncoder, CrossEncoder, TextEncoder, Tokens

SEEDS = (0, 1, 2)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=rng(seed), dtype=torch.float64)


# The contrastive start ----------------------------------------------------------------------------


def test_nt_xent_of_two_texts_by_hand():
    # Views a, b and a', b' on the unit circle: cosines 0.8 within a text, 0 or ±0.6 across.
    first = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    second = torch.tensor([[4.0, 3.0], [-3.0, 4.0]], dtype=torch.float64)
    half = 0.5  # temperature
    right = math.exp(0.8 / half)
    across = [
        (0.0, -0.6),  # of a: b, b'
        (0.0, 0.6),  # of b: a, a'
        (0.6, 0.0),  # of a': b, b'
        (-0.6, 0.0),  # of b': a, a'
    ]
    expected = [-math.log(right / (right + sum(math.exp(c / half) for c in cs))) for cs in across]
    assert nt_xent(first, second, half).item() == pytest.approx(sum(expected) / 4, rel=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("texts", "width"), [(2, 3), (5, 7), (16, 9)])
def test_nt_xent_is_a_cross_entropy_over_the_other_embeddings(texts, width, seed):
    first, second = normal(texts, width, seed=seed), normal(texts, width, seed=seed + 10)
    first.requires_grad_()
    every = functional.normalize(torch.cat([first, second]), dim=-1)
    losses = []
    for i in range(2 * texts):
        others = [j for j in range(2 * texts) if j != i]
        target = torch.tensor(others.index((i + texts) % (2 * texts)))
        losses.append(functional.cross_entropy(every[others] @ every[i] / 0.04, target))
    expected = torch.stack(losses).mean()
    loss = nt_xent(first, second, 0.04)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (wanted,) = torch.autograd.grad(expected, first, retain_graph=True)
    (given,) = torch.autograd.grad(loss, first)
    torch.testing.assert_close(given, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("texts", [2, 3, 8])
def test_nt_xent_of_equal_embeddings_and_of_swapped_views(texts):
    same = torch.ones(texts, 4, dtype=torch.float64)
    assert nt_xent(same, same, 0.04).item() == pytest.approx(math.log(2 * texts - 1), rel=1e-12)
    first, second = normal(texts, 5), normal(texts, 5, seed=1)
    torch.testing.assert_close(nt_xent(first, second, 0.2), nt_xent(second, first, 0.2))


def test_nt_xent_refuses_what_it_cannot_contrast():
    with pytest.raises(ValueError, match="one shape"):
        nt_xent(normal(3, 4), normal(2, 4), 0.1)
    with pytest.raises(ValueError, match="at least two"):
        nt_xent(normal(1, 4), normal(1, 4), 0.1)
    with pytest.raises(ValueError, match="positive"):
        nt_xent(normal(2, 4), normal(2, 4), 0.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_masked_spans(seed):
    texts = ["x" * 29, "abcdefghij" * 3, "0123456789" * 7]
    short, middle, long = mask_spans(texts, rng(seed))
    assert short == texts[0]
    for before, after in zip(texts[1:], (middle, long), strict=True):
        left, right = after.split("[MASK]")
        assert len(left) + len(right) == len(before) - 5
        assert before.startswith(left)
        assert before.endswith(right)
    assert mask_spans(texts, rng(seed)) == [short, middle, long]


def test_masked_spans_reach_both_ends_and_no_further():
    masked = mask_spans(["0123456"] * 500, rng(), span=3, shortest=7, mask="_")
    assert set(masked) == {"_3456", "0_456", "01_56", "012_6", "0123_"}
    with pytest.raises(ValueError, match=r"1\.\.30"):
        mask_spans(["a"], rng(), span=31)


# Labels -------------------------------------------------------------------------------------------


def test_labels_are_raw_within_the_unit_interval_and_carry_no_gradient():
    cosines = torch.tensor([-0.3, 0.0, 0.41, 0.77, 1.0], requires_grad=True)
    assert bi_labels(cosines).tolist() == pytest.approx([0, 0, 0.41, 0.77, 1])
    assert not bi_labels(cosines).requires_grad
    logits = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    expected = [1 / (1 + math.exp(-x)) for x in (-2, 0, 3)]
    assert cross_labels(logits).tolist() == pytest.approx(expected)
    assert not cross_labels(logits).requires_grad


def test_both_orders_carry_the_same_label():
    labels = torch.tensor([0.2, 0.5, 0.9])
    texts = ["a1", "a2", "a3", "b1", "b2", "b3"]
    left, right, doubled = both_orders(labels)
    items = [
        (texts[i], texts[j], round(y, 6))
        for i, j, y in zip(left.tolist(), right.tolist(), doubled.tolist(), strict=True)
    ]
    expected = [("a1", "b1", 0.2), ("a2", "b2", 0.5), ("a3", "b3", 0.9)]
    assert items == expected + [(b, a, y) for a, b, y in expected]


def test_mean_labels():
    one, two = uniform(6), uniform(6, seed=1)
    torch.testing.assert_close(mean_labels([one, two]), (one + two) / 2)
    assert torch.equal(mean_labels([one]), one)
    torch.testing.assert_close(mean_labels([one, one, one]), one, rtol=1e-15, atol=0)


# Losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("pairs", [1, 7, 32])
def test_soft_cross_entropy_is_least_at_the_label_with_its_entropy(pairs, seed):
    labels = uniform(pairs, seed=seed) * 0.98 + 0.01
    best = torch.logit(labels).requires_grad_()
    loss = cross_loss(best, labels)
    entropy = -(labels * labels.log() + (1 - labels) * (1 - labels).log()).mean()
    torch.testing.assert_close(loss, entropy, rtol=1e-12, atol=0)
    torch.testing.assert_close(label_entropy(labels), entropy, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss, best)
    assert gradient.abs().max() < 1e-15
    away = best.detach() + normal(pairs, seed=seed + 5)
    assert cross_loss(away, labels) > loss


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_of_the_two_cross_losses(seed):
    logits = (3 * normal(9, seed=seed)).requires_grad_()
    labels = uniform(9, seed=seed + 1)
    difference = logits.detach().sigmoid() - labels
    slope = logits.detach().sigmoid() * (1 - logits.detach().sigmoid())
    (bce,) = torch.autograd.grad(cross_loss(logits, labels), logits)
    torch.testing.assert_close(bce, difference / 9, rtol=1e-10, atol=1e-15)
    (mse,) = torch.autograd.grad(cross_loss(logits, labels, "mse"), logits)
    torch.testing.assert_close(mse, 2 * difference * slope / 9, rtol=1e-10, atol=1e-15)


def test_hard_labels_have_no_entropy_and_ordinary_cross_entropy():
    labels = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    logits = normal(3)
    assert label_entropy(labels).item() == 0
    torch.testing.assert_close(
        cross_loss(logits, labels),
        functional.softplus(torch.where(labels > 0, -logits, logits)).mean(),
    )


def test_cross_loss_refuses_labels_out_of_range_and_unknown_losses():
    with pytest.raises(ValueError, match="bi_labels"):
        cross_loss(normal(2), torch.tensor([0.5, -0.1]).double())
    with pytest.raises(ValueError, match="bi_labels"):
        cross_loss(normal(2), torch.tensor([0.5, 1.1]).double())
    with pytest.raises(ValueError, match="bce, mse"):
        cross_loss(normal(2), uniform(2), "hinge")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("pairs", "width"), [(1, 2), (6, 5), (13, 8)])
def test_bi_loss_is_the_squared_error_of_the_cosine(pairs, width, seed):
    first = normal(pairs, width, seed=seed).requires_grad_()
    second, labels = normal(pairs, width, seed=seed + 1), uniform(pairs, seed=seed)
    cosine = (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))
    expected = (cosine - labels).square().mean()
    loss = bi_loss(first, second, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-15)
    (given,) = torch.autograd.grad(loss, first)
    (wanted,) = torch.autograd.grad(expected, first)
    torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(bi_loss(second, first, labels), loss)


def test_asymmetry():
    score = uniform(50)
    assert asymmetry(score, score) == 0
    shifted = asymmetry(score, score + 0.1)
    assert shifted.item() == pytest.approx(0.1 / torch.cat([score, score + 0.1]).std().item())
    torch.testing.assert_close(asymmetry(10 * score, 10 * score + 1), shifted)


# Encoders -----------------------------------------------------------------------------------------

TINY = {
    "vocab_size": 40,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 24,
}


def tiny_bert(seed=0):
    torch.manual_seed(seed)
    return BertModel(BertConfig(**TINY)).eval()


def tokens(texts, length, seed=0, segments=False):
    ids = torch.randint(1, 40, (texts, length), generator=rng(seed))
    lengths = torch.randint(5, length + 1, (texts,), generator=rng(seed + 1))
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    kinds = (torch.arange(length) >= lengths[:, None] // 2) & mask
    return Tokens(ids * mask, mask, kinds.long() if segments else torch.zeros_like(ids))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("length", [5, 11])
def test_cross_encoder_equals_bert_for_sequence_classification(length, seed):
    torch.manual_seed(seed)
    theirs = BertForSequenceClassification(BertConfig(**TINY, num_labels=1)).eval()
    ours = CrossEncoder(TextEncoder(theirs.bert)).eval()
    ours.head.load_state_dict(theirs.classifier.state_dict())
    pairs = tokens(4, length, seed, segments=True)
    logits = ours(pairs)[:, 0]
    expected = theirs(
        input_ids=pairs.ids, attention_mask=pairs.mask.long(), token_type_ids=pairs.segments
    ).logits[:, 0]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    labels = uniform(4, seed=seed).float()
    loss, wanted = cross_loss(logits, labels), nn.BCEWithLogitsLoss()(expected, labels)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    weight = theirs.bert.encoder.layer[0].attention.self.query.weight
    (given,) = torch.autograd.grad(loss, weight)
    (expected_gradient,) = torch.autograd.grad(wanted, weight)
    torch.testing.assert_close(given, expected_gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_cosines(pooling):
    teacher = BiEncoder(TextEncoder(tiny_bert()), pooling)
    first, second = tokens(5, 9), tokens(5, 7, seed=3)
    labels = bi_labels(teacher.similarity(first, second))
    loss = bi_loss(teacher(first), teacher(second), labels)
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_segment_masks_leave_out_cls_and_padding():
    ids = torch.tensor([[1, 7, 2, 8, 9, 2, 0], [1, 7, 7, 7, 2, 8, 2]])
    kinds = torch.tensor([[0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1]])
    first, second = segment_masks(Tokens(ids, ids > 0, kinds))
    assert first.int().tolist() == [[0, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0]]
    assert second.int().tolist() == [[0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_segment_cross_encoder_by_hand_with_and_without_a_cache(frozen):
    cross = SegmentCrossEncoder(TextEncoder(tiny_bert(), frozen), prior=0.3).eval()
    pairs = tokens(5, 10, segments=True)
    first, second = segment_masks(pairs)
    logits = cross(pairs, first, second)
    states = cross.encoder.model(
        pairs.ids, attention_mask=pairs.mask.long(), token_type_ids=pairs.segments
    ).last_hidden_state
    for i in range(5):
        u, v = states[i][first[i]].mean(0), states[i][second[i]].mean(0)
        expected = (
            torch.cat([u, v, (u - v).abs(), u * v]) @ cross.head.weight[0] + cross.head.bias[0]
        )
        torch.testing.assert_close(logits[i], expected, rtol=1e-5, atol=1e-6)
    cached = cross(cross.encoder.cache(pairs), first, second)
    torch.testing.assert_close(cached, logits, rtol=0, atol=2e-3)  # states in half precision


def test_segment_cross_encoder_reads_the_texts_together_and_starts_at_the_prior():
    cross = SegmentCrossEncoder(TextEncoder(tiny_bert()), prior=0.3).eval()
    nn.init.zeros_(cross.head.weight)
    pairs = tokens(4, 8, segments=True)
    masks = segment_masks(pairs)
    assert cross_labels(cross(pairs, *masks)).tolist() == pytest.approx([0.3] * 4)
    with torch.no_grad():
        cross.head.weight[0, :3] = 1.0  # of u alone; all of u would sum to 0 behind its layer norm
        before = cross(pairs, *masks)
        other = Tokens(torch.where(masks[1], 39, pairs.ids), pairs.mask, pairs.segments)
        after = cross(other, *masks)
    assert (before - after).abs().min() > 1e-4
    with pytest.raises(ValueError, match="prior"):
        SegmentCrossEncoder(TextEncoder(tiny_bert()), prior=1.0)


def test_a_bi_encoder_is_symmetric_and_a_cross_encoder_is_not():
    bert = tiny_bert()
    bi, cross = BiEncoder(TextEncoder(bert)), CrossEncoder(TextEncoder(bert)).eval()
    first, second = tokens(6, 8), tokens(6, 8, seed=4)
    assert torch.equal(bi.similarity(first, second), bi.similarity(second, first))
    cls, sep = torch.full((6, 1), 1), torch.full((6, 1), 2)

    def read(one, other):
        ids = torch.cat([cls, one.ids[:, :3], sep, other.ids[:, :3], sep], 1)
        kinds = torch.tensor([0] * 5 + [1] * 4).expand(6, -1)
        return cross_labels(cross(Tokens(ids, torch.ones_like(ids).bool(), kinds))[:, 0])

    assert asymmetry(read(first, second), read(second, first)) > 0.01


# The alternation ----------------------------------------------------------------------------------


class Scorer(nn.Module):
    """A model that is only its scores."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores


@dataclass
class Recorder:
    """A student whose cross-encoder squares the labels and whose bi-encoder adds `shift`."""

    shift: float
    calls: list = field(default_factory=list)

    def label_with_bi(self, bi):
        self.calls.append("label with bi")
        return bi_labels(bi.scores)

    def train_cross(self, labels, cycle):
        self.calls.append(f"train cross {cycle}")
        return Scorer(torch.logit(labels.square(), eps=1e-9))

    def label_with_cross(self, cross):
        self.calls.append("label with cross")
        return cross_labels(cross.scores)

    def train_bi(self, labels, cycle):
        self.calls.append(f"train bi {cycle}")
        return Scorer(labels + self.shift)


def test_self_distillation_alternates_and_hands_labels_on():
    student, start = Recorder(0.1), Scorer(torch.tensor([0.5, 0.8]).double())
    ((first, second),) = alternate([student], [start], 2)
    assert student.calls == [
        step
        for cycle in range(2)
        for step in (
            "label with bi",
            f"train cross {cycle}",
            "label with cross",
            f"train bi {cycle}",
        )
    ]
    assert first.labels_for_cross.tolist() == pytest.approx([0.5, 0.8])
    assert first.labels_for_bi.tolist() == pytest.approx([0.25, 0.64])
    assert second.labels_for_cross.tolist() == pytest.approx([0.35, 0.74])
    assert second.bi.scores.tolist() == pytest.approx([0.35**2 + 0.1, 0.74**2 + 0.1])


def test_mutual_distillation_averages_both_kinds_of_labels():
    students = [Recorder(0.0), Recorder(0.2)]
    starts = [Scorer(torch.tensor([0.2]).double()), Scorer(torch.tensor([0.6]).double())]
    one, two = alternate(students, starts, 2)
    for cycles in (one, two):
        assert cycles[0].labels_for_cross.item() == pytest.approx(0.4)
        assert cycles[0].labels_for_bi.item() == pytest.approx(0.16)
        # The bi-encoders then say 0.16 and 0.36.
        assert cycles[1].labels_for_cross.item() == pytest.approx(0.26)
    assert two[1].bi.scores.item() - one[1].bi.scores.item() == pytest.approx(0.2)


def test_mutual_distillation_of_two_equal_models_is_self_distillation():
    start = Scorer(uniform(20))
    (alone,) = alternate([Recorder(0.05)], [start], 3)
    for together in alternate([Recorder(0.05), Recorder(0.05)], [start, start], 3):
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours.bi.scores, theirs.bi.scores)
            torch.testing.assert_close(ours.cross.scores, theirs.cross.scores)


def test_alternation_refuses_what_it_cannot_run():
    with pytest.raises(ValueError, match="1 students, 0 starts"):
        alternate([Recorder(0)], [], 1)
    with pytest.raises(ValueError, match="0 students"):
        alternate([], [], 1)
    with pytest.raises(ValueError, match="at least 1"):
        alternate([Recorder(0)], [Scorer(uniform(2))], 0)


def test_best_cycle_is_the_first_of_the_best():
    assert best_cycle([0.3, 0.7, 0.7, 0.1]) == 1
    assert best_cycle([0.3]) == 0
    with pytest.raises(ValueError, match="no cycle"):
        best_cycle([])
