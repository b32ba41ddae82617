"""Simulated tastes: what is drawn, by what, and that the parts are apart."""

from dataclasses import replace

import pytest
import torch

from reattend.data.tastes import PARTS, Taste, draw_world, principal_scores, stack

SMALL = Taste(users=40, items=31, components=3, counts=(4, 2, 5))


def catalogue(things=53, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {m: torch.randn(things, d, generator=generator) for m, d in (("a", 9), ("b", 7))}


def drawn(taste, seeds, features=None):
    features = features or catalogue()
    return stack([draw_world(features, taste, seed) for seed in seeds])


def test_parts_are_disjoint_and_of_the_wanted_size():
    world = drawn(SMALL, range(3))
    for part, count in zip(PARTS, SMALL.counts, strict=True):
        assert (world.parts[part].sum(-1) == count).all()
    assert sum(world.parts[part].int() for part in PARTS).max() == 1
    assert all(len(set(row.tolist())) == SMALL.items for row in world.catalogue)


def test_a_seed_is_a_world():
    features = catalogue()
    one, again, other = (draw_world(features, SMALL, seed) for seed in (1, 1, 2))
    assert torch.equal(one.utility, again.utility)
    assert torch.equal(one.parts["train"], again.parts["train"])
    assert not torch.equal(one.catalogue, other.catalogue)


@pytest.mark.parametrize("seed", range(3))
def test_principal_scores_are_those_of_the_covariance(seed):
    table = catalogue(seed=seed)["a"].double()
    found = principal_scores(table, 3)
    centred = table - table.mean(0)
    vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :3]
    expected = centred @ vectors
    expected = expected / expected.square().mean(0).sqrt()
    torch.testing.assert_close(found.abs(), expected.abs(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.T @ found / 53, torch.eye(3).double(), rtol=0, atol=1e-10)


def test_utility_has_the_wanted_spread():
    """Variance of a user's own taste, and of popularity, over many users and items."""
    features = catalogue(900)
    taste = Taste(users=700, items=800, components=4, popularity=0.0, counts=(4, 2, 5))
    assert drawn(taste, range(3), features).utility.std().item() == pytest.approx(1.6, rel=0.05)
    common = replace(taste, appeal=0.0, popularity=0.7)
    utility = drawn(common, range(3), features).utility
    assert utility.std(1).max() < 1e-6
    assert utility[:, 0].std().item() == pytest.approx(0.7, rel=0.08)


@pytest.mark.parametrize("shown", [0.0, 0.5, 1.0])
def test_features_show_the_wanted_share_of_taste(shown):
    """Share of the variance of an item's utility over users that a regression on principal scores explains."""
    features = catalogue(900)
    taste = Taste(users=300, items=800, components=4, shown=shown, popularity=0.0, counts=(4, 2, 5))
    world = draw_world(features, taste, 0)
    scores = [principal_scores(table, 4)[world.catalogue] for table in features.values()]
    design = torch.cat([*scores, torch.ones(800, 1)], 1)
    fitted = design @ torch.linalg.lstsq(design, world.utility.T).solution
    explained = 1 - (world.utility.T - fitted).var() / world.utility.var()
    assert explained.item() == pytest.approx(shown, abs=0.05)


def test_choices_follow_utility_as_much_as_noise_allows():
    exact = drawn(replace(SMALL, noise=1e-9), [0])
    chosen = sum(exact.parts[part].int() for part in PARTS).bool()
    best = exact.utility.topk(11, dim=-1).indices
    assert chosen.gather(-1, best).all()
    # One item of two is chosen by a logistic function of the difference in utility (Gumbel noise).
    pair = Taste(users=20_000, items=2, components=1, noise=0.5, counts=(1, 0, 0))
    world = draw_world(catalogue(), pair, 3)
    gap = (world.utility[:, 0] - world.utility[:, 1]) / 0.5
    share = world.parts["train"][:, 0].double().mean()
    assert share.item() == pytest.approx(torch.sigmoid(gap).mean().item(), abs=0.012)


def test_the_split_does_not_follow_utility():
    world = drawn(replace(SMALL, users=2_000), [0])
    means = [world.utility[world.parts[part]].mean().item() for part in PARTS]
    assert means == pytest.approx([sum(means) / 3] * 3, abs=0.05)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="catalogue of 53"):
        draw_world(catalogue(), replace(SMALL, items=54), 0)
    with pytest.raises(ValueError, match="cannot choose 40 of 31"):
        draw_world(catalogue(), replace(SMALL, counts=(30, 5, 5)), 0)
    with pytest.raises(ValueError, match="need more items"):
        principal_scores(torch.randn(5, 9), 5)
