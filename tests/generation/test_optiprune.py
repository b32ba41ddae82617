"""Oracles of OptiPrune: closed forms, plain loops, PyTorch's Adam, numbers of the released code of its two parts."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from reattend.generation.optiprune import (
    Descent,
    Scores,
    Shift,
    SimPrune,
    attention_multiply_adds,
    base_tokens,
    best_of,
    conflict,
    divergence_gradient,
    foreground,
    latent_mapper,
    neglect,
    optimise,
    patches,
    selection_multiply_adds,
    stray,
    typicality,
)
from reattend.generation.word_maps import smooth
from reattend.trunks.diffusion import DiffusionShape, DiffusionUNet

SEEDS = (0, 1, 2)
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_maps(seed, batch=3, concepts=2, side=6):
    raw = torch.rand(batch, concepts, side, side, generator=generator(seed), dtype=torch.float64)
    return smooth(raw) * torch.linspace(0.4, 1, concepts, dtype=torch.float64)[:, None, None]


def random_self_maps(seed, batch=3, positions=36):
    logits = torch.randn(
        batch, positions, positions, generator=generator(seed), dtype=torch.float64
    )
    return (2 * logits).softmax(-1)


# Scores ---------------------------------------------------------------------------------------------


def waves(side, concepts, scale):
    """Logits over words, the first of which names nothing; a bump for each concept on a ripple."""
    place = torch.arange(side**2, dtype=torch.float64).reshape(side, side)
    row, column = place // side, place % side
    logits = [torch.full_like(place, 2.0)]
    for k in range(concepts):
        y, x = (1.3 + 1.7 * k) % side, (side - 2.2 - 1.1 * k) % side
        bump = torch.exp(-((row - y) ** 2 + (column - x) ** 2) / 4)
        logits.append(scale * bump + 2 * torch.sin(place * (k + 2) * 0.7) ** 2)
    i = torch.arange(side**2, dtype=torch.float64)
    seen = torch.softmax(
        2 * torch.cos(i[:, None] * 0.9 + i * 0.37 * (1 + i[:, None] / side**2)), -1
    )
    return torch.stack(logits).softmax(0)[None, 1:], seen[None]


@pytest.mark.parametrize(
    ("side", "concepts", "scale", "loss", "cross", "own"),
    [
        (6, 2, 6.0, 0.5251563, 0.1262491, 0.3989072),
        (8, 3, 5.0, 0.6641599, 0.3201895, 0.3439704),
        (16, 2, 4.0, 0.5105854, 0.2632079, 0.2473775),
        (6, 3, 2.0, 0.5397778, 0.5397778, 0.0),
    ],
)
def test_scores_are_those_of_initno_s_released_code(side, concepts, scale, loss, cross, own):
    scores = Scores.of(*waves(side, concepts, scale))
    assert scores.loss.item() == pytest.approx(loss, abs=2e-7)
    assert scores.neglect.item() == pytest.approx(cross, abs=2e-7)
    counted = scores.conflict if scores.neglect <= scores.gate else torch.zeros(1)
    assert counted.item() == pytest.approx(own, abs=2e-7)


@pytest.mark.parametrize("seed", SEEDS)
def test_neglect_is_that_of_the_weakest_concept_in_any_order(seed):
    maps = random_maps(seed, concepts=3)
    expected = [1 - min(m.max().item() for m in row) for row in maps]
    assert neglect(maps).tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(neglect(maps), neglect(maps[:, [2, 0, 1]]))


@pytest.mark.parametrize("seed", SEEDS)
def test_conflict_reads_the_self_attention_of_the_peaks(seed):
    maps, seen = random_maps(seed, concepts=3), random_self_maps(seed)
    expected = []
    for row, own in zip(maps, seen, strict=True):
        at = [smooth(own[m.argmax()].reshape(6, 6)) for m in row]
        pairs = [(at[0], at[1]), (at[0], at[2]), (at[1], at[2])]
        shares = [torch.minimum(a, b).sum() / ((a + b).sum() + 1e-6) for a, b in pairs]
        expected.append((sum(shares) / 3).item())
    assert conflict(maps, seen).tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.allclose(conflict(maps, seen), conflict(maps[:, [1, 2, 0]], seen), **EXACT)


def test_conflict_of_one_peak_is_a_half_and_a_single_concept_has_none():
    maps, seen = random_maps(0), random_self_maps(0)
    assert torch.allclose(
        conflict(maps[:, [0, 0]], seen), torch.full((3,), 0.5).double(), atol=1e-6
    )
    with pytest.raises(ValueError, match="two concepts"):
        conflict(maps[:, :1], seen)


def test_foreground_hangs_together_with_the_peak_by_sides_not_corners():
    # Of the ground the highest value, 2, is the threshold and counts as above: it lies apart.
    drawn = torch.tensor(
        [
            [1, 0, 0, 1, 0, 8],
            [0, 9, 8, 0, 0, 8],
            [0, 1, 8, 1, 0, 0],
            [0, 0, 8, 8, 0, 0],
            [8, 0, 1, 0, 8, 0],
            [8, 0, 0, 0, 0, 2],
        ]
    )
    expected = torch.zeros(6, 6, dtype=torch.bool)
    for place in [(1, 1), (1, 2), (2, 2), (3, 2), (3, 3)]:
        expected[place] = True
    found = foreground((drawn.float() / 10)[None, None])
    assert torch.equal(found[0, 0], expected)


def test_stray_is_the_strongest_response_outside_where_it_exceeds_the_weakest_inside():
    spot = torch.linspace(0, 0.1, 36).reshape(6, 6).repeat(1, 2, 1, 1)
    spot[0, :, 1, 1], spot[0, :, 1, 2] = 0.9, 0.8
    spot[0, 1, 4, 4] = 0.85
    assert stray(spot[:, :1]).item() == 0
    assert stray(spot).item() == pytest.approx(0.85)


def test_the_gate_leaves_conflict_out_of_the_loss_and_puts_closed_candidates_last():
    three = (torch.tensor(v) for v in ([0.3, 0.5, 0.6], [0.2, 0.2, 0.2], [0.1, 0.0, 0.0]))
    scores = Scores(*three)
    assert scores.loss.tolist() == pytest.approx([0.6, 0.7, 0.6])
    assert scores.rank.tolist() == pytest.approx([0.5, 0.7, 1.6])
    assert scores.valid((0.31, 0.21)).tolist() == [True, False, False]
    assert scores.valid((0.31, 0.2)).tolist() == [False] * 3


# LatentMapper ---------------------------------------------------------------------------------------


def toy_scorer(seed, size=7):
    """Scores that are smooth functions of the noise, other for each row of the batch."""
    weights = torch.randn(5, 2, size, generator=generator(seed + 100), dtype=torch.float64)

    def score(noise, rows):
        both = torch.sigmoid(torch.einsum("bcs,bs->bc", weights[rows], noise))
        return Scores(both[:, 0], both[:, 1] / 2, (noise**2).mean(-1) / 50)

    return score


def plain_loop(noise, score, row, how, steps):
    """The released procedure for one noise, with PyTorch's optimiser."""
    log_variance = torch.zeros_like(noise, requires_grad=True)
    mean = torch.zeros_like(noise, requires_grad=True)
    adam = torch.optim.Adam([log_variance, mean], lr=how.rate, eps=how.epsilon)

    def divergence():
        return -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).mean()

    for step in range(steps):
        z = noise * torch.exp(0.5 * log_variance) + mean
        scores = score(z[None], torch.tensor([row]))
        if scores.valid(how.limits).item():
            return z.detach(), True, step
        adam.zero_grad()
        scores.loss.sum().backward()
        adam.step()
        while how.bound is not None and divergence() > how.bound:
            adam.zero_grad()
            divergence().backward()
            adam.step()
    return (noise * torch.exp(0.5 * log_variance) + mean).detach(), False, steps


@pytest.mark.parametrize("bound", [1e-3, 0.02, None])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_batch_moves_as_each_noise_alone_with_torch_s_adam(seed, bound):
    score, how = toy_scorer(seed), Descent((0.45, 0.22), rate=0.05, epsilon=1e-3, bound=bound)
    noise = torch.randn(5, 7, generator=generator(seed), dtype=torch.float64)
    found = optimise(noise, score, how, steps=12)
    alone = [plain_loop(noise[row], score, row, how, 12) for row in range(5)]
    assert torch.allclose(found.noise, torch.stack([z for z, _, _ in alone]), atol=1e-10, rtol=0)
    assert found.valid.tolist() == [valid for _, valid, _ in alone]
    assert found.steps.tolist() == [steps for _, _, steps in alone]
    assert found.passes.tolist() == [steps + valid for _, valid, steps in alone]
    if bound is not None:
        assert (found.shift.divergence() <= bound).all()


def test_the_toy_has_valid_and_invalid_noises():
    how = Descent((0.45, 0.22), rate=0.05)
    noise = torch.randn(5, 7, generator=generator(0), dtype=torch.float64)
    found = optimise(noise, toy_scorer(0), how, steps=12)
    assert len(set(found.steps.tolist())) > 1
    assert found.shift.divergence().max() > 1e-5


def test_a_valid_noise_takes_no_step_and_stays_bit_for_bit():
    noise = torch.randn(3, 4, 5, generator=generator(0))
    low = torch.zeros(3)
    found = optimise(noise, lambda z, rows: Scores(low[rows], low[rows], low[rows]), Descent(), 9)
    assert torch.equal(found.noise, noise)
    assert found.steps.tolist() == [0, 0, 0]
    assert found.passes.tolist() == [1, 1, 1]
    assert found.shift.divergence().tolist() == [0, 0, 0]


def test_a_descent_unless_told_otherwise_is_initno_s():
    released = {"limits": (0.2, 0.3), "rate": 1e-2, "epsilon": 1e-3, "bound": 1e-3}
    assert Descent() == Descent(**released)


def test_a_divergence_that_does_not_come_back_stops_with_the_cure():
    how = Descent((0.0, 0.0), rate=0.5, longest=1)
    noise = torch.randn(5, 7, generator=generator(0), dtype=torch.float64)
    with pytest.raises(RuntimeError, match="lower the rate"):
        optimise(noise, toy_scorer(0), how, 3)


@pytest.mark.parametrize("seed", SEEDS)
def test_divergence_is_torch_s_and_its_gradient_that_of_autograd(seed):
    mean, logs = 0.3 * torch.randn(2, 3, 4, 5, generator=generator(seed), dtype=torch.float64)
    moved = torch.distributions.Normal(mean, torch.exp(logs / 2))
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(moved, prior).mean((1, 2))
    assert torch.allclose(Shift(mean, logs).divergence(), expected, **EXACT)
    values = torch.stack([mean, logs]).requires_grad_()
    [gradient] = torch.autograd.grad(Shift(*values).divergence().sum(), values)
    assert torch.allclose(divergence_gradient(values.detach()), gradient, **EXACT)


def smooth_shift(seed, height=0.3) -> Shift:
    """Spots of a few pixels; the third noise is not moved."""
    rough = torch.randn(2, 3, 3, 16, 16, generator=generator(seed), dtype=torch.float64)
    spots = F.avg_pool2d(F.pad(rough.flatten(0, 1), (2, 2, 2, 2), "circular"), 5, 1)
    mean, logs = (height * spots).unflatten(0, (2, 3))
    mean[2], logs[2] = 0, 0
    return Shift(mean, logs)


def neighbours(field: torch.Tensor) -> torch.Tensor:
    """Correlation of each pixel with the next one of its row."""
    return F.cosine_similarity(field.flatten(1), field.roll(1, -1).flatten(1))


@pytest.mark.parametrize("seed", SEEDS)
def test_random_phases_keep_divergence_spectrum_and_smoothness_and_lose_the_place(seed):
    shift = smooth_shift(seed)
    other = shift.rephased(generator(seed))
    assert torch.allclose(other.divergence(), shift.divergence(), **EXACT)
    assert not other.mean[2].any()
    assert not other.log_variance[2].any()
    was, now = (torch.fft.fft2(s.mean[:2]) for s in (shift, other))
    factor = now.abs().sum((1, 2, 3)) / was.abs().sum((1, 2, 3))
    assert torch.allclose(factor, torch.ones(2).double(), atol=0.03)
    scaled = was * factor[:, None, None, None]
    assert torch.allclose(now.abs(), scaled.abs(), **EXACT)
    # Colours: between channels powers and phases stay.
    assert torch.allclose(now[:, 0] * now[:, 1].conj(), scaled[:, 0] * scaled[:, 1].conj(), **EXACT)
    assert neighbours(shift.mean[:2]).min() > 0.6
    assert torch.allclose(neighbours(other.mean[:2]), neighbours(shift.mean[:2]), **EXACT)
    assert (
        F.cosine_similarity(other.mean[:2].flatten(1), shift.mean[:2].flatten(1)).abs().max() < 0.5
    )
    logs = (shift.log_variance, other.log_variance)
    assert torch.allclose(
        logs[1].mean((1, 2, 3))[:2], factor * logs[0].mean((1, 2, 3))[:2], **EXACT
    )


def test_each_noise_has_phases_of_its_own():
    shift = smooth_shift(0)
    same = Shift(shift.mean[:1].expand(2, -1, -1, -1), shift.log_variance[:1].expand(2, -1, -1, -1))
    other = same.rephased(generator(1))
    assert not torch.allclose(other.mean[0], other.mean[1])


def search_by_hand(candidates, score, row, how, steps, last):
    """InitNO's search for one row of the batch."""
    tried, spent = [], 0
    for noise in candidates[:, row]:
        z, valid, taken = plain_loop(noise, score, row, how, steps)
        spent += taken
        if valid:
            return z, True, spent
        tried.append(
            (
                optimise(
                    noise[None], lambda z, r: score(z, r + row), how, steps
                ).scores.rank.item(),
                noise,
            )
        )
    best = min(tried, key=lambda pair: pair[0])[1]
    z, valid, taken = plain_loop(best, score, row, how, last)
    return z, valid, spent + taken


@pytest.mark.parametrize("seed", SEEDS)
def test_the_search_takes_the_first_valid_candidate_or_starts_the_best_again(seed):
    score, how = toy_scorer(seed), Descent((0.3, 0.2), rate=0.05, bound=0.02)
    candidates = torch.randn(2, 5, 7, generator=generator(seed), dtype=torch.float64)
    found = latent_mapper(candidates, score, how, steps=4, last=9)
    alone = [search_by_hand(candidates, score, row, how, 4, 9) for row in range(5)]
    assert torch.allclose(found.noise, torch.stack([z for z, _, _ in alone]), atol=1e-10, rtol=0)
    assert found.valid.tolist() == [valid for _, valid, _ in alone]
    assert found.steps.tolist() == [steps for _, _, steps in alone]


def test_the_search_s_cases_all_occur():
    how, cases = Descent((0.3, 0.2), rate=0.05, bound=0.02), set()
    for seed in SEEDS:
        candidates = torch.randn(2, 5, 7, generator=generator(seed), dtype=torch.float64)
        found = latent_mapper(candidates, toy_scorer(seed), how, steps=4, last=9)
        for row in range(5):
            start = (candidates[:, row] == found.start[row]).all(-1).nonzero().item()
            cases.add((start, found.steps[row].item() > 8))
    assert cases >= {(0, False), (1, False), (0, True), (1, True)}


def test_best_of_takes_the_noise_of_lowest_rank():
    score = toy_scorer(0)
    candidates = torch.randn(6, 5, 7, generator=generator(3), dtype=torch.float64)
    taken = best_of(candidates, score)
    rows = torch.arange(5)
    ranks = torch.stack([score(noise, rows).rank for noise in candidates])
    assert torch.equal(score(taken, rows).rank, ranks.min(0).values)


# SimPrune -------------------------------------------------------------------------------------------


def tokens(seed, batch=2, side=6, width=5):
    return torch.randn(batch, side**2, width, generator=generator(seed), dtype=torch.float64)


def by_graph(x, ratio, score_noise, side):
    """SiTo's selection for one picture, by the whole graph of similarities and plain loops."""
    graph = F.normalize(x, dim=-1)
    graph = graph @ graph.T
    score = graph.sum(-1) + score_noise * len(x)
    base = []
    for row in range(0, side, 2):
        for column in range(0, side, 2):
            patch = [row * side + column + d for d in (0, 1, side, side + 1)]
            base.append(max(patch, key=lambda i: score[i].item()))
    others = [i for i in range(len(x)) if i not in base]
    others.sort(key=lambda i: -graph[i, base].max().item())
    pruned = others[: int(ratio * len(x))]
    kept = others[len(pruned) :] + base
    return set(kept), {i: max(kept, key=lambda j: graph[i, j].item()) for i in pruned}


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
@pytest.mark.parametrize(("seed", "side"), [(0, 6), (1, 8), (2, 4)])
def test_the_selection_without_a_graph_is_the_one_with_it(seed, side, ratio, noise):
    x = tokens(seed, side=side)
    found = SimPrune(ratio, noise=noise, generator=generator(seed)).select(x)
    drawn = noise * torch.randn(2, side**2, generator=generator(seed)).double()
    for row in range(2):
        kept, source = by_graph(x[row], ratio, drawn[row], side)
        assert set(found.kept[row].tolist()) == kept
        copied = found.kept[row][found.source[row]].tolist()
        assert dict(zip(found.pruned[row].tolist(), copied, strict=True)) == source


@pytest.mark.parametrize("seed", SEEDS)
def test_the_noise_unless_told_otherwise_is_a_tenth_on_the_sum_over_4096_tokens(seed):
    # Tokens so alike that neither no noise nor ten times as much would choose the same.
    x = 1 + 4e-3 * tokens(seed, side=8)
    found = SimPrune(0.5, generator=generator(seed)).select(x)
    drawn = 0.1 / 4096 * torch.randn(2, 64, generator=generator(seed)).double()

    def kept(factor):
        return [by_graph(x[row], 0.5, factor * drawn[row], 8)[0] for row in range(2)]

    assert [set(row) for row in found.kept.tolist()] == kept(1)
    assert kept(0) != kept(1) != kept(10)


@pytest.mark.parametrize("seed", SEEDS)
def test_typicality_is_the_row_mean_of_the_graph(seed):
    unit = F.normalize(tokens(seed), dim=-1)
    assert torch.allclose(typicality(unit), (unit @ unit.mT).mean(-1), **EXACT)


@pytest.mark.parametrize(
    "rule", ["typical", "random", "corner", "typical anywhere", "random anywhere"]
)
def test_kept_and_pruned_part_the_tokens_with_one_base_token_a_patch(rule):
    side, ratio = 8, 0.4
    prune = SimPrune(ratio, rule=rule, generator=generator(0))
    found = prune.select(tokens(0, side=side))
    for row in range(2):
        both = found.kept[row].tolist() + found.pruned[row].tolist()
        assert sorted(both) == list(range(side**2))
        assert len(found.pruned[row]) == int(ratio * side**2)
        base = set(found.kept[row, -(side**2 // 4) :].tolist())
        counts = [
            len(base & set(patch)) for patch in patches(side**2, torch.device("cpu")).tolist()
        ]
        assert sum(counts) == side**2 // 4
        assert (set(counts) == {1}) == (not rule.endswith("anywhere"))


def test_patches_need_a_square_of_even_side():
    for count in (35, 25):
        with pytest.raises(ValueError, match="square grid of even side"):
            patches(count, torch.device("cpu"))


def test_base_rules_pick_what_they_say():
    score = torch.tensor([[0.1, 0.2, 0.9, 0.8, 0.4, 0.3, 0.7, 0.6] + [0.5, 0.0] * 4])
    draw = -score
    cells = patches(16, score.device)

    def chosen(rule):
        return set(base_tokens(score, rule, draw)[0].nonzero().flatten().tolist())

    assert chosen("typical") == {max(c, key=lambda i: score[0, i]) for c in cells.tolist()}
    assert chosen("random") == {max(c, key=lambda i: draw[0, i]) for c in cells.tolist()}
    assert chosen("corner") == {0, 2, 8, 10}
    assert chosen("typical anywhere") == {2, 3, 6, 7}
    assert chosen("random anywhere") == set((-score[0]).topk(4).indices.tolist())


@pytest.mark.parametrize("order", ["similar", "dissimilar"])
def test_the_order_says_which_tokens_go(order):
    x = tokens(0)
    found = SimPrune(0.3, noise=0.0, order=order).select(x)
    graph = F.normalize(x, dim=-1)
    graph = graph @ graph.mT
    for row in range(2):
        base = found.kept[row, -9:]
        nearest = graph[row][:, base].max(-1).values
        gone, spared = nearest[found.pruned[row]], nearest[found.kept[row, :-9]]
        if order == "similar":
            assert gone.min() >= spared.max()
        else:
            assert gone.max() <= spared.min()


def test_random_order_and_random_rules_follow_their_generator():
    x = tokens(0)
    for options in ({"order": "random"}, {"rule": "random"}, {"rule": "random anywhere"}):
        drawn = [
            SimPrune(0.4, noise=0.0, generator=generator(seed), **options)
            .select(x)
            .pruned.sort()
            .values
            for seed in (0, 0, 1)
        ]
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])


def test_much_noise_makes_every_token_of_a_patch_a_base_token_equally_often():
    x = tokens(0, batch=1, side=4)
    prune = SimPrune(0.5, noise=100.0, generator=generator(0))
    counts = torch.zeros(16)
    for _ in range(2000):
        counts[prune.select(x).kept[0, -4:]] += 1
    assert (counts / 2000 - 0.25).abs().max() < 0.04


def test_no_noise_is_deterministic_and_chance_needs_a_generator():
    x = tokens(1)
    first, second = (SimPrune(0.5, noise=0.0).select(x) for _ in range(2))
    assert torch.equal(first.kept, second.kept)
    for options in ({}, {"noise": 0.0, "rule": "random"}, {"noise": 0.0, "order": "random"}):
        with pytest.raises(ValueError, match="generator"):
            SimPrune(0.5, **options)
    with pytest.raises(ValueError, match=r"\.75"):
        SimPrune(0.8, noise=0.0)


def test_recovery_puts_kept_tokens_back_and_copies_to_the_others():
    x = tokens(2)
    found = SimPrune(0.5, noise=0.0).select(x)
    whole = found.recovered(found.of(x))
    for row in range(2):
        assert torch.equal(whole[row][found.kept[row]], x[row][found.kept[row]])
        sources = found.kept[row][found.source[row]]
        assert torch.equal(whole[row][found.pruned[row]], x[row][sources])


def test_copies_come_from_base_tokens_alone_when_asked():
    x = tokens(3, side=8)
    spared = 64 - 16 - int(0.4 * 64)
    base = SimPrune(0.4, noise=0.0, copy="base").select(x)
    kept = SimPrune(0.4, noise=0.0).select(x)
    assert (base.source >= spared).all()
    assert (kept.source < spared).any()
    assert torch.equal(base.kept, kept.kept)


def test_merging_averages_each_kept_token_with_those_that_copy_it():
    x = tokens(4)
    found = SimPrune(0.6, noise=0.0, copy="base", merge=True).select(x)
    merged = found.merged(x)
    for row in range(2):
        for place, token in enumerate(found.kept[row].tolist()):
            members = [token, *found.pruned[row][found.source[row] == place].tolist()]
            assert torch.allclose(merged[row, place], x[row, members].mean(0), **EXACT)


# In a UNet ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    model = DiffusionUNet(
        DiffusionShape(9, 5, side=16, width=8, heads=2, text_width=8, group=4)
    ).double()
    for parameter in model.parameters():  # branches start silent
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def velocity(model, x, hooks):
    text = model.encode(torch.tensor([[1, 2, 3, 4, 0]]).expand(len(x), -1))
    return model(x, torch.full((len(x),), 0.8, dtype=x.dtype), text, hooks)


def pictures(seed):
    return torch.randn(2, 3, 16, 16, generator=generator(seed), dtype=torch.float64)


@torch.no_grad()
def test_nothing_pruned_changes_nothing_and_much_pruned_more(unet):
    x, fine = pictures(0), unet.blocks_of_side(8)
    plain = velocity(unet, x, SimPrune(0.0, noise=0.0).hooks(()))
    assert torch.equal(velocity(unet, x, SimPrune(0.0, noise=0.0).hooks(fine)), plain)
    errors = [
        (velocity(unet, x, SimPrune(ratio, noise=0.0).hooks(fine)) - plain).abs().mean().item()
        for ratio in (0.0, 0.2, 0.7)
    ]
    assert all(less < more for less, more in pairwise(errors))


@torch.no_grad()
def test_only_the_named_blocks_are_pruned_and_only_their_self_attention(unet):
    seen = {}
    hooks = SimPrune(0.5, noise=0.0).hooks(
        unet.blocks_of_side(8),
        lambda name, kind, weights: seen.update({(name, kind): weights.shape[-2:]}),
    )
    velocity(unet, pictures(0), hooks)
    assert seen["down8", "self"] == (32, 32)
    assert seen["up8", "cross"] == (64, 5)
    assert seen["mid4", "self"] == (16, 16)


def test_equal_tokens_pruned_are_as_good_as_all():
    layer = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.randn(1, 1, 8, generator=generator(0), dtype=torch.float64).expand(2, 36, 8)
    found = SimPrune(0.5, noise=0.0).select(x)
    part = found.of(x)
    assert torch.allclose(found.recovered(layer(part, part, part)[0]), layer(x, x, x)[0], **EXACT)


def test_pruned_duplicates_are_made_up_for_by_their_number_in_the_keys():
    distinct = torch.randn(2, 9, 8, generator=generator(0), dtype=torch.float64)
    grid = torch.arange(36).reshape(6, 6)
    patch = (grid // 6 // 2) * 3 + (grid % 6) // 2
    x = distinct[:, patch.flatten()]  # the four tokens of a patch are one
    found = SimPrune(0.75, noise=0.0).select(x)
    part, counts = found.of(x), torch.tensor(4.0).double()
    attended = F.scaled_dot_product_attention(part, part, part, torch.full((9, 9), counts.log()))
    assert torch.allclose(
        found.recovered(attended), F.scaled_dot_product_attention(x, x, x), **EXACT
    )


# Cost -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "width", "ratio"), [(6, 5, 0.5), (8, 12, 0.3), (12, 7, 0.7)])
def test_multiply_adds_are_those_that_torch_counts(side, width, ratio):
    count, x = side**2, tokens(0, batch=1, side=side, width=width)
    with FlopCounterMode(display=False) as counter:
        SimPrune(ratio, noise=0.0).select(x)
    assert counter.get_total_flops() == 2 * selection_multiply_adds(count, width, ratio)

    def attend(rows):
        q, k, v, out = torch.randn(4, width, width, dtype=torch.float64)
        weights = ((rows @ q) @ (rows @ k).mT).softmax(-1)
        return (weights @ (rows @ v)) @ out

    with FlopCounterMode(display=False) as counter:
        attend(x)
    assert counter.get_total_flops() == 2 * attention_multiply_adds(count, width)


def test_a_sum_of_many_similarities_in_half_precision_has_no_place_for_the_noise():
    """SiTo's sums over 4,096 tokens lie hundreds high in half precision, where neighbours are .5 or more apart."""
    total = torch.tensor(1500.0, dtype=torch.float16)
    assert total + torch.tensor(0.1, dtype=torch.float16) == total
