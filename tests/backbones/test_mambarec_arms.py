"""MambaRec's arms: what a step draws, what each arm changes, and that worlds do not touch each other."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reattend.backbones.trained import mambarec as build
from reattend.backbones.trained.mambarec import (
    ALL_ARMS,
    ARMS,
    FIRST_SEED,
    GRID,
    MEASURES,
    MODALITIES,
    MORE_ARMS,
    OFF,
    TUNED,
    WIDE_ARMS,
    Arm,
    Setting,
    Worlds,
    check,
    chosen,
    clouds,
    fit,
    loss_of,
    make_model,
    permuted,
    scores_of,
    standardised,
    steps,
)
from reattend.data.tastes import Taste
from reattend.recommendation.mambarec import (
    Design,
    Weights,
    info_nce,
    mmd,
    objective,
    occurrences,
)
from reattend.recommendation.ranking import list_scores

TASTE = Taste(users=23, items=31, components=2, counts=(4, 2, 5))
SETTING = Setting(None, TASTE, 2, 2, 1, 1, 2, 1, 37, 6, 2)
TRAINED_ARMS = WIDE_ARMS | ARMS | MORE_ARMS


def catalogue():
    generator = torch.Generator().manual_seed(0)
    return {
        m: torch.randn(44, d, generator=generator)
        for m, d in zip(MODALITIES, (24, 10), strict=True)
    }


def worlds_of(*seeds):
    return Worlds.of(catalogue(), TASTE, seeds)


def test_items_and_unseen_things_share_nothing_and_make_up_the_catalogue():
    tables, worlds = catalogue(), worlds_of(3, 4)
    for world in range(2):
        together = torch.cat([worlds.content["words"][world], worlds.unseen["words"][world]])
        assert together.shape == tables["words"].shape
        assert len(together.unique(dim=0)) == 44
        kept = worlds.world.catalogue[world]
        assert torch.equal(worlds.content["picture"][world], tables["picture"][kept])


def test_an_epoch_meets_every_interaction_once_with_untrained_negatives():
    worlds = worlds_of(3, 4)
    drawn = list(steps(worlds, SETTING, 0))
    assert [d.batch.users.shape[1] for d in drawn] == [37, 37, 18]
    users, positives, negatives = (
        torch.cat([getattr(d.batch, part) for d in drawn], 1)
        for part in ("users", "positives", "negatives")
    )
    for world, trained in enumerate(worlds.world.parts["train"]):
        met = set(zip(users[world].tolist(), positives[world].tolist(), strict=True))
        assert met == set(map(tuple, trained.nonzero().tolist()))
        assert not trained[users[world], negatives[world]].any()
    assert sorted(drawn[0].others[1].tolist()) == list(range(37))
    keep = torch.cat([d.keep for d in drawn])
    assert set(keep.unique().tolist()) == {0.0, 1.25}
    assert keep.mean().item() == pytest.approx(1.0, abs=0.03)


def test_draws_depend_on_seed_and_epoch_alone():
    together, alone = worlds_of(3, 4), worlds_of(4)
    for ours, theirs in zip(steps(together, SETTING, 1), steps(alone, SETTING, 1), strict=True):
        assert torch.equal(ours.batch.negatives[1:], theirs.batch.negatives)
        assert torch.equal(ours.keep[1:], theirs.keep)
    first, second = (next(steps(alone, SETTING, epoch)) for epoch in (0, 1))
    assert not torch.equal(first.batch.users, second.batch.users)


@pytest.mark.parametrize(
    "name", ["MambaRec", "random clouds", "BPR-MF", "LightGCN", "VBPR", "FREEDOM"]
)
def test_a_world_trains_as_it_would_alone(name):
    arm = ALL_ARMS[name]
    (_, together), (_, alone) = (fit(w, arm, SETTING) for w in (worlds_of(3, 4), worlds_of(4)))
    # Adam makes a full step of a gradient that is zero but for rounding, so that MMD differs in the third digit.
    torch.testing.assert_close(together[..., :6][:, 1:], alone[..., :6], rtol=0, atol=1e-4)
    torch.testing.assert_close(together[:, 1:], alone, rtol=0, atol=2e-2, equal_nan=True)
    assert (together[-1, 0] - together[-1, 1])[:6].abs().max() > 0.02
    assert together.shape == (2 * arm.longer + 1, 2, len(MEASURES))


class OneDevice(TorchDispatchMode):
    """Fails at an operation whose tensors lie on several devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        assert len(found) <= 1, f"{func} on {found}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", TRAINED_ARMS)
def test_an_arm_stays_on_the_device_of_its_worlds(name, monkeypatch):
    """On the meta device, which stands in for a GPU."""
    arm, worlds = ALL_ARMS[name], worlds_of(3, 4)
    there = worlds.to("meta")
    assert {t.device.type for t in (*there.content.values(), *there.unseen.values())} == {"meta"}
    # Draws are made from interactions on the CPU and follow the device, which the utility tells.
    readable = replace(worlds, world=replace(worlds.world, utility=there.world.utility))
    with OneDevice():
        drawn = next(steps(readable, SETTING, 0))
        model = make_model(there, arm, SETTING)
        loss = loss_of(model(drawn.keep), drawn, arm, clouds(there, SETTING.width)).sum()
        loss.backward()
        monkeypatch.setattr(build, "list_scores", lambda scores, *_: [scores.mean((1, 2))] * 2)
        found = check(model, there)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert {t.device.type for t in (*model.state_dict().values(), *gradients, found)} == {"meta"}
    assert found.shape == (2, len(MEASURES))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["MambaRec", "random clouds", "permuted features", "LightGCN"])
def test_a_gpu_trains_as_the_cpu_does(name):
    curves = [fit(worlds_of(3, 4).to(d), ALL_ARMS[name], SETTING)[1] for d in ("cpu", "cuda")]
    assert {curve.device.type for curve in curves} == {"cpu"}
    torch.testing.assert_close(*(c[..., :6] for c in curves), rtol=0, atol=1e-2)


def test_losses_of_arms():
    worlds = worlds_of(3, 4)
    drawn, cloud = next(steps(worlds, SETTING, 0)), clouds(worlds, 6)
    weights = Weights(contrast=0.5, align=0.7, bandwidth=1.5)
    arm = Arm(weights=weights)
    model = make_model(worlds, arm, SETTING)
    views = model(drawn.keep)
    batch = drawn.batch
    whole = loss_of(views, drawn, arm, cloud)
    torch.testing.assert_close(whole, objective(views, batch, weights))
    shares = occurrences(batch.positives, 31) / 37
    own = mmd(*views.refined.values(), shares, 1.5)
    apart = [mmd(views.refined[m], cloud[m], shares, 1.5) for m in MODALITIES]
    found = loss_of(views, drawn, replace(arm, align_to="cloud"), cloud)
    torch.testing.assert_close(found, whole - 0.7 * own + 0.35 * (apart[0] + apart[1]))
    found = loss_of(views, drawn, replace(arm, weights=replace(weights, align=0.0)), cloud)
    torch.testing.assert_close(found, whole - 0.7 * own)
    change = loss_of(views, drawn, replace(arm, pairs="permuted"), cloud) - whole
    users, items = batch.users, batch.positives
    sides = [(v[:, :23], v[:, 23:]) for v in (views.side, views.content)]
    expected = 0
    for part, rows in enumerate((users, items)):
        pair = sides[0][part], sides[1][part]
        dealt = info_nce(*pair, rows, rows.gather(1, drawn.others), 0.2)
        expected = expected + dealt - info_nce(*pair, rows, rows, 0.2)
    torch.testing.assert_close(change, 0.5 * expected)


def test_permuted_features_stay_together_and_leave_their_items():
    content = worlds_of(3, 4).content
    found = permuted(content, (3, 4))
    for world in range(2):
        orders = [(found[m][world][:, None] == content[m][world]).all(-1).int() for m in MODALITIES]
        assert torch.equal(orders[0].argmax(1), orders[1].argmax(1))
        assert sorted(orders[0].argmax(1).tolist()) == list(range(31))
        assert orders[0].diagonal().sum() < 6


def test_clouds_have_the_shape_of_a_rectified_layer_and_centres_of_their_own():
    worlds = Worlds.of(catalogue(), TASTE, (3,))
    found = clouds(worlds, 4_000)
    for cloud in found.values():
        assert (cloud >= 0).all()
        assert cloud.eq(0).double().mean().item() == pytest.approx(0.5, abs=0.03)
    centres = torch.stack([c.mean(1)[0] for c in found.values()])
    assert torch.corrcoef(centres)[0, 1].abs() < 0.06


def test_checks_are_made_in_evaluation_mode_on_unseen_things():
    worlds = worlds_of(3, 4)
    model, curve = fit(worlds, Arm(), SETTING)
    assert model.training
    found = check(model, worlds)
    torch.testing.assert_close(found, curve[-1])
    model.eval()
    with torch.no_grad():
        parts, scores = worlds.world.parts, model().scores()
        x, y = (model.refined(m, worlds.unseen[m]) for m in MODALITIES)
    recall, ndcg = list_scores(scores, parts["train"], parts["test"], 20)
    torch.testing.assert_close(found[:, MEASURES.index("R@20")], recall)
    torch.testing.assert_close(found[:, MEASURES.index("N@20")], ndcg)
    apart = mmd(x, y, torch.full((2, 13), 1 / 13), 0.5)
    torch.testing.assert_close(found[:, MEASURES.index("MMD at 0.5")].float(), apart)
    best = scores_of(worlds.world.utility, worlds.world)[:, MEASURES.index("R@20")]
    assert (best > found[:, MEASURES.index("R@20")]).all()


def test_the_check_is_chosen_by_mean_validation_and_never_the_untrained_one():
    curve = torch.zeros(4, 2, len(MEASURES))
    curve[:, 0, 0] = torch.tensor([9.0, 1.0, 4.0, 3.0])
    curve[:, 1, 0] = torch.tensor([9.0, 1.0, 4.0, 5.0])
    curve[..., 4] = torch.arange(4.0)[:, None]
    assert chosen(curve) == 2


def test_features_are_centred_and_of_unit_mean_square():
    found = standardised(3 + 5 * torch.randn(50, 7))
    assert found.mean(0).abs().max() < 1e-5
    assert found.square().mean().item() == pytest.approx(1.0)


def test_arms_differ_from_mambarec_in_what_they_are_named_for():
    plain = TUNED["MambaRec"]
    arms = {name: arm.at(*plain) for name, arm in TRAINED_ARMS.items()}
    whole = arms["MambaRec"]
    changed = {
        name: {f for f in Arm.__dataclass_fields__ if getattr(arm, f) != getattr(whole, f)}
        for name, arm in arms.items()
    }
    assert {name: fields - {"longer"} for name, fields in changed.items()} == {
        "MambaRec": set(),
        "MGCN": {"design", "weights"},
        "no DREAM": {"design"},
        "plain layer": {"design"},
        "no MMD": {"weights"},
        "random clouds": {"align_to"},
        "no CL": {"weights"},
        "permuted pairs": {"pairs"},
        "factor 1": {"design"},
        "permuted features": {"content"},
        "square": {"design"},
        "gates of the figure": {"design"},
        "factor 192": {"design"},
        "MGCN as released": {"design", "weights", "layers"},
        "BPR-MF": {"kind"},
        "LightGCN": {"kind"},
        "VBPR": {"kind"},
        "FREEDOM": {"kind", "layers", "dropped", "features"},
        "FREEDOM, whole graph": {"kind", "layers", "features"},
    }
    assert WIDE_ARMS["plain layer"].design == Design(refine="plain")
    assert WIDE_ARMS["MGCN"].design == OFF
    assert arms["no MMD"].weights == replace(whole.weights, align=0.0)
    assert arms["no CL"].weights == replace(whole.weights, contrast=0.0)
    assert next(iter(GRID.values())) == whole
    for name, arm in GRID.items():
        assert replace(arm, weights=whole.weights) == whole
        assert name == f"MMD {arm.weights.align:g}, s {arm.weights.bandwidth:g}"
    assert len(set(map(repr, GRID.values()))) == 9


def test_arms_have_what_was_tuned_for_them_or_for_mambarec():
    assert set(TUNED) <= set(ALL_ARMS)
    for name, arm in ALL_ARMS.items():
        expected = TUNED.get(name, TUNED["MambaRec"])
        assert (arm.rate, arm.weights.decay, arm.scale) == expected


@pytest.mark.parametrize("name", ["MambaRec", "BPR-MF", "VBPR", "FREEDOM"])
def test_the_scale_is_that_of_the_tables_of_users_and_items_alone(name):
    arm, worlds = ALL_ARMS[name], worlds_of(3)
    whole, small = (
        make_model(worlds, replace(arm, scale=scale), SETTING).state_dict() for scale in (1.0, 0.25)
    )
    for key, value in whole.items():
        factor = 0.25 if key in ("user_table", "item_table") else 1.0
        torch.testing.assert_close(small[key].double(), factor * value.double())


def test_training_stops_after_checks_without_gain(monkeypatch):
    recalls = iter([9.0, 8.0, 1.0, 1.0, 1.0, 1.0, 3.0, 2.0, 2.5, 4.0])

    def checked(model, worlds):
        return torch.full((len(worlds.seeds), len(MEASURES)), next(recalls))

    monkeypatch.setattr(build, "check", checked)
    setting = replace(SETTING, epochs=9)
    curve = fit(worlds_of(3), Arm("bpr"), setting, patience=2)[1]
    assert curve[:, 0, 0].tolist() == [9.0, 8.0, 1.0, 1.0, 1.0, 1.0, 3.0, 2.0, 2.5]
    assert chosen(curve) == 1


def test_few_worlds_are_the_first_ones():
    worlds = worlds_of(3, 4)
    first = worlds.first(1)
    assert first.seeds == (3,)
    assert torch.equal(first.content["words"], worlds.content["words"][:1])
    assert worlds.first(0) is None
    assert worlds.first(5).seeds == (3, 4)


def test_smoke_trains_every_arm(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "stamp_content", lambda limit: catalogue())
    monkeypatch.setitem(
        build.SETTINGS, "smoke", replace(SETTING, worlds=5, seeds=3, few=2, grid=1, together=2)
    )
    made = []
    draw = build.Worlds.of
    monkeypatch.setattr(build.Worlds, "of", lambda *given: made.extend(given[2]) or draw(*given))
    build.build(tmp_path, "smoke")
    assert made == list(range(FIRST_SEED, FIRST_SEED + 5))
    monkeypatch.setattr(build, "backbone_path", lambda *_: tmp_path)
    found = build.load("smoke")
    assert {len(found.curves[name][0]) for name in WIDE_ARMS} == {5}
    assert {len(found.curves[name][0]) for name in ARMS} == {3}
    assert {len(found.curves[name][0]) for name in MORE_ARMS} == {2}
    assert {len(found.curves[name][0]) for name in GRID} == {1}
    assert found.refined["MambaRec"]["words"].shape == (13, 6)
    assert {len(level) for level in found.levels.values()} == {5}
