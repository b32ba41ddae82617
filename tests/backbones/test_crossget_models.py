"""CrossGET's arms: equal starts and orders, equal numbers of tokens, and placebos that take the idea away."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from reattend.backbones.trained import crossget
from reattend.backbones.trained.crossget import (
    ARMS,
    SETTINGS,
    Reduced,
    arm_of,
    build,
    fine_tune,
    paired,
    random_matching,
    shuffled_importance,
    twin_batches,
    untrained,
)
from reattend.vision_language.crossget import (
    TokenEnsemble,
    bipartite_matching,
    complete_graph_matching,
    guided_importance,
    similarities,
)

SMOKE, CPU = SETTINGS["smoke"], SETTINGS["cpu"]


def left_after(arm, model, pixels):
    """Tokens after every block of the image tower."""

    class Counting(TokenEnsemble):
        def between(self, layer, x, heads):
            x = super().between(layer, x, heads)
            counts.append(x.shape[1])
            return x

    counts, reduction = [], arm.reduction
    cross = Reduced(model, arm).cross
    hooks = Counting(
        reduction.image,
        cross=None if cross is None else cross.image,
        match=reduction.match,
        importance=reduction.importance,
    )
    model.image(pixels, hooks)
    return counts


def test_merged_arms_have_equally_many_tokens_after_every_block():
    model, pixels = untrained(CPU.shape, 0), CPU.pictures(2, "test", 0).pixels
    counts = {name: left_after(arm_of(name, CPU, 0), model, pixels) for name in ARMS}
    for name in ("random pairs", "ToMe", "CGSM", "CrossGET", "own guide", "shuffled"):
        assert counts[name] == [22, 12, 7, 5], name
    assert counts["dense"] == [37] * 4
    assert counts["text"] == [38] * 4
    assert counts["both"] == counts["CrossGET"]
    assert counts["half as many"] == [30, 22, 14, 8]


def test_arms_are_what_they_are_called():
    arms = {name: arm_of(name, CPU, 0) for name in ARMS}
    assert arms["ToMe"].reduction.match is bipartite_matching
    assert arms["CGSM"].reduction.match is complete_graph_matching
    assert arms["CGSM"].reduction.importance is None
    assert arms["CrossGET"].reduction.importance is guided_importance
    assert arms["own guide"].reduction == arms["CrossGET"].reduction
    assert (arms["own guide"].weight, arms["CrossGET"].weight) == (0.0, 0.5)
    for name, arm in arms.items():
        assert arm.reduction.text == ((1,) * 4 if name in ("text", "both") else (0,) * 4), name


def test_arms_of_a_seed_start_alike_and_only_crossget_moves_its_offsets():
    base, pairs = untrained(SMOKE.shape, 0), paired(SMOKE.pictures(24, "train", 0))
    start = {name: p.clone() for name, p in base.state_dict().items()}
    first, losses = fine_tune("dense", base, SMOKE, pairs, 0)
    _, same = fine_tune("dense", base, SMOKE, pairs, 0)
    assert torch.equal(losses, same)
    assert all(torch.equal(p, start[name]) for name, p in base.state_dict().items())
    assert not torch.equal(first.model.image_map.weight, base.image_map.weight)
    guided, _ = fine_tune("CrossGET", base, SMOKE, pairs, 0)
    assert guided.cross.image.abs().max() > 0
    assert guided.cross.text.abs().max() > 0
    own, _ = fine_tune("own guide", base, SMOKE, pairs, 0)
    assert own.cross.image.abs().max() == own.cross.text.abs().max() == 0
    assert first.cross is None


def test_seeds_have_orders_of_their_own():
    base, pairs = untrained(SMOKE.shape, 0), paired(SMOKE.pictures(24, "train", 0))
    one, other = (fine_tune("dense", base, SMOKE, pairs, seed)[1] for seed in (0, 1))
    assert not torch.equal(one, other)


def test_offsets_learn_at_a_rate_of_their_own():
    """Adam's first step moves every entry by its rate: the cosine's second step is half as long."""
    base, pairs = untrained(SMOKE.shape, 0), paired(SMOKE.pictures(24, "train", 0))
    one = replace(SMOKE, steps=1)
    for offsets in (1.0, 7.0):
        found, _ = fine_tune("CrossGET", base, replace(one, offsets=offsets), pairs, 0)
        moved = found.cross.image.abs().max().item()
        assert moved == pytest.approx(offsets * one.plan().rate(0), rel=1e-3)


def test_batches_hold_both_twins():
    batch = next(twin_batches(20, 8, 0))
    assert len(set(batch.tolist())) == 8
    assert (batch[::2] % 2 == 0).all()
    assert torch.equal(batch[::2] + 1, batch[1::2])


def test_random_matching_takes_no_part_of_the_protected_and_has_no_liking():
    """Every free token is a source, and a destination, about equally often; similarity plays no part."""
    batch, length = 4000, 8
    keys = torch.randn(1, length, 4, generator=torch.Generator().manual_seed(0)).expand(
        batch, -1, -1
    )
    protected = torch.zeros(batch, length, dtype=torch.bool)
    protected[:, 0] = protected[:, -1] = True
    found = random_matching(torch.Generator().manual_seed(1))(
        similarities(keys, protected), 3, None
    )
    for chosen in (found.sources, found.destinations):
        counts = torch.bincount(chosen.flatten(), minlength=length)
        assert counts[0] == counts[-1] == 0
        assert (counts[1:-1] / (batch * 3) - 1 / 6).abs().max() < 0.01


def test_shuffled_importance_has_the_same_values_elsewhere():
    generator = torch.Generator().manual_seed(0)
    guide, keys = torch.randn(5, 6), torch.randn(5, 20, 6)
    plain = guided_importance(guide, keys)
    found = shuffled_importance(generator)(guide, keys)
    assert torch.equal(found.sort(1).values, plain.sort(1).values)
    assert torch.equal(found[:, [0, -1]], plain[:, [0, -1]])
    assert ((found != plain).double().mean(1) > 0.5).all()
    assert not torch.equal(shuffled_importance(generator)(guide, keys), found)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_gives_unit_vectors(name):
    pairs = paired(SMOKE.pictures(6, "test", 0))
    with torch.no_grad():
        vectors = Reduced(untrained(SMOKE.shape, 1), arm_of(name, SMOKE, 1))(pairs)
    for side in (vectors.image, vectors.text):
        torch.testing.assert_close(side.norm(dim=1), torch.ones(6))


def test_build_can_be_read_again(tmp_path, monkeypatch):
    build(tmp_path, "smoke")
    monkeypatch.setattr(crossget, "backbone_path", lambda name, profile: tmp_path)
    trained = crossget.load("smoke")
    assert {name: len(found) for name, found in trained.arms.items()} == SMOKE.arms
    assert trained.losses["dense"].shape == (3, SMOKE.steps)
    for seed, towers in enumerate(trained.towers):
        pairs = paired(SMOKE.pictures(2 * SMOKE.twos, "train", seed))
        again = crossget.train_towers(SMOKE, pairs, seed)
        assert torch.equal(again.text_map.weight, towers.text_map.weight)
        assert not torch.equal(again.text_map.weight, untrained(SMOKE.shape, seed).text_map.weight)
    started, ended = (m[1] for m in (trained.towers, trained.arms["ToMe"]))
    assert not torch.equal(started.text_map.weight, ended.model.text_map.weight)
    found = load_file(tmp_path / "CrossGET-2.safetensors")
    assert torch.equal(trained.arms["CrossGET"][2].cross.image, found["cross.image"])
