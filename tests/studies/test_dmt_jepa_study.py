"""The measures of the study of DMT-JEPA, on cases whose answer is known."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from reattend.backbones.trained.dmt_jepa import JepaModels
from reattend.data.scenes import make_scenes
from reattend.studies.dmt_jepa import (
    GRID,
    KINDS,
    SCENES,
    SIZE,
    PatchScenes,
    TargetScores,
    arms_table,
    between_share,
    boundary_patches,
    by_direction,
    by_distance,
    camouflaged,
    choose_decay,
    chosen_by,
    chosen_by_rule,
    effective_rank,
    fit_probe,
    make_targets,
    mean_cosine,
    measure_targets,
    neighbour_accuracy,
    neighbours_grid,
    patch_distance,
    patch_scenes,
    probe_arm,
    published_multiply_adds,
    purity,
    raw_patches,
    scene_accuracy,
    scene_nats,
    similarity_maps,
    table,
    targets_table,
    things_and_labels,
    timed_steps,
    untrained_head_targets,
    untrained_vit,
)
from reattend.studies.dmt_jepa_figures import (
    draw_arms,
    draw_cosines,
    draw_grid,
    draw_kinds,
    draw_masks,
    draw_neighbours,
    draw_pairing,
    draw_scores,
    draw_similarity,
)
from reattend.vision.dmt_jepa import choose_neighbours

PATCHES = GRID**2


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def halves(count=3, colour=None):
    """Scenes whose left half is background and whose right half shows thing 1, of class 5."""
    things = torch.zeros(count, GRID, GRID, dtype=torch.long)
    things[:, :, GRID // 2 :] = 1
    things = things.flatten(1)
    colour = things[..., None].expand(-1, -1, 3).float() if colour is None else colour
    pixels = torch.zeros(count, 3, SIZE, SIZE, dtype=torch.uint8)
    return PatchScenes(pixels, things, 5 * things, colour, {1: colour})


def test_things_and_labels_by_what_covers_a_patch():
    masks = torch.zeros(1, 2, SIZE, SIZE, dtype=torch.bool)
    masks[0, 0, :14, :14] = True  # patch 0, whole
    masks[0, 1, :14, 14:24] = True  # ten columns of patch 1: most, but not .8
    masks[0, 1, 14:28, :13] = True  # thirteen columns of patch 8
    things, labels = things_and_labels(masks, torch.tensor([[4, 0]]))
    assert things[0, [0, 1, 2, 8]].tolist() == [1, 2, 0, 2]
    assert labels[0, [0, 1, 2, 8]].tolist() == [5, -1, 0, 1]


def test_camouflage_keeps_the_background_and_matches_every_object():
    scenes = make_scenes(4, SCENES, split="validation", seed=3)
    found = camouflaged(scenes)
    grey = scenes.pixels.float().mean(1)
    assert torch.equal(found[:, 0], found[:, 2])
    for number in range(4):
        background = ~scenes.masks[number].any(0)
        assert (found[number, 0][background] - grey[number][background]).abs().max() <= 0.51
    means = []
    for number in range(4):
        for mask, box in zip(
            scenes.masks[number], scenes.boxes[number].int().tolist(), strict=True
        ):
            near = torch.zeros(SIZE, SIZE, dtype=torch.bool)
            near[max(0, box[1] - 14) : box[3] + 14, max(0, box[0] - 14) : box[2] + 14] = True
            near &= ~scenes.masks[number].any(0)
            if mask.sum() > 100 and near.sum() > 100:
                before, after = (x[number][mask].mean() for x in (grey, found[:, 0].float()))
                around = grey[number][near].mean()
                means.append(((before - around).abs(), (after - around).abs()))
    before, after = torch.tensor(means).mean(0)
    assert after < 4 < before  # clipping moves a mean by a few grey values


@pytest.mark.parametrize("camouflage", [False, True])
def test_scenes_hold_the_tokens_and_the_colour_of_each_patch(monkeypatch, camouflage):
    def unfolded(pixels):
        return F.unfold(pixels.float(), 14, stride=14).transpose(1, 2)

    def states(model, pixels, layers, size):
        """A class token, then every patch's pixels, shifted by the number of the layer."""
        tokens = F.pad(unfolded(pixels), (0, 0, 1, 0), value=-1.0)
        return torch.stack([tokens.roll(layer, -1) for layer in layers])

    monkeypatch.setattr("reattend.studies.dmt_jepa.hidden_states", states)
    asked = {"split": "validation", "seed": 3}
    found = patch_scenes(
        untrained_vit(0), 3, layers=(2, 5), camouflage=camouflage, batch=2, **asked
    )
    scenes = make_scenes(3, SCENES, **asked)
    wanted = camouflaged(scenes) if camouflage else scenes.pixels
    assert torch.equal(found.pixels, wanted)
    patches = unfolded(wanted)
    for layer in (2, 5):
        normed = F.layer_norm(patches.roll(layer, -1), patches.shape[-1:])
        assert torch.allclose(found.features[layer], normed, atol=1e-5)
    colour = patches.unflatten(-1, (3, -1)).mean(-1) / 255
    assert torch.allclose(found.colour, colour, atol=1e-5)
    assert torch.equal(found.labels, things_and_labels(scenes.masks, scenes.labels)[1])


def test_boundary_patches_are_pure_off_the_border_and_beside_another_thing():
    scenes = halves(1)
    found = boundary_patches(scenes).view(GRID, GRID)
    assert found.sum() == 2 * (GRID - 2)
    assert found[1:-1, 3:5].all()
    mixed = PatchScenes(scenes.pixels, scenes.things, scenes.labels.clone(), scenes.colour, {})
    mixed.labels[0, GRID + 3] = -1
    assert boundary_patches(mixed).sum() == 2 * (GRID - 2) - 1


def test_purity_counts_the_chosen_neighbours_that_show_the_same_thing():
    scenes = halves()

    def pure(scores, k=4):
        return purity(scenes, choose_neighbours(scores, *table(), k)[0])

    # Of eight neighbours five are of the own half, of the four direct ones three.
    assert pure(torch.zeros(3, PATCHES, 8), 8) == pytest.approx([5 / 8] * 3)
    assert pure(by_direction(3)) == pytest.approx([3 / 4] * 3)
    assert pure(by_distance(scenes.colour)) == pytest.approx([1] * 3)
    assert pure(-by_distance(scenes.colour)) == pytest.approx([1 / 4] * 3)


def test_a_scene_without_boundary_patches_has_no_purity():
    scenes = halves(2)
    scenes.things[1] = 0
    found = purity(scenes, choose_neighbours(by_direction(2), *table(), 4)[0])
    assert found[0] == pytest.approx(0.75)
    assert math.isnan(found[1])


def test_direct_neighbours_share_a_side():
    index, _ = choose_neighbours(by_direction(1), *table(), 4)
    middle = 3 * GRID + 4
    assert set(index[0, middle].tolist()) == {middle - GRID, middle - 1, middle + 1, middle + GRID}


def test_kinds_of_targets_are_means_of_what_they_choose():
    tokens, colour = noise(2, PATCHES, 6), noise(2, PATCHES, 3, seed=1)
    middle = 3 * GRID + 4
    beside = [middle + d for d in (-GRID - 1, -GRID, -GRID + 1, -1, 1, GRID - 1, GRID, GRID + 1)]
    assert torch.equal(make_targets("own", tokens, colour), tokens)
    all_eight = make_targets("mean-8", tokens, colour)
    assert torch.allclose(all_eight[0, middle], tokens[0, beside].mean(0), atol=1e-6)
    near = sorted(beside, key=lambda j: (colour[1, j] - colour[1, middle]).norm().item())[:4]
    by_colour = make_targets("colour-4", tokens, colour)
    assert torch.allclose(by_colour[1, middle], tokens[1, near].mean(0), atol=1e-6)
    like = sorted(
        beside, key=lambda j: -torch.cosine_similarity(tokens[1, j], tokens[1, middle], dim=0)
    )
    for k in (1, 4):
        found = make_targets(f"top-{k}", tokens, colour)[1, middle]
        assert torch.allclose(found, tokens[1, like[:k]].mean(0), atol=1e-6)
    with_own = make_targets("top-4 + own", tokens, colour)[1, middle]
    assert torch.allclose(with_own, tokens[1, [*like[:4], middle]].mean(0), atol=1e-6)
    by_chance = [make_targets("random-4", tokens, colour, seed) for seed in (0, 0, 1)]
    assert torch.equal(by_chance[0], by_chance[1])
    assert not torch.allclose(by_chance[0], by_chance[2])


def test_a_rule_chooses_what_its_targets_average():
    tokens, colour = noise(2, PATCHES, 6), noise(2, PATCHES, 3, seed=1)
    scenes = halves(2, colour)
    scenes.features[1] = tokens
    middle = 3 * GRID + 4
    for kind in ("mean-8", "random-4", "direct-4", "colour-4", "top-4"):
        index = chosen_by_rule(scenes, kind, 1)[1, middle]
        target = make_targets(kind, tokens, colour)[1, middle]
        assert torch.allclose(tokens[1, index].mean(0), target, atol=1e-6), kind


def test_untrained_heads_swap_queries_within_batches():
    tokens = noise(4, PATCHES, 64)
    own, swapped = (untrained_head_targets(tokens, 0, s, batch=2) for s in (False, True))
    same = (own - swapped).abs().amax(-1) < 1e-6
    # In batches of two, patch i gets the query of picture i mod 2 of its batch.
    wanted = torch.arange(PATCHES) % 2 == torch.arange(4)[:, None] % 2
    assert torch.equal(same, wanted)
    assert torch.allclose(untrained_head_targets(tokens[:1], 0), own[:1], atol=1e-6)
    assert not torch.allclose(untrained_head_targets(tokens, 1), own, atol=1e-3)


def test_a_similarity_map_is_that_of_its_patch():
    targets = noise(2, PATCHES, 5)
    found = similarity_maps(targets, [9, 30])[1].ravel()
    unit = targets[1] / targets[1].norm(dim=-1, keepdim=True)
    assert found == pytest.approx((unit @ unit[30]).numpy(), abs=1e-6)


def test_the_published_head_costs_more_by_its_own_products():
    plain, with_head = published_multiply_adds(0, batch=4)
    # Target side alone: 196 patches, two blocks of 5 tokens and one query, width 768.
    frozen = 196 * 2 * ((2 * 5 + 2 + 8) * 768**2 + 2 * 5 * 768)
    assert plain + frozen < with_head < 1.25 * plain


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="unknown kind of target 'best-4'"):
        chosen_by("best-4", noise(1, PATCHES, 3), noise(1, PATCHES, 3), 0)


def labelled(count=20, noise_size=0.3, seed=0):
    """Two classes, -1 in between, told apart by the sign of the first of four dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 2, (count, PATCHES), generator=generator)
    tokens = noise_size * torch.randn(count, PATCHES, 4, generator=generator)
    tokens[..., 0] += 2.0 * labels - 1
    return tokens, labels


def test_a_probe_reads_what_is_there_and_decay_makes_it_careful():
    tokens, labels = labelled()
    probe, careful = (fit_probe(tokens, labels, decay, 40, 2) for decay in (1e-3, 10.0))
    there = labels >= 0
    assert scene_accuracy(probe, tokens, labels, there) == pytest.approx(np.full(20, 100.0), abs=2)
    assert scene_nats(probe, tokens, labels).mean() < 0.05
    assert scene_nats(careful, tokens, labels).mean() == pytest.approx(math.log(2), abs=0.05)
    # Standardised inputs: their scale and place do not matter.
    other = fit_probe(50 * tokens + 7, labels, 1e-3, 40, 2)
    assert scene_nats(other, 50 * tokens + 7, labels) == pytest.approx(
        scene_nats(probe, tokens, labels), abs=1e-3
    )


def test_nats_are_those_of_the_labelled_and_wanted_patches():
    tokens, labels = labelled(3, noise_size=1.5)
    probe = fit_probe(tokens, labels, 0.1, 20, 2)
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :10] = True
    chance = probe.logits(tokens).log_softmax(-1)
    for scene, found in enumerate(scene_nats(probe, tokens, labels, wanted)):
        mine = [
            -chance[scene, p, labels[scene, p]].item() for p in range(10) if labels[scene, p] >= 0
        ]
        assert found == pytest.approx(np.mean(mine), rel=1e-5)


def test_the_decay_with_the_fewest_validation_nats_is_chosen():
    train, validation = labelled(1, 2.0), labelled(20, 2.0, seed=1)
    targets, labels = (
        {"train": a, "validation": b} for a, b in zip(train, validation, strict=True)
    )
    decay, probe = choose_decay(targets, labels, (1e-5, 0.1, 30.0), 40)
    nats = {d: scene_nats(fit_probe(*train, d, 40), *validation).mean() for d in (1e-5, 0.1, 30.0)}
    assert decay == min(nats, key=nats.get)
    assert scene_nats(probe, *validation).mean() == pytest.approx(nats[decay], rel=1e-4)


def test_nearest_neighbours_vote():
    bank = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [1.0, 0.05]]])
    votes = torch.tensor([[0, 0, 1, 1, -1]])
    asked = torch.tensor([[[5.0, 1.0], [1.0, 5.0], [1.0, 5.0]]])
    found = neighbour_accuracy(bank, votes, asked, torch.tensor([[0, 1, 0]]), k=2)
    assert found == pytest.approx([200 / 3])


def test_distances_are_a_kings():
    distance = patch_distance()
    assert distance[0, [0, 1, GRID + 1, 3, 3 * GRID + 1]].tolist() == [0, 1, 1, 3, 3]
    assert torch.equal(distance, distance.T)


def test_cosines_by_labels_and_distance():
    labels = halves(1).labels
    targets = torch.zeros(1, PATCHES, 2)
    targets[..., 0] = 1.0
    targets[labels == 5] = torch.tensor([0.5, math.sqrt(0.75)])
    for near in (True, False):
        assert mean_cosine(targets, labels, same=False, near=near) == pytest.approx([0.5])
        assert mean_cosine(targets, labels, same=True, near=near) == pytest.approx([1.0])
    # Two steps apart is neither near nor far.
    labels = torch.full((1, PATCHES), -1)
    labels[0, 0], labels[0, 2] = 0, 1
    assert np.isnan(mean_cosine(targets, labels, same=False, near=True)).all()
    assert np.isnan(mean_cosine(targets, labels, same=False, near=False)).all()


def test_share_of_variance_between_labels():
    labels = halves(2).labels
    targets = (labels > 0).float()[..., None].expand(-1, -1, 3).clone()
    assert between_share(targets, labels) == pytest.approx([1, 1])
    spread = torch.where(torch.arange(PATCHES) % 2 == 0, 1.0, -1.0)[None, :, None]
    # Variance .25 between and 1 within, in each dimension.
    assert between_share(targets + spread, labels) == pytest.approx([0.2, 0.2])
    assert between_share(noise(2, PATCHES, 50), labels) == pytest.approx([1 / 63] * 2, abs=0.01)


def test_effective_rank_of_equal_and_of_single_directions():
    assert effective_rank(noise(200, PATCHES, 6)) == pytest.approx(6, rel=0.01)
    single = noise(3, PATCHES, 1).expand(-1, -1, 5)
    assert effective_rank(single) == pytest.approx(1, rel=0.01)


def test_raw_patches_are_the_pixels_of_their_patch():
    scenes = halves(1)
    scenes.pixels[:, 1, 14:28, 28:42] = 255  # green of patch GRID + 2
    found = raw_patches(scenes)
    assert found.shape == (1, PATCHES, 3 * 49)
    assert found[0, GRID + 2].view(3, 49).sum(1).tolist() == [0, 49, 0]
    assert found.sum() == 49


def test_all_measures_of_a_kind():
    tokens, labels = labelled(12, 0.5)
    scenes = {}
    for number, side in enumerate(("train", "validation", "test")):
        part = halves(4)
        rows = slice(4 * number, 4 * number + 4)
        scenes[side] = PatchScenes(part.pixels, part.things, labels[rows], part.colour, {})
    targets = {side: tokens[4 * n : 4 * n + 4] for n, side in enumerate(scenes)}
    found = measure_targets(targets, scenes, (0.01, 1.0), 20, 3)
    probe = fit_probe(targets["train"], scenes["train"].labels, found.decay, 20)
    assert found.nats == pytest.approx(
        scene_nats(probe, targets["test"], scenes["test"].labels), abs=1e-4
    )
    assert found.accuracy.mean() > 85
    assert found.neighbours.mean() > 85
    assert found.cosine["same", "far"].mean() > 0.5 > found.cosine["different", "far"].mean()
    assert found.between == pytest.approx(between_share(targets["test"], scenes["test"].labels))
    assert found.boundary.shape == (4,)
    assert 1 < found.rank < 4


def test_a_probe_of_an_encoder_reads_its_tokens():
    labels = {side: torch.randint(-1, 3, (8, 4)) for side in ("train", "test")}
    pixels = {side: torch.zeros(8, 1, 2, 2, dtype=torch.uint8) for side in labels}
    for side in pixels:
        pixels[side] = (labels[side] + 1).view(8, 1, 2, 2).to(torch.uint8)

    def one_hot(shown):
        return torch.nn.functional.one_hot(shown.flatten(1).long(), 4).float()

    assert probe_arm(one_hot, pixels, labels, 1e-3, 30, 1) == pytest.approx((100, 100))
    blind = probe_arm(lambda shown: torch.zeros(8, 4, 2), pixels, labels, 1e-3, 30, 1)
    assert blind[0] < 70


def test_timed_steps_move_gradients_and_the_target_side(monkeypatch):
    moved = []

    def watch(model, momentum):
        assert any(p.grad is not None for p in model.encoder.parameters())
        moved.append(model.head is not None)

    monkeypatch.setattr("reattend.studies.dmt_jepa.Jepa.update_targets", watch)
    runs = timed_steps(16, 1)
    for run in runs.values():
        run()
    assert dict(zip(runs, moved, strict=True)) == {"I-JEPA": False, "DMT-JEPA": True}


def test_figures_draw_every_kind():
    picture = np.zeros((3, SIZE, SIZE), np.uint8)
    drawn = draw_masks(picture, torch.arange(5), torch.arange(8).view(2, 4), GRID)
    assert len(drawn.axes) == 3
    draw_neighbours([picture], {"by feature": [[1, 2]], "by colour": [[3, 4]]}, [10], GRID)
    draw_similarity([picture, picture], {"own": [np.zeros((GRID, GRID))] * 2}, [0, 9])
    draw_pairing(np.random.default_rng(0).random((4, PATCHES)))
    values = {kind: np.append(np.random.default_rng(0).random(9), np.nan) for kind in KINDS}
    drawn = draw_kinds({"nats": values, "share": values}, ["less", "more"])
    assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] == list(KINDS)
    rows = {kind: values[kind][:9] for kind in KINDS}
    draw_grid({3: rows, 9: rows}, KINDS)
    losses = {arm: torch.rand(3, 40) for arm in ("I-JEPA", "DMT-JEPA")}
    spreads = {arm: np.ones((3, 5)) for arm in losses}
    draw_arms(losses, spreads, {arm: [1.0, 2.0, 3.0] for arm in losses}, {"pixels": 1.0})
    plt.close("all")


def scored(level):
    """Scores of three scenes about one level; the last has no case."""
    values = np.array([level, level + 1, np.nan])
    pairs = [(same, near) for same in ("same", "different") for near in ("near", "far")]
    cosine = {pair: values + 10 * number for number, pair in enumerate(pairs)}
    return TargetScores(0.1, values, values + 2, values, values, values + 4, cosine, level)


def test_draws_of_a_target_are_averaged():
    table = targets_table({"own": scored(1.0)}, {"untrained": [scored(2.0), scored(4.0)]})
    assert table["target"].tolist() == ["own", "untrained"]
    assert table["nats"].tolist() == [1.5, 3.5]
    assert table["rank"].tolist() == [1, 3]
    assert table["cosine_far_different"].tolist() == [31.5, 33.5]


def test_scores_and_cosines_are_drawn_under_their_names():
    scores = {"own": scored(1.0), "top-4": scored(2.0)}
    figure = draw_scores(scores)
    assert [axis.get_xlabel().split("\n")[1] for axis in figure.axes] == [
        "(less is better)",
        "(less is better)",
        "(more is better)",
    ]
    centres = [axis.lines[1].get_xdata()[0] for axis in figure.axes]
    assert centres == [1.5, 3.5, 5.5]
    figure = draw_cosines(scores)
    labels = [axis.get_xlabel() for axis in figure.axes]
    assert labels[0] == "cosine, same labels, near\n(more is better)"
    assert labels[3] == "cosine, different labels, far\n(less is better)"
    assert figure.axes[3].lines[3].get_xdata()[0] == 32.5
    plt.close("all")


def test_the_grid_trains_a_probe_for_each_layer_and_kind():
    tokens, labels = labelled(8, 0.5)
    scenes = {}
    for number, side in enumerate(("train", "test")):
        part, rows = halves(4), slice(4 * number, 4 * number + 4)
        features = {2: tokens[rows], 5: tokens[rows].flip(0)}
        scenes[side] = PatchScenes(part.pixels, part.things, labels[rows], part.colour, features)
    grid, table = neighbours_grid(scenes, [2, 5], ["own", "top-4"], 0.1, 20)
    assert table["layer"].tolist() == [2, 2, 5, 5]
    assert table["nats"].tolist() == [
        found.mean() for row in grid.values() for found in row.values()
    ]
    train, test = scenes["train"], scenes["test"]
    made = [make_targets("top-4", part.features[2], part.colour) for part in (train, test)]
    probe = fit_probe(made[0], train.labels, 0.1, 20)
    assert grid[2]["top-4"] == pytest.approx(scene_nats(probe, made[1], test.labels), abs=1e-4)
    far = mean_cosine(made[1], test.labels, same=False, near=False)
    assert table["cosine_far_different"][1] == pytest.approx(np.nanmean(far), abs=1e-6)
    assert grid[2]["own"].mean() < grid[5]["own"].mean()  # features of other scenes tell nothing


def test_arms_stand_above_what_needs_no_pretraining():
    arm = "DMT-JEPA"
    losses = torch.cat([torch.ones(2, 30), torch.full((2, 20), 0.25)], dim=1)
    spreads = torch.tensor([[0.9, 0.5], [0.9, 0.7]])
    trained = JepaModels({arm: []}, {arm: losses}, {arm: spreads}, {}, {})
    probes = {arm: np.array([[60.0, 50.0], [70.0, 52.0]])}
    of_targets, wide = {arm: np.array([80.0, 82.0])}, {arm: np.array([0.3, 0.5])}
    table = arms_table(trained, probes, of_targets, wide, {"pixels": (40.0, 30.0)})
    row = table.set_index("arm").loc[arm]
    assert row.tolist() == pytest.approx([65, 60, 70, 51, 81, 0.4, 0.6, 0.25])
    below = table.set_index("arm").loc["pixels"]
    assert below[["patch_probe", "knn"]].tolist() == [40, 30]
    assert below.isna().sum() == 6
