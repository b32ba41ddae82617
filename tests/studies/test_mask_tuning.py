"""What is asked of mask tuning and its rivals: by hand, on features whose answer is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from reattend.backbones.trained.r_amt import (
    ARMS,
    BASE,
    SETTINGS,
    Run,
    Seed,
    Tuned,
    few_shots,
    hand_prompts,
    learnt_prompts,
    new_masks,
    tune,
    tune_all,
    untrained,
    views_of,
)
from reattend.data.attribute_scenes import NOUNS
from reattend.studies import mask_tuning
from reattend.studies.mask_tuning import (
    DROPOUT,
    Domains,
    Labelled,
    accuracy,
    along_the_path,
    dropout_marks,
    encoded,
    harmonic,
    linear_probe,
    marks,
    masked_marks,
    masks_of,
    one_step,
    rivals,
    shuffled,
    tip_adapter,
    tuned_marks,
    with_dropout,
    zeros_at,
)
from reattend.vision_language.r_amt import pack_bits

SMOKE = SETTINGS["smoke"]


def labelled(per_class, seed, noise=0.4, classes=5, width=12):
    """Pictures around one direction a class, the same directions for all seeds."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(100 + seed)
    labels = torch.arange(classes).repeat(per_class)
    states = centres[labels] + noise * torch.randn(len(labels), width, generator=generator)
    return Labelled(3 * states + 7, F.normalize(states, dim=-1), labels)


@pytest.fixture(scope="module")
def found():
    model = untrained(SMOKE.shape, 0).eval().requires_grad_(False)
    return Seed(0, model, *tune_all(SMOKE, model, 0))


@pytest.fixture(scope="module")
def tests():
    source = SMOKE.shape.objects(96, "test", 0)
    return Domains(source.shifted("striped"), source)


def test_marks_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0], [0.0, 0.5]])
    labels = torch.tensor([0, 1, 1, 1])
    assert accuracy(logits, labels) == 75
    p = [1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(2)), 1 / (1 + np.exp(-0.5))]
    assert marks(logits, labels)["NLL"] == pytest.approx(-np.log(p).mean(), abs=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_linear_probe_finds_classes(seed):
    shots, validation, tested = (labelled(n, 3 * seed + i) for i, n in enumerate((4, 2, 40)))
    logits = linear_probe(shots, validation, tested)
    assert accuracy(logits, tested.labels) > 90
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(len(logits)))


def test_linear_probe_is_the_best_regression_on_validation():
    """On channels standardised by the shots; validation decides between a weak and a strong penalty."""
    shots, validation, tested = (labelled(n, i, noise=1.5) for i, n in enumerate((6, 8, 10)))
    mean, deviation = shots.states.mean(0), shots.states.std(0) + 1e-6
    x, y, z = (((p.states - mean) / deviation).numpy() for p in (shots, validation, tested))
    strengths = (1e-4, 1e-2, 1.0, 100.0)
    fitted = [LogisticRegression(C=c, max_iter=200).fit(x, shots.labels) for c in strengths]
    scores = [probe.score(y, validation.labels) for probe in fitted]
    best = int(np.argmax(scores))
    assert sorted(scores)[-2] < max(scores)
    wanted = torch.from_numpy(fitted[best].predict_log_proba(z)).float()
    found = linear_probe(shots, validation, tested, strengths)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_adapter_takes_the_constants_that_do_best_on_validation():
    shots, validation, tested = (labelled(n, i) for i, n in enumerate((4, 2, 40)))
    classes = F.normalize(labelled(1, 9, 0.0).image.roll(1, 0), dim=-1)
    options = {"steps": 1, "rate": 0.0, "ratios": (10.0, 0.0, 1.0), "sharpnesses": (3.0,)}
    found = tip_adapter(shots, shots, validation, tested, classes, 5.0, **options)
    chosen = tip_adapter(
        shots, shots, validation, tested, classes, 5.0, **options | {"ratios": (10.0,)}
    )
    assert torch.equal(found, chosen)


@pytest.mark.parametrize("helped", [True, False])
def test_keys_are_tuned_where_validation_gains(helped):
    """Keys that lie in the wrong places at first; views are right, or lead astray."""
    shots, validation, tested = (labelled(n, i) for i, n in enumerate((4, 4, 40)))
    views = labelled(8, 3)
    wrong = replace(shots, image=labelled(4, 5, noise=3.0).image.roll(1, 0))
    start = wrong if helped else shots
    seen = views if helped else replace(views, labels=(views.labels + 1) % 5)
    classes = torch.zeros(5, 12)
    options = {"ratios": (3.0,), "sharpnesses": (3.0,)}
    before = tip_adapter(
        start, seen, validation, tested, classes, 5.0, steps=1, rate=0.0, **options
    )
    after = tip_adapter(
        start, seen, validation, tested, classes, 5.0, steps=60, rate=0.05, **options
    )
    scores = accuracy(before, tested.labels), accuracy(after, tested.labels)
    assert scores[1] > scores[0] + 20 if helped else torch.equal(after, before)


def test_adapter_mends_wrong_class_vectors():
    """Class vectors of other classes: zero-shot is wrong, the cache of shots is right."""
    shots, validation, tested = (labelled(n, i) for i, n in enumerate((4, 2, 40)))
    classes = F.normalize(labelled(1, 9, 0.0).image.roll(1, 0), dim=-1)
    zero_shot = accuracy(tested.image @ classes.T, tested.labels)
    logits = tip_adapter(shots, shots, validation, tested, classes, 5.0, steps=20)
    assert zero_shot < 30
    assert accuracy(logits, tested.labels) > 85


def test_adapter_by_hand_before_fine_tuning():
    shots, validation, tested = (labelled(n, i) for i, n in enumerate((2, 2, 6)))
    classes = F.normalize(torch.randn(5, 12, generator=torch.Generator().manual_seed(4)), dim=-1)
    options = {"steps": 1, "rate": 0.0, "ratios": (2.0,), "sharpnesses": (3.0,)}
    found = tip_adapter(shots, shots, validation, tested, classes, 5.0, **options)
    for i, j in ((0, 0), (3, 4)):
        near = [(-3 * (1 - tested.image[i] @ key)).exp() for key in shots.image[shots.labels == j]]
        expected = 5 * tested.image[i] @ classes[j] + 2 * sum(near)
        torch.testing.assert_close(found[i, j], expected)


def test_masks_of_values_and_their_marks(found, tests):
    hand, model = hand_prompts(found.model), found.model
    values = found.tuned[Run("R-AMT", 2).key].values
    masks = masks_of(model, "AMT", values)
    assert all(map(torch.equal, masks.values, values))
    with torch.no_grad():
        image = masks(model.image, tests.target.pixels)[:, 0]
        logits = model.scale * F.normalize(model.image_map(image), dim=-1) @ hand.T
    expected = marks(logits, tests.target.nouns)
    assert masked_marks(model, masks, hand, tests.target) == pytest.approx(expected)
    half = tests.target[tests.target.nouns >= BASE]
    new = masked_marks(model, masks, hand[BASE:], half, BASE)
    known = marks(logits[tests.target.nouns >= BASE][:, BASE:], half.nouns - BASE)
    assert new == pytest.approx(known)


def test_shuffled_masks_keep_their_number(found):
    masks = masks_of(found.model, "AMT", found.tuned[Run("R-AMT", 2).key].values)
    moved = shuffled(masks, 0)
    assert masks.zeros() > 0
    for a, b in zip(masks.bits(), moved.bits(), strict=True):
        assert a.sum() == b.sum()
        assert not torch.equal(a, b) or a.all()


def test_path_and_gain(found, tests):
    values = found.tuned[Run("AMT", 2).key].values
    bits = [torch.ones(v.shape, dtype=torch.bool) for v in values]
    path = [pack_bits(bits)] * 2
    bits[0][:4] = False
    path.append(pack_bits(bits))
    tuned = Tuned(values, torch.stack(path), torch.zeros(2), torch.zeros(2))
    zeros, scores = along_the_path(found.model, "AMT", tuned, tests.target)
    count = sum(v.numel() for v in values)
    assert zeros == pytest.approx([0, 0, 100 * 4 * values[0].shape[1] / count])
    hand = hand_prompts(found.model)
    assert scores[0] == scores[1]
    changed = masks_of(found.model, "AMT", [b.float() for b in bits])
    assert scores[2] == masked_marks(found.model, changed, hand, tests.target)["accuracy"]
    assert zeros_at(np.array([0, 1, 2, 4.0]), np.array([10, 20, 48, 50.0])) == 2
    assert zeros_at(np.array([0, 1, 2, 4.0]), np.array([10, 20, 45, 50.0])) == 4


def test_one_step_is_the_gradient_of_both_losses(found):
    """At the start imitation has no gradient, and the task's is that of cross-entropy and norm."""
    model, run = found.model, Run("R-AMT", 2)
    start = [torch.full_like(v, 0.01) for v in found.tuned[run.key].values]
    fresh = Seed(0, model, {run.key: replace(found.tuned[run.key], values=start)}, found.contexts)
    values, task, old = one_step(SMOKE, fresh, run, "patches.weight")
    assert torch.equal(values, torch.full_like(values, 0.01))
    assert old.abs().max() < 1e-6
    shots, hand = few_shots(SMOKE, 0).shots(2), hand_prompts(model)
    weight = model.image.patches.weight
    try:
        weight.requires_grad_(True)
        logits = model.scale * model.image_tokens(shots.pixels)[:, 0] @ hand.T
        wanted = torch.autograd.grad(F.cross_entropy(logits, shots.nouns), weight)[0]
    finally:
        weight.requires_grad_(False)
    norm = 1e-4 * 0.01 / (0.01 * weight.numel() ** 0.5)
    torch.testing.assert_close(task, wanted * weight + norm, atol=1e-6, rtol=1e-4)
    assert one_step(SMOKE, found, run, "patches.weight")[2].abs().max() > 1e-6


def test_harmonic_mean():
    assert harmonic(60.0, 30.0) == pytest.approx(40)
    assert harmonic(60.0, 0.0) == 0


def test_marks_of_arms_by_hand(found, tests):
    """CoOp's own class vectors, masks under them, shuffled bits, and halves of the classes."""
    rows, split = tuned_marks(SMOKE, found, tests)
    model, most = found.model, SMOKE.few[-1]
    hand, none = hand_prompts(model), new_masks(model, "AMT")
    of = {(row["arm"], row["shots"]): row["NLL"] for row in rows}

    def nats(masks, classes, objects=tests.target):
        return masked_marks(model, masks, classes, objects)["NLL"]

    learnt = learnt_prompts(model, found.contexts[Run("CoOp", most).key])
    assert of["CoOp", most] == pytest.approx(nats(none, learnt))
    both = masks_of(model, "AMT", found.tuned[Run("CoOp + R-AMT", most).key].values)
    assert of["CoOp + R-AMT", most] == pytest.approx(nats(both, learnt))
    own = masks_of(model, "AMT", found.tuned[Run("R-AMT", most).key].values)
    assert of["shuffled", most] == pytest.approx(nats(shuffled(own, 0), hand))
    assert of["shuffled", most] != pytest.approx(nats(own, hand))
    assert rows[0]["NLL"] == pytest.approx(nats(none, hand))
    assert rows[0]["source NLL"] == pytest.approx(nats(none, hand, tests.source))
    halves = {row["arm"]: row for row in split}
    logits = model.scale * model.image_tokens(tests.target.pixels)[:, 0] @ hand.T
    nouns = tests.target.nouns
    base, new = nouns < BASE, nouns >= BASE
    wanted = [
        100 * (logits[base, :BASE].argmax(1) == nouns[base]).double().mean().item(),
        100 * (logits[new, BASE:].argmax(1) == nouns[new] - BASE).double().mean().item(),
    ]
    zero = halves["zero-shot"]
    assert [zero["base"], zero["new"]] == pytest.approx(wanted)
    assert zero["harmonic"] == pytest.approx(harmonic(*wanted))


def test_rivals_see_views_and_choose_on_other_pictures(found, tests, monkeypatch):
    seen = []

    def watched(*pictures, **_):
        seen.append([part for part in pictures if isinstance(part, Labelled)])
        return torch.zeros(len(tests.target), len(NOUNS))

    monkeypatch.setattr(mask_tuning, "linear_probe", watched)
    monkeypatch.setattr(mask_tuning, "tip_adapter", watched)
    setting = replace(SMOKE, few=(2,), full=5)
    rivals(setting, replace(found, seed=4), tests, steps=1)
    drawn = few_shots(setting, 4)
    views, validation = views_of(drawn.shots(2), 4), drawn.validation(2)
    probe, adapter = seen
    wanted = {
        "probe": (probe, (views, validation, tests.target)),
        "adapter": (adapter, (drawn.shots(2), views, validation, tests.target)),
    }
    for name, (given, pictures) in wanted.items():
        for mine, objects in zip(given, pictures, strict=True):
            torch.testing.assert_close(mine.states, encoded(found.model, objects).states)
            assert torch.equal(mine.labels, objects.nouns), name


def test_all_arms_are_marked(found, tests):
    rows, split = tuned_marks(SMOKE, found, tests)
    trained = [(run.arm, run.shots) for run in SMOKE.runs(0) if not run.base]
    wanted = {*trained, ("zero-shot", 0), ("shuffled", 2)}
    assert {(row["arm"], row["shots"]) for row in rows} == wanted
    assert {row["arm"] for row in split} == {"zero-shot", "CoOp", "AMT", "R-AMT", "shuffled"}
    zero = rows[0]
    logits = found.model.scale * found.model.image_tokens(tests.source.pixels)[:, 0]
    logits = logits @ hand_prompts(found.model).T
    assert zero["source accuracy"] == accuracy(logits, tests.source.nouns)
    assert zero["zeros"] == 0
    others = rivals(replace(SMOKE, few=(1, 2)), found, tests, steps=2)
    assert [(row["arm"], row["shots"]) for row in others] == [
        (arm, k) for k in (1, 2) for arm in ("linear probe", "TIP-Adapter")
    ]
    assert len(few_shots(SMOKE, 0).shots(2)) == 2 * len(NOUNS)


def test_lean_seeds_have_their_arms_and_rivals_alone(found, tests):
    lean = replace(found, seed=SMOKE.first + SMOKE.full)
    rows, split = tuned_marks(SMOKE, lean, tests)
    arms = [("R-AMT", 1), ("R-AMT", 2), ("shuffled", 2), ("R-PMT", 1), ("R-PMT", 2)]
    assert [(row["arm"], row["shots"]) for row in rows] == [("zero-shot", 0), *arms]
    assert split == []
    setting = replace(SMOKE, few=(1, 2, 3))
    others = rivals(setting, lean, tests, steps=2)
    assert [row["shots"] for row in others] == [2, 2, 3, 3]


def test_missing_arms_of_dropout_are_trained_as_in_the_build(found):
    """A seed without them gets what a seed of the build has; what is there is taken as it is."""
    own = Run("R-AMT", 2).key
    lean = replace(found, tuned={own: found.tuned[own]})
    full = with_dropout(SMOKE, lean, (1, 2))
    assert set(full.tuned) == {Run(arm, k).key for arm in DROPOUT for k in (1, 2)}
    assert set(lean.tuned) == {own}
    assert full.tuned[own] is found.tuned[own]
    for run in (Run("R-AMT", 1), Run("AMT", 1), Run("AMT", 2), Run("thinned", 2)):
        assert all(map(torch.equal, full.tuned[run.key].values, found.tuned[run.key].values)), run


def test_random_dropping_has_the_share_of_its_own_number_of_shots(found):
    """At both numbers of shots R-AMT's share of dropped entries, step by step, with the same draw."""
    full = with_dropout(SMOKE, found, (1, 2))
    for k in (1, 2):
        wanted = full.tuned[Run("R-AMT", k).key].dropped
        torch.testing.assert_close(
            full.tuned[Run("thinned", k).key].dropped, wanted, atol=0.03, rtol=0
        )
        assert wanted.max() > 0.1
    one, two = (full.tuned[Run("R-AMT", k).key].dropped for k in (1, 2))
    assert (one - two).abs().max() > 0.03
    shots, hand = few_shots(SMOKE, 0).shots(1), hand_prompts(found.model)
    again = tune(found.model, hand, shots, ARMS["thinned"], SMOKE.plan, 0, dropped=one)
    assert all(map(torch.equal, again.values, full.tuned[Run("thinned", 1).key].values))


def test_marks_of_dropout_are_those_of_the_build(found, tests):
    rows = dropout_marks(with_dropout(SMOKE, found, (1, 2)), tests, (1, 2))
    assert [(row["arm"], row["shots"]) for row in rows] == [(a, k) for k in (1, 2) for a in DROPOUT]
    known = {(row["arm"], row["shots"]): row for row in tuned_marks(SMOKE, found, tests)[0]}
    shared = [row for row in rows if (row["arm"], row["shots"]) in known]
    assert len(shared) == 5
    for row in shared:
        assert row == known[row["arm"], row["shots"]]
