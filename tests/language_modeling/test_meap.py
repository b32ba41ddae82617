"""Oracles of MEAP: what is masked and what is not, its loss and gradients, SFT examples, attention measures."""

import random
from collections import Counter
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from reattend.language_modeling.meap import (
    UNLABELLED,
    attention_variance,
    mask_count,
    mask_inputs,
    mean_attention,
    meap_loss,
    official_seed_cycle,
    random_masks,
    score_decay,
    sft_examples,
    variance_gain,
)
from reattend.trunks.language import FeedForward, Trunk
from reattend.trunks.mixers import SoftmaxAttention

MASK = 11
EXACT = {"rtol": 0, "atol": 1e-12}


def model(seed=0):
    torch.manual_seed(seed)
    mixers = [lambda w: SoftmaxAttention(w, 2)] * 2
    return Trunk(12, 8, mixers, feed_forward=FeedForward, tied=False).double()


def rows(count=5, length=22, seed=0):
    return torch.randint(MASK, (count, length), generator=torch.Generator().manual_seed(seed))


def gradients(loss, net):
    return torch.autograd.grad(loss, list(net.parameters()))


def masks(count, length, ratio=0.15, seed=0):
    return random_masks(count, length, ratio, torch.Generator().manual_seed(seed))


# --- which positions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "ratio", "count"),
    [(21, 0.15, 3), (64, 0.15, 9), (7, 0.15, 1), (5, 0.1, 1), (9, 0.0, 0)],
)
def test_as_many_positions_as_the_paper_masks(length, ratio, count):
    assert mask_count(length, ratio) == count
    assert masks(50, length, ratio).sum(1).eq(count).all()
    assert official_seed_cycle(4, length, ratio, 3).sum(1).eq(count).all()


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_ratios_that_cannot_be_are_refused(ratio):
    with pytest.raises(ValueError, match="must be at least 0 and leave the last one"):
        mask_count(9, ratio)


def test_every_position_but_the_last_is_masked_equally_often():
    share = masks(20_000, 11, 0.3).double().mean(0)
    assert share[-1] == 0
    torch.testing.assert_close(share[:-1], torch.full((10,), 0.3).double(), rtol=0, atol=0.015)


def test_rows_have_masks_of_their_own_and_seeds_repeat_them():
    found = masks(40, 33)
    assert len({tuple(row.tolist()) for row in found}) > 35
    assert torch.equal(found, masks(40, 33))
    assert not torch.equal(found, masks(40, 33, seed=1))


def test_the_official_cycle_shares_its_masks_and_returns_after_51_steps():
    found = [official_seed_cycle(3, 21, 0.15, step) for step in range(102)]
    assert all(torch.equal(x, y) for x, y in zip(found[:51], found[51:], strict=True))
    assert all(torch.equal(x[0], x[2]) for x in found)
    assert len({tuple(x[0].tolist()) for x in found}) > 45
    assert not any(x[:, -1].any() for x in found)
    random.seed(50 + 58 % 51)
    assert found[58][0].nonzero()[:, 0].tolist() == sorted(random.sample(range(20), 3))


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_without_masks_it_is_next_token_prediction_with_the_same_gradients(seed):
    net, tokens = model(seed), rows(seed=seed)
    plain = F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss = meap_loss(net, tokens, masks(5, 21, 0.0), MASK)
    assert torch.equal(loss, plain)
    for mine, theirs in zip(gradients(loss, net), gradients(plain, net), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_is_the_mean_over_all_targets_which_are_never_masked(seed):
    net, tokens, masked = model(seed), rows(seed=seed), masks(5, 21, seed=seed)
    before, total = tokens.clone(), 0.0
    for row, hidden in zip(tokens, masked, strict=True):
        inputs = [MASK if h else t for t, h in zip(row[:-1].tolist(), hidden.tolist(), strict=True)]
        chance = net(torch.tensor([inputs]))[0].log_softmax(-1)
        total -= sum(chance[t, row[t + 1]] for t in range(21))
    torch.testing.assert_close(meap_loss(net, tokens, masked, MASK), total / 105, **EXACT)
    assert torch.equal(tokens, before)


def test_masked_inputs_differ_at_the_masked_positions_alone():
    tokens, masked = rows()[:, :-1], masks(5, 21)
    inputs = mask_inputs(tokens, masked, MASK)
    assert inputs[masked].eq(MASK).all()
    assert torch.equal(inputs[~masked], tokens[~masked])
    assert not tokens.eq(MASK).any()


@pytest.mark.parametrize("ratio", [0.0, 0.15])
def test_the_embedding_of_the_mask_learns_if_and_only_if_something_is_masked(ratio):
    net = model()
    meap_loss(net, rows(), masks(5, 21, ratio), MASK).backward()
    reached = net.tokens.weight.grad.abs().amax(1)
    assert (reached[:MASK] > 1e-6).all()
    assert reached[MASK] > 1e-6 if ratio else reached[MASK] == 0


def test_masked_positions_stay_visible_and_causal():
    net, tokens = model(), rows(1, 12)
    masked = torch.zeros(1, 11, dtype=torch.bool)
    masked[0, 4] = True
    plain, hidden = (net(mask_inputs(tokens[:, :-1], m, MASK)) for m in (~masked & masked, masked))
    assert torch.equal(plain[:, :4], hidden[:, :4])
    assert (plain[:, 4:] - hidden[:, 4:]).abs().amax(-1).min() > 1e-6


# --- fine-tuning examples -------------------------------------------------------------------------


build = partial(sft_examples, mask_id=-1, end_id=-2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_long_answer_gives_a_masked_copy_with_labels_where_it_is_masked(seed):
    prompt, answer = list(range(7)), list(range(100, 173))
    plain, masked = build(prompt, answer, rng=random.Random(seed))
    assert plain.inputs == [*prompt, *answer, -2]
    assert plain.labels == [UNLABELLED] * 7 + [*answer, -2]
    places = [i for i, token in enumerate(masked.inputs) if token == -1]
    assert len(places) == int(0.1 * 73)
    assert min(places) >= 7
    assert max(places) < 80
    assert [i for i, label in enumerate(masked.labels) if label != UNLABELLED] == places
    assert all(masked.labels[i] == plain.inputs[i] for i in places)
    rest = [i for i in range(len(plain.inputs)) if i not in places]
    assert [masked.inputs[i] for i in rest] == [plain.inputs[i] for i in rest]
    assert len(masked.labels) == len(masked.inputs)


def test_every_place_of_the_answer_can_be_masked_and_none_of_the_prompt():
    rng = random.Random(0)
    hits = Counter(
        i
        for _ in range(400)
        for i, label in enumerate(build([1, 2], list(range(10, 70)), rng=rng)[1].labels)
        if label != UNLABELLED
    )
    assert set(hits) == set(range(2, 62))


@pytest.mark.parametrize(("length", "examples"), [(1, 1), (50, 1), (51, 2)])
def test_short_answers_give_one_example(length, examples):
    assert len(build([1], [5] * length, rng=random.Random(0))) == examples


def test_one_place_is_masked_at_least():
    _, masked = build([1], [5] * 3, rng=random.Random(0), longer_than=2)
    assert masked.inputs.count(-1) == 1


def test_what_is_too_long_is_cut_before_places_are_chosen():
    answer = list(range(100, 190))
    plain, masked = build([1, 2, 3], answer, rng=random.Random(0), max_length=44)
    assert plain.inputs == [1, 2, 3, *answer[:40], -2]
    assert len(plain.labels) == len(masked.inputs) == len(masked.labels) == 44
    assert plain.labels[3:] == answer[:41]  # a cut answer is not taught to end
    assert masked.inputs.count(-1) == 4
    assert masked.inputs[-1] == -2
    assert masked.labels[-1] == UNLABELLED
    with pytest.raises(ValueError, match="a prompt of 9 tokens leaves no token of the answer"):
        build(range(9), answer, rng=random.Random(0), max_length=10)


# --- attention ------------------------------------------------------------------------------------


def uniform(count=3, maps=2, length=9):
    seen = torch.ones(length, length).double().tril()
    return (seen / seen.sum(-1, keepdim=True)).expand(count, maps, -1, -1)


def random_maps(seed, count=3, maps=2, length=9):
    scores = torch.randn(
        count, maps, length, length, generator=torch.Generator().manual_seed(seed)
    ).double()
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return (2 * scores).masked_fill(~causal, float("-inf")).softmax(-1)


def test_attention_that_ignores_content_neither_decays_nor_spreads():
    masked = masks(3, 9, 0.3)
    assert score_decay(uniform(), uniform(), masked).item() == 0
    assert variance_gain(random_maps(0), random_maps(0), masked).item() == 0
    torch.testing.assert_close(
        attention_variance(uniform(), ~masked), torch.zeros(()).double(), **EXACT
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_measures_are_the_sums_that_the_paper_names(seed):
    maps, keys = random_maps(seed), masks(3, 9, 0.4, seed)
    pairs = [
        (r, h, t, s)
        for r in range(3)
        for h in range(2)
        for t in range(9)
        for s in range(t + 1)
        if keys[r, s]
    ]
    expected = sum(maps[pair] for pair in pairs) / len(pairs)
    torch.testing.assert_close(mean_attention(maps, keys), expected, **EXACT)
    variances = []
    for r in range(3):
        for h in range(2):
            for t in range(9):
                seen = [maps[r, h, t, s] for s in range(t + 1) if keys[r, s]]
                if len(seen) > 1:
                    variances.append(torch.stack(seen).var(correction=0))
    torch.testing.assert_close(
        attention_variance(maps, keys), torch.stack(variances).mean(), **EXACT
    )


def test_halved_attention_on_the_masked_places_is_a_decay_of_a_half():
    maps, masked = random_maps(4), masks(3, 9, 0.3)
    fallen = maps * (1 - 0.5 * masked.double())[:, None, None]
    torch.testing.assert_close(
        score_decay(maps, fallen, masked), torch.tensor(0.5, dtype=torch.float64), **EXACT
    )
    raised = maps * (1 + 0.1 * (~masked).double())[:, None, None]
    torch.testing.assert_close(
        variance_gain(maps, raised, masked), torch.tensor(0.21, dtype=torch.float64), **EXACT
    )
    assert score_decay(maps, raised, masked).item() == 0
