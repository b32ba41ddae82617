"""Oracles of distilled sentence embedding: pooling, head, objective, cached layers, FLOPs."""

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from reattend.text_matching.dse import (
    PairHead,
    Siamese,
    StoredSentences,
    concat_top_mean,
    cross_flops,
    distillation_loss,
    dse_loss,
    encoder_flops,
    exchange_equal,
    head_flops,
    pair_features,
    pool_mean,
    relative_degradation,
    store_frozen,
    student_flops,
    task_loss,
    teacher_targets,
)

SEEDS = [0, 1, 2]
KINDS = {"binary": 1, "multiclass": 3, "regression": 1}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def lengths_mask(lengths, length):
    return torch.arange(length) < torch.tensor(lengths)[:, None]


def labels_of(kind, pairs, seed=0):
    if kind == "regression":
        return torch.rand(pairs, generator=rng(seed), dtype=torch.float64)
    return torch.randint(2 if kind == "binary" else 3, (pairs,), generator=rng(seed))


# Pooling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("top", [1, 3, 4])
def test_pooling_is_a_masked_mean_by_hand_forward_and_backward(top, seed):
    lengths = [7, 2, 5]
    layers = [normal(3, 7, 5, seed=10 * seed + n).requires_grad_() for n in range(4)]
    pooled = concat_top_mean(layers, lengths_mask(lengths, 7), top)
    by_hand = torch.stack(
        [
            torch.cat([layer[row, 1:count].mean(0) for layer in layers[4 - top :]])
            for row, count in enumerate(lengths)
        ]
    )
    assert pooled.shape == (3, top * 5)
    torch.testing.assert_close(pooled, by_hand, atol=1e-14, rtol=1e-14)
    direction = normal(*pooled.shape, seed=99)
    used = layers[4 - top :]
    ours = torch.autograd.grad((pooled * direction).sum(), used)
    theirs = torch.autograd.grad((by_hand * direction).sum(), used)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-14, rtol=1e-14)
        assert (one[:, 0] == 0).all()  # CLS
        assert (one[1, 2:] == 0).all()  # padding


def test_pooling_ignores_cls_and_padding_but_not_sep():
    states, mask = normal(2, 6, 4), lengths_mask([6, 4], 6)
    pooled = pool_mean(states, mask)
    changed = states.clone()
    changed[:, 0] = 100.0
    changed[1, 4:] = float("nan")
    assert torch.equal(pool_mean(changed, mask), pooled)
    longer = functional.pad(states, (0, 0, 0, 3), value=7.0)
    torch.testing.assert_close(pool_mean(longer, lengths_mask([6, 4], 9)), pooled)
    changed[0, 5] += 1.0  # the last real token, SEP
    torch.testing.assert_close(pool_mean(changed, mask)[0], pooled[0] + 1 / 5)


def test_pooling_needs_tokens_and_layers():
    with pytest.raises(ValueError, match="no token besides CLS"):
        pool_mean(normal(2, 3, 4), lengths_mask([3, 1], 3))
    with pytest.raises(ValueError, match="top = 3 of 2 layers"):
        concat_top_mean([normal(1, 3, 4)] * 2, lengths_mask([3], 3), 3)


# Frozen lower layers, stored ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).double().eval()


@pytest.mark.parametrize(("trained", "top"), [(3, 3), (2, 3), (1, 3), (4, 4), (2, 1), (1, 4)])
def test_stored_lower_layers_give_the_embedding_of_the_whole_encoder(bert, trained, top):
    mask = lengths_mask([9, 3, 6], 9)
    tokens = torch.randint(50, (3, 9), generator=rng())
    states = bert(tokens, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    whole = concat_top_mean(states[1:], mask, top)
    stored = store_frozen(
        bert, tokens, mask, trained=trained, top=top, dtype=torch.float64, batch=2
    )
    student = Siamese(bert, 1, trained=trained, top=top).double().eval()
    ours = student.embed(stored)
    assert student.embedding == top * 8
    torch.testing.assert_close(ours, whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(student.embed_all(stored), whole, atol=1e-12, rtol=1e-12)
    rows = torch.tensor([2, 1])  # shorter sentences: padding is cut
    assert stored[rows].states.shape == (2, 6, 8)
    torch.testing.assert_close(student.embed(stored[rows]), whole[rows], atol=1e-12, rtol=1e-12)
    direction = normal(*whole.shape)
    parameters = list(bert.encoder.layer[4 - trained :].parameters())
    gradients = [
        torch.autograd.grad((out * direction).sum(), parameters, allow_unused=True)
        for out in (ours, whole)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


def test_extra_padding_does_not_change_the_embedding(bert):
    student = Siamese(bert, 1, trained=2, top=3).double().eval()
    states, pooled = normal(2, 5, 8), normal(2, 8, seed=1)
    short = student.embed(StoredSentences(states, lengths_mask([5, 3], 5), pooled))
    padded = functional.pad(states, (0, 0, 0, 4), value=3.0)
    long = student.embed(StoredSentences(padded, lengths_mask([5, 3], 9), pooled))
    torch.testing.assert_close(short, long, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("top", [1, 3])
def test_frozen_encoder_with_a_projection_is_a_linear_map_of_the_pooling(bert, top):
    mask = lengths_mask([9, 3, 6], 9)
    tokens = torch.randint(50, (3, 9), generator=rng(1))
    states = bert(tokens, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    stored = store_frozen(bert, tokens, mask, trained=0, top=top)
    assert stored.states.numel() == 0
    student = Siamese(bert, 1, trained=0, top=top, projection=5).double()
    whole = student.projection(concat_top_mean(states[1:], mask, top))
    assert student.embedding == 5
    assert not list(student.layers.parameters())
    torch.testing.assert_close(student.embed(stored), whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(student.embed_all(stored), whole, atol=1e-12, rtol=1e-12)


def test_student_encodes_the_sentences_of_a_pair_apart(bert):
    student = Siamese(bert, 3, trained=1, top=2).double().eval()
    mask = lengths_mask([5, 3, 4, 5], 5)
    stored = StoredSentences(normal(4, 5, 8), mask, normal(4, 8, seed=1))
    first, second = stored[torch.tensor([0, 1])], stored[torch.tensor([2, 3])]
    u = student.embed(stored)
    torch.testing.assert_close(student(first, second), student.head(u[:2], u[2:]))
    assert all(p.requires_grad for p in student.parameters())
    with pytest.raises(ValueError, match="5 trained and top = 2 of 4 layers"):
        store_frozen(bert, torch.zeros(1, 3).long(), mask[:1, :3], trained=5, top=2)


# Head ---------------------------------------------------------------------------------------------


def test_features_are_the_four_blocks_in_order():
    u, v = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 5.0])
    assert pair_features(u, v).tolist() == [1, -2, 3, 5, 3, -10, 2, 7]


def test_without_the_product_block_it_is_the_softmax_loss_head_of_sentence_transformers():
    head, u, v = PairHead(5, 3, 7).double(), normal(4, 5), normal(4, 5, seed=1)
    with torch.no_grad():
        head.blocks()[2].zero_()
        weight = torch.cat([head.blocks()[0], head.blocks()[1], head.blocks()[3]], 1)
    theirs = functional.linear(torch.cat([u, v, (u - v).abs()], 1), weight, head.first.bias)
    torch.testing.assert_close(head(u, v), head.second(theirs.relu()), atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("queries", "candidates", "outputs"), [(1, 1, 1), (3, 7, 3), (5, 2, 1)])
def test_split_scoring_equals_the_pairwise_loop_forward_and_backward(
    queries, candidates, outputs, seed
):
    torch.manual_seed(seed)
    head = PairHead(6, outputs, 9).double()
    u, v = normal(queries, 6, seed=seed), normal(candidates, 6, seed=seed + 10)
    fast = head.score(u, v, head.catalogue(v))
    slow = torch.stack([torch.stack([head(one, other) for other in v]) for one in u])
    assert fast.shape == (queries, candidates, outputs)
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=1e-12)
    direction = normal(*fast.shape, seed=5)
    parameters = list(head.parameters())
    gradients = [torch.autograd.grad((out * direction).sum(), parameters) for out in (fast, slow)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-10)


def test_head_is_not_symmetric_and_has_the_papers_width():
    head, u, v = PairHead(4096, 1), torch.randn(2, 4096), torch.randn(2, 4096)
    assert head.first.weight.shape == (512, 16 * 1024)
    assert not torch.allclose(head(u, v), head(v, u))


# Objective ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_0_is_the_siamese_network_and_alpha_1_reads_no_label(kind):
    outputs = KINDS[kind]
    head = PairHead(5, outputs, 7).double()
    u, v, teacher = normal(9, 5), normal(9, 5, seed=1), normal(9, outputs, seed=2)
    y = labels_of(kind, 9)
    parameters = list(head.parameters())
    nowhere = torch.full_like(teacher, float("nan"))
    siamese = torch.autograd.grad(task_loss(head(u, v), y, kind), parameters)
    ours = torch.autograd.grad(dse_loss(head(u, v), y, nowhere, 0.0, kind), parameters)
    for one, other in zip(ours, siamese, strict=True):
        assert torch.equal(one, other)
    logits = head(u, v)
    pure = dse_loss(logits, y, teacher, 1.0, kind)
    assert torch.equal(pure, dse_loss(logits, y.flip(0), teacher, 1.0, kind))
    assert torch.equal(pure, distillation_loss(logits, teacher))
    half = dse_loss(logits, y, teacher, 0.5, kind)
    torch.testing.assert_close(half, (task_loss(logits, y, kind) + pure) / 2)


@pytest.mark.parametrize("outputs", [1, 3])
def test_distillation_is_a_sum_over_logits_and_a_mean_over_pairs(outputs):
    teacher = normal(7, outputs)
    assert distillation_loss(teacher.clone(), teacher) == 0
    z = normal(7, outputs, seed=1).requires_grad_()
    y, kind = labels_of("multiclass" if outputs == 3 else "regression", 7), "regression"
    kind = "multiclass" if outputs == 3 else kind
    whole = dse_loss(z, y, teacher, 0.3, kind) - 0.7 * task_loss(z, y, kind)
    (gradient,) = torch.autograd.grad(whole, z)
    expected = 2 * 0.3 * (z - teacher) / 7
    torch.testing.assert_close(gradient, expected.detach(), atol=1e-14, rtol=1e-12)


def test_task_losses_by_hand():
    z = torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
    p = torch.sigmoid(z[:, 0])
    expected = -(p[0].log() + (1 - p[1]).log()) / 2
    torch.testing.assert_close(task_loss(z, torch.tensor([1, 0]), "binary"), expected)
    squared = ((0.3 - 0.5) ** 2 + (-1.2 - 1.0) ** 2) / 2
    assert task_loss(z, torch.tensor([0.5, 1.0]), "regression").item() == pytest.approx(squared)
    three = normal(4, 3)
    y = torch.tensor([0, 2, 1, 1])
    expected = -three.log_softmax(1)[torch.arange(4), y].mean()
    torch.testing.assert_close(task_loss(three, y, "multiclass"), expected)


def test_binary_target_is_the_difference_of_the_two_logits():
    logits = normal(6, 2)
    target = teacher_targets(logits, "binary")
    assert target.shape == (6, 1)
    torch.testing.assert_close(torch.sigmoid(target[:, 0]), logits.softmax(1)[:, 1])
    three, one = normal(6, 3), normal(6, 1)
    assert torch.equal(teacher_targets(three, "multiclass"), three)
    assert torch.equal(teacher_targets(one, "regression"), one)


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="a binary teacher with 3 logits"):
        teacher_targets(normal(2, 3), "binary")
    with pytest.raises(ValueError, match=r"student \(4, 1\) and teacher \(4, 2\) differ"):
        distillation_loss(normal(4, 1), normal(4, 2))
    with pytest.raises(ValueError, match="alpha must be in"):
        dse_loss(normal(4, 1), torch.ones(4), normal(4, 1), 1.5, "binary")


@pytest.mark.parametrize("kind", KINDS)
def test_exchanged_logits_stay_with_their_label_and_leave_their_pair(kind):
    targets = (torch.arange(60) % 3).float() if kind != "regression" else torch.randperm(60) / 60.0
    own = torch.stack([torch.arange(60.0), targets], 1)
    moved = exchange_equal(own, targets, kind, seed=0)
    assert sorted(moved[:, 0].tolist()) == own[:, 0].tolist()
    assert (moved[:, 1] - targets).abs().max() <= (9 / 60 + 1e-6 if kind == "regression" else 0)
    assert (moved[:, 0] == own[:, 0]).double().mean() < 0.35
    assert torch.equal(moved, exchange_equal(own, targets, kind, seed=0))
    assert not torch.equal(moved, exchange_equal(own, targets, kind, seed=1))


def test_relative_degradation_is_a_mean_of_ratios():
    assert relative_degradation([0.8, 0.5], [0.6, 0.5]) == pytest.approx(0.125)
    assert relative_degradation([0.9], [0.9]) == 0
    with pytest.raises(ValueError, match="shorter"):
        relative_degradation([0.9, 0.8], [0.9])


# Costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "layers"), [(5, 1), (13, 4)])
def test_encoder_flops_are_those_that_run(bert, tokens, layers):
    states = normal(1, tokens, 8)
    bert.set_attn_implementation("eager")  # the counter does not know the fused one on a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for layer in bert.encoder.layer[:layers]:
            states = layer(states)
    bert.set_attn_implementation("sdpa")
    assert counter.get_total_flops() == encoder_flops(tokens, 8, layers)


def test_head_flops_are_those_that_run():
    head, u, v = PairHead(12, 3, 10), torch.randn(4, 12), torch.randn(7, 12)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head(u[:1], v[:1])
    assert counter.get_total_flops() == head_flops(12, 3, 10)
    with torch.no_grad():
        prepared = head.catalogue(v)
        with FlopCounterMode(display=False) as counter:
            head.score(u, v, prepared)
    encoding = 4 * encoder_flops(9, 4, 2)
    ran = encoding + counter.get_total_flops()
    assert ran == student_flops(4, 7, 9, 4, 2, 3, 3, hidden=10, split=True)


def test_costs_of_the_papers_model():
    assert head_flops(4096, 1) == 2 * (16 * 1024 * 512 + 512)
    cross = cross_flops(10, 1000, 64, 384, 6)
    student = student_flops(10, 1000, 32, 384, 6, 4)
    assert cross == 10_000 * 6 * (24 * 64 * 384**2 + 4 * 64**2 * 384)
    head = 2 * 16 * 384 * 512 + 2 * 512
    assert student == 10 * encoder_flops(32, 384, 6) + 10_000 * head
    projected = student_flops(10, 1000, 32, 384, 6, 4, projection=100)
    once = encoder_flops(32, 384, 6) + 2 * 4 * 384 * 100
    assert projected == 10 * once + 10_000 * head_flops(100, 1)
    both = student_flops(10, 1000, 32, 384, 6, 4, encode_catalogue=True)
    assert both - student == 1000 * encoder_flops(32, 384, 6)
