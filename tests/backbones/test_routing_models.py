"""The build of the Routing Transformer's models: what differs between arms, and reading back."""

from dataclasses import replace

import pytest
import torch

from reattend.backbones.trained import routing_transformer as build
from reattend.backbones.trained.routing_transformer import (
    ARMS,
    SETTINGS,
    logits,
    recall_rows,
    routing_layers,
    untrained,
)
from reattend.trunks.language import same_size

SMALL = replace(SETTINGS["smoke"], seeds=2, close_seeds=3)


def test_arms_differ_in_their_heads_alone():
    models = {arm: untrained(arm, SMALL, 0) for arm in ARMS}
    same_size(models, tolerance=0.07)
    kinds = {
        arm: [(h.near_heads, h.far_heads, h.kind) for h in routing_layers(m)]
        for arm, m in models.items()
    }
    assert kinds == {
        "local": [(4, 0, "routing")] * 2,
        "random": [(2, 2, "random")] * 2,
        "routing": [(2, 2, "routing")] * 2,
        "full": [],
    }


def test_local_heads_cannot_look_further_than_the_reach():
    model = untrained("local", SMALL, 0).double().eval()
    tokens = recall_rows(SMALL, 1, torch.Generator().manual_seed(0))[0]
    moved = []
    for place in range(40):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % (2 * SMALL.keys)
        difference = (logits(model, tokens) - logits(model, changed))[0].abs().amax(-1)
        moved.append(difference.nonzero().max().item() - place)
    assert 0 < max(moved) <= SMALL.reach
    assert max(moved) >= SMALL.reach - SMALL.block  # and not much less


def test_random_sets_are_the_same_in_every_evaluation():
    model = untrained("random", SMALL, 0).eval()
    tokens = recall_rows(SMALL, 9, torch.Generator().manual_seed(0))[0]
    torch.manual_seed(5)
    first, state = logits(model, tokens), torch.get_rng_state()
    torch.testing.assert_close(first, logits(model, tokens), rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())


def test_training_and_reading_back(tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, "smoke", SMALL)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        build.build(tmp_path / name, "smoke")
    monkeypatch.setattr(build, "backbone_path", lambda name, profile: tmp_path / "first")
    models, trace = build.load("smoke")
    assert [len(models[arm]) for arm in ARMS] == [2, 2, 3, 3]
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    assert set(trace.step) == {2, 4}
    parts = trace[trace.arm == "routing"].groupby("what").value
    assert set(parts.groups) == {"accuracy", "smallest", "largest", "in_none"}
    assert set(trace[trace.arm == "full"].what) == {"accuracy"}
    tokens = recall_rows(SMALL, 2, torch.Generator().manual_seed(0))[0]
    for arm in ARMS:
        fresh = logits(untrained(arm, SMALL, 1).eval(), tokens)
        assert not torch.allclose(logits(models[arm][1], tokens), fresh)
    assert models["routing"][0].blocks[0].mixer.mixer.centroids.abs().sum() > 0


@pytest.mark.parametrize("arm", ["full", "local"])
def test_the_curves_show_what_is_learned(arm):
    """Near answers are learned in a few steps when few keys come again at once."""
    setting = replace(SMALL, length=16, pools=(2,), rows=32, steps=150, watch_every=75, block=1)
    _, trace = build._train(arm, setting, 0, "cpu")
    last = [row["value"] for row in trace if row["what"] == "accuracy"][-1]
    assert (last > 0.8) == (arm == "full")
