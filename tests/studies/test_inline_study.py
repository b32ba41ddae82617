"""The measures of the study of InLine attention, on cases whose answer is known."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from reattend.backbones.trained.inline_attention import centred, untrained
from reattend.studies.inline_attention import (
    attention_runs,
    class_logits,
    confused_share,
    confusion_by_layer,
    local_mass,
    local_mass_by_layer,
    nats_and_accuracy,
    neighbours,
    one_length,
    without_neighbours,
    without_others,
)
from reattend.studies.inline_attention_figures import (
    draw_arms,
    draw_collisions,
    draw_confusions,
    draw_learning,
    draw_maps,
    draw_neighbours,
    draw_time,
)
from reattend.vision.inline_attention import DeiTSize, inline_scores

SMALL = DeiTSize(8, 2, 2, 32, 8)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def canvases(count=5):
    return torch.randint(0, 256, (count, 1, 32, 32), dtype=torch.uint8)


@pytest.mark.parametrize("side", [3, 5, 8])
def test_neighbours_of_corners_edges_and_the_rest(side):
    counts = neighbours(side).sum(1).view(side, side)
    assert counts[0, 0] == counts[-1, -1] == 4
    assert (counts[0, 1:-1] == 6).all()
    assert (counts[1:-1, 1:-1] == 9).all()
    assert neighbours(side)[0].nonzero()[:, 0].tolist() == [0, 1, side, side + 1]
    assert torch.equal(neighbours(side), neighbours(side).T)


@pytest.mark.parametrize("side", [5, 8])
def test_masks_hide_as_many_keys_and_never_the_token_itself(side):
    near, others = without_neighbours(side), without_others(side, seed=0)
    assert torch.equal((~near).sum(1), (~others).sum(1))
    assert near.diagonal().all()
    assert others.diagonal().all()
    assert torch.equal(~near, neighbours(side) & ~torch.eye(side**2, dtype=torch.bool))
    assert not (~others & neighbours(side)).any()
    assert (without_others(side, seed=1) != others).any()
    hidden = torch.stack([~without_others(side, seed) for seed in range(40)]).float().mean(0)
    far = ~neighbours(side)
    assert hidden[far].std() < 0.2  # every far key is hidden now and then


def test_local_mass_of_even_and_of_signed_weights():
    even = torch.full((2, 1, 25, 25), 1 / 25, dtype=torch.float64)
    reference = neighbours(5).double().mean().item()
    assert local_mass(even) == pytest.approx(reference)
    own = torch.eye(25).expand(1, 1, 25, 25)
    assert local_mass(own) == pytest.approx(1)
    signed = even.clone()
    signed[..., 24, 0] = -9.0  # far from the last token
    rest = even[0, 0, 24, 1:].sum() + 9
    expected = (25 * reference - 4 / 25 + 4 / 25 / rest) / 25
    assert local_mass(signed) == pytest.approx(expected.item())
    assert local_mass(signed, absolute=False) == pytest.approx(reference)


def test_confused_pairs_are_found_by_what_makes_them():
    k, direction = random(1, 1, 30, 4).abs(), random(1, 1, 20, 4, seed=1).abs()
    q = direction.repeat_interleave(2, 2)
    q[:, :, 1::2] *= 4  # pairs on one ray, apart
    pairs = 40 * 39 / 2
    linear = confused_share(q, k, "linear")
    assert 15 / pairs < linear < 0.2
    assert confused_share(q, k, "inline") < linear / 4
    assert confused_share(q, k, "softmax") < linear / 4
    assert confused_share(one_length(q), k, "linear") < linear / 4
    assert confused_share(q, k, "mean") == 1
    assert confused_share(q, k, "linear", apart=1e9) == 0


def test_one_length():
    q = random(2, 3, 5, 4)
    found = one_length(q)
    lengths = found.norm(dim=-1)
    torch.testing.assert_close(lengths, q.norm(dim=-1).mean(-1, keepdim=True).expand(2, 3, 5))
    assert (torch.cosine_similarity(found, q, dim=-1) > 1 - 1e-12).all()


def test_measures_of_networks_read_every_layer():
    model, pixels = untrained("mean", SMALL, 0).eval(), canvases()
    assert confusion_by_layer(model, pixels) == [100, 100]
    own = untrained("softmax", SMALL, 0).eval()
    assert max(confusion_by_layer(own, pixels)) < 50
    read = own.attention_inputs(centred(pixels))
    expected = [local_mass(block.attn.scores(x)) for block, x in zip(own.blocks, read, strict=True)]
    assert local_mass_by_layer(own, pixels) == pytest.approx(expected)
    flat = untrained("mean", SMALL, 0).eval()
    even = neighbours(4).float().mean().item()
    assert local_mass_by_layer(flat, pixels) == pytest.approx([even, even], rel=1e-5)


def test_logits_and_scores_of_logits():
    model, pixels = untrained("softmax", SMALL, 0).eval(), canvases(7)
    with torch.no_grad():
        whole = model(centred(pixels))
    torch.testing.assert_close(class_logits(model, pixels, batch=3), whole)
    masked = class_logits(model, pixels, without_neighbours(4), batch=3)
    assert (masked - whole).abs().max() > 1e-6
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    nats, accuracy = nats_and_accuracy(logits, torch.tensor([0, 1, 1]))
    assert accuracy == pytest.approx(200 / 3)
    expected = np.mean([np.log1p(np.exp(-2)), np.log1p(np.exp(-1)), np.log1p(np.exp(3))])
    assert nats == pytest.approx(expected, rel=1e-6)


def test_timed_forms_of_inline_agree():
    runs = attention_runs(50, 8, explicit=True)
    torch.testing.assert_close(runs["InLine"](), runs["InLine, N x N"](), atol=1e-5, rtol=1e-5)
    assert runs["softmax"]().shape == (1, 1, 50, 8)
    assert "InLine, N x N" not in attention_runs(50, 8, explicit=False)


def test_figures_draw_every_arm():
    q, k = random(3, 2).abs(), random(4, 2, seed=1).abs()
    drawn = draw_collisions(q, k, {"InLine": inline_scores(q, k)})
    assert len(drawn.axes[1].texts) == 12
    draw_maps(np.zeros((32, 32), np.uint8), {"softmax": random(8, 8)}, (2, 3))
    arms = {"softmax": [1.0, 1.1, 1.2], "InLine, relu": [1.2, 1.3, 1.5]}
    reported = pd.DataFrame({"arm": ["softmax"], "top1": [81.3]})
    drawn = draw_arms(arms, arms, (2.0, 30.0), reported)
    assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] == list(arms)
    draw_learning({"softmax": random(2, 30), "mean": random(2, 30)})
    shares = {arm: np.random.default_rng(0).random((3, 2)) for arm in arms}
    draw_confusions(shares, shares)
    draw_neighbours(shares, 0.1, {arm: (values, values) for arm, values in arms.items()})
    times = {"InLine": ([10, 20], np.ones((2, 3))), "softmax": ([10, 20], np.ones((2, 3)))}
    draw_time(times, pd.DataFrame({"tokens": [10], "speed_up": [2.0]}))
    plt.close("all")
