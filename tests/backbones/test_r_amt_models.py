"""The small CLIP and what is tuned on it: equal starts, frozen weights, placebos by their definition."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from reattend.backbones.trained import r_amt
from reattend.backbones.trained.r_amt import (
    ARMS,
    BASE,
    LEAN,
    SETTINGS,
    VIEWS,
    Contexts,
    OneToken,
    Run,
    build,
    few_shots,
    hand_prompts,
    learnt_prompts,
    masked_features,
    new_masks,
    pretrain,
    read_captions,
    read_pictures,
    tune,
    tune_all,
    tune_contexts,
    untrained,
    views_of,
    zeros_of,
)
from reattend.data.attribute_scenes import NOUNS, VOCABULARY, caption_ids
from reattend.data.shifted_objects import jittered
from reattend.trunks.encoders import index_batches
from reattend.trunks.image_text import last_words
from reattend.vision_language.r_amt import PLACES, THRESHOLD, pack_bits, weights_in

SMOKE = SETTINGS["smoke"]


@pytest.fixture(scope="module")
def model():
    return untrained(SMOKE.shape, 0).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def shots():
    return few_shots(SMOKE, 0).shots(2)


def test_draws_are_nested_and_apart():
    drawn = few_shots(SMOKE, 0)
    one, two, base = drawn.shots(1), drawn.shots(2), drawn.shots(2, base=True)
    assert one.nouns.tolist() == list(range(len(NOUNS)))
    assert torch.equal(two.pixels[::2], one.pixels)
    assert torch.equal(base.pixels, two.pixels[: 2 * BASE])
    assert base.nouns.unique().tolist() == list(range(BASE))
    validation = drawn.validation(2)
    assert torch.equal(validation.nouns, two.nouns)
    distances = torch.cdist(validation.pixels.flatten(1).float(), two.pixels.flatten(1).float())
    assert (distances > 1).all()
    assert not torch.equal(few_shots(SMOKE, 1).shots(2).pixels, two.pixels)


def test_shots_are_shifted_pictures_that_pretraining_has_not_seen():
    plain = few_shots(replace(SMOKE, domain="source"), 0).shots(2)
    assert torch.equal(few_shots(SMOKE, 0).shots(2).pixels, plain.shifted("striped").pixels)
    seen = SMOKE.shape.objects(SMOKE.pictures, "train", 0).pixels.flatten(1).float()
    assert (torch.cdist(plain.pixels.flatten(1).float(), seen) > 1).all()


def test_views_are_moved_or_mirrored_shots(shots):
    views = views_of(shots, 0)
    assert len(views) == VIEWS * len(shots)
    assert torch.equal(views.nouns, shots.nouns.repeat(VIEWS))
    same = (views.pixels == shots.pixels.repeat(VIEWS, 1, 1, 1)).flatten(1).all(1)
    assert same.double().mean() < 0.2
    assert not torch.equal(views_of(shots, 1).pixels, views.pixels)


def test_hand_prompts_are_the_mean_over_colours(model):
    found = hand_prompts(model)
    for noun in (0, 7):
        ids, mask = caption_ids(torch.arange(6)[:, None], torch.full((6, 1), noun))
        mean = last_words(model.text_tokens(ids), mask).mean(0)
        torch.testing.assert_close(found[noun], mean / mean.norm())


def test_contexts_of_a_word_are_that_word(model):
    """One vector that is the embedding of "blue" says "blue" and the noun."""
    contexts = Contexts(1, SMOKE.shape.width, seed=0)
    contexts.vectors.data = model.text.words[[VOCABULARY.index("blue")]]
    ids, mask = caption_ids(torch.full((len(NOUNS), 1), 2), torch.arange(len(NOUNS))[:, None])
    expected = last_words(model.text_tokens(ids), mask)
    torch.testing.assert_close(contexts(model), expected)
    torch.testing.assert_close(learnt_prompts(model, contexts.vectors.detach()), expected)
    longer = Contexts(3, SMOKE.shape.width, seed=0)
    assert (longer(model) - contexts(model)).abs().max() > 1e-3


def test_contexts_learn_and_the_model_stays(model, shots):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = replace(SMOKE.plan, context_steps=100, context_rate=0.05)
    with torch.no_grad():
        image = model.image_tokens(shots.pixels)[:, 0]

        def nats(contexts):
            logits = model.scale * image @ contexts(model).T
            return F.cross_entropy(logits, shots.nouns).item()

        start = nats(Contexts(2, SMOKE.shape.width, 5))
    learnt = tune_contexts(model, shots, 2, plan, 5)
    with torch.no_grad():
        assert nats(learnt) < start - 0.05
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_first_loss_of_contexts_by_hand(model, shots):
    plan = replace(SMOKE.plan, context_steps=1)
    views, index = views_of(shots, 5), next(index_batches(VIEWS * len(shots), plan.batch, 5))
    with torch.no_grad():
        image = model.image_tokens(views.pixels[index])[:, 0]
        logits = model.scale * image @ Contexts(2, SMOKE.shape.width, 5)(model).T
        wanted = F.cross_entropy(logits, views.nouns[index]).item()
    with logged() as logs:
        tune_contexts(model, shots, 2, plan, 5)
    assert logs[0].losses == pytest.approx([wanted], abs=1e-5)


def test_base_contexts_know_no_new_class(model):
    """Only the logits of base classes enter their loss."""
    base = few_shots(SMOKE, 0).shots(2, base=True)
    plan = replace(SMOKE.plan, context_steps=1)
    every = tune_contexts(model, base, 2, plan, 5)
    alone = tune_contexts(model, base, 2, plan, 5, classes=BASE)
    assert not torch.equal(every.vectors, alone.vectors)


@contextmanager
def logged():
    """The logs of all trainings in this block."""
    logs, plainly = [], r_amt.train

    def watched(*args, **options):
        logs.append(plainly(*args, **options))
        return logs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(r_amt, "train", watched)
        yield logs


def test_the_first_loss_of_pretraining_by_hand():
    """Pictures of one colour and noun share their targets."""
    objects = SMOKE.shape.objects(200, "train", 0)
    with logged() as logs:
        pretrain(SMOKE.shape, objects, 128, replace(SMOKE.pretraining(), steps=1), 0)
    model, index = untrained(SMOKE.shape, 0), next(index_batches(200, 128, 1000))
    ids, mask = caption_ids(objects.colours[index][:, None], objects.nouns[index][:, None])
    with torch.no_grad():
        text = last_words(model.text_tokens(ids), mask)
        logits = model.scale * model.image_tokens(objects.pixels[index])[:, 0] @ text.T
    same = (ids[:, None] == ids).all(-1).float()
    assert same.sum() > 160
    both = (logits.log_softmax(1) + logits.log_softmax(0)) * same / same.sum(1, keepdim=True)
    assert logs[0].losses == pytest.approx([-both.sum().item() / 256], abs=1e-5)


def test_rates_of_pretraining():
    plan = SETTINGS["cpu"].pretraining()
    assert plan.rate(0) == pytest.approx(6 * plan.learning_rate / plan.steps, rel=0.02)
    assert plan.rate(plan.steps // 6) == pytest.approx(plan.learning_rate)


def test_pretraining_learns():
    objects = SMOKE.shape.objects(64, "train", 0)
    plan = replace(SMOKE.pretraining(), steps=60, learning_rate=5e-3)

    def nats(model):
        ids, mask = caption_ids(objects.colours[:, None], objects.nouns[:, None])
        text = last_words(model.text_tokens(ids), mask)
        logits = model.scale * model.image_tokens(objects.pixels)[:, 0] @ text.T
        said = objects.colours * len(NOUNS) + objects.nouns
        targets = (said[:, None] == said).float()
        return -(targets / targets.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()

    start = nats(untrained(SMOKE.shape, 0)).item()
    trained = pretrain(SMOKE.shape, objects, 32, plan, 0)
    assert nats(trained).item() < start - 0.3
    assert not any(p.requires_grad for p in trained.parameters())


@pytest.mark.parametrize("arm", ["AMT", "R-AMT", "R-MMT"])
def test_tuning_lowers_the_loss_and_leaves_the_model(model, shots, arm):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = replace(SMOKE.plan, steps=40, rate=5e-4, check_every=10)
    found = tune(model, hand_prompts(model), shots, ARMS[arm], plan, 0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert found.losses[-5:].mean() < found.losses[:5].mean() - 0.02
    assert found.path.shape[0] == 5
    assert 0 < zeros_of(found.values) < 0.5
    assert torch.equal(found.path[-1], pack_bits([v > THRESHOLD for v in found.values]))
    dropped = found.dropped.mean().item()
    assert dropped < 0.01 if arm == "AMT" else dropped > 0.01


def test_the_first_loss_of_masks_by_hand(model, shots):
    """Of jittered shots, with all bits on: cross-entropy and 1e-4 times the norms of M, .01 everywhere."""
    hand, plan = hand_prompts(model), replace(SMOKE.plan, steps=1)
    index = next(index_batches(len(shots), plan.batch, 3))
    seen = jittered(shots.pixels[index], torch.Generator().manual_seed(3))
    assert not torch.equal(seen, shots.pixels[index])
    logits = model.scale * model.image_tokens(seen)[:, 0] @ hand.T
    matrices = [model.image.get_parameter(name) for name in weights_in(model.image, PLACES["AMT"])]
    norms = sum(0.01 * weight.numel() ** 0.5 for weight in matrices)
    wanted = F.cross_entropy(logits, shots.nouns[index]).item() + 1e-4 * norms
    assert norms * 1e-4 > 1e-5
    for arm in ("AMT", "R-AMT"):
        found = tune(model, hand, shots, ARMS[arm], plan, 3)
        assert found.losses.tolist() == pytest.approx([wanted], abs=3e-6)


def test_shares_of_zeros_count_the_threshold_as_off():
    values = [torch.tensor([0.0051, THRESHOLD, 0.01]), torch.tensor([[0.0049]])]
    assert zeros_of(values) == pytest.approx(0.5)


def test_placebos(model, shots):
    plan = replace(SMOKE.plan, steps=12, rate=1e-3)
    vectors = hand_prompts(model)
    own = tune(model, vectors, shots, ARMS["AMT"], plan, 0)
    moved = tune(model, vectors, shots, ARMS["permuted"], plan, 0)
    # The first step of Adam has one size, so that M shows the signs of the gradient.
    step = replace(plan, steps=1)
    first, other = (tune(model, vectors, shots, ARMS[a], step, 0) for a in ("AMT", "permuted"))
    generator = torch.Generator().manual_seed(0)
    for a, b in zip(first.values, other.values, strict=True):
        assert not torch.equal(a, b)
        order = torch.randperm(a.numel(), generator=generator)
        assert torch.equal(b.flatten() > 0.01, (a.flatten() > 0.01)[order])
        assert abs((a > 0.01).double().mean() - (b > 0.01).double().mean()) < 0.01
    until = zeros_of(own.values) / 2
    stopped = tune(model, vectors, shots, ARMS["permuted"], plan, 0, until=until)
    assert len(stopped.losses) < len(moved.losses)
    assert zeros_of(stopped.values) >= until
    dropped = torch.linspace(0.1, 0.6, 12)
    thinned = tune(model, vectors, shots, ARMS["thinned"], plan, 0, dropped=dropped)
    torch.testing.assert_close(thinned.dropped, dropped, atol=0.05, rtol=0)


def test_one_token_says_what_it_said_among_all(model):
    """Towers of two blocks: the token that is read is the same, although the others skip an MLP."""
    deep = untrained(replace(SMOKE.shape, layers=2), 0).double().requires_grad_(False)
    objects = SMOKE.shape.objects(6, "test", 0)
    plain = deep.image_tokens(objects.pixels)[:, 0]
    torch.testing.assert_close(read_pictures(deep, objects.pixels), plain, atol=1e-12, rtol=0)
    ids, mask = caption_ids(objects.colours[:, None], objects.nouns[:, None])
    assert mask.all()
    wanted = last_words(deep.text_tokens(ids), mask)
    torch.testing.assert_close(read_captions(deep, ids), wanted, atol=1e-12, rtol=0)
    assert deep.image(objects.pixels, OneToken(deep.image, 0)).shape[1] == 1


def test_trainings_by_number_of_the_seed():
    setting = replace(SMOKE, first=3, seeds=4, full=2, few=(1, 2, 4))
    assert list(setting.numbered()) == [3, 4, 5, 6]
    full, lean = setting.runs(4), setting.runs(5)
    assert lean == [Run(arm, k) for arm in ("R-AMT", "R-PMT") for k in (2, 4)]
    assert set(lean) < set(full)
    assert len(set(full)) == len(full)
    shots = {arm: {r.shots for r in full if r.arm == arm and not r.base} for arm in (*ARMS, "CoOp")}
    every, two, last = {1, 2, 4}, {2, 4}, {4}
    assert shots == dict.fromkeys(ARMS, last) | dict.fromkeys(("AMT", "R-AMT", "CoOp"), every) | (
        dict.fromkeys(("permuted", "R-MMT", "R-PMT"), two)
    )
    assert {r.arm for r in full if r.base} == {"AMT", "R-AMT", "CoOp"}
    cpu = SETTINGS["cpu"]
    assert cpu.most == (8, 16)
    assert cpu.full < cpu.seeds == len(cpu.numbered())


def test_all_trainings_of_a_seed(model):
    tuned, contexts = tune_all(SMOKE, model, 0)
    assert set(tuned) | set(contexts) == {run.key for run in SMOKE.runs(0)}
    assert Run("R-AMT", 2, base=True).key in tuned
    permuted, own = tuned[Run("permuted", 2).key], tuned[Run("AMT", 2).key]
    assert zeros_of(permuted.values) <= zeros_of(own.values) + 0.1
    masks = new_masks(model, "AMT")
    assert [v.shape for v in masks.values] == [v.shape for v in own.values]
    features = masked_features(model, masks, few_shots(SMOKE, 0).shots(1).pixels)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(NOUNS)))
    matrices = {
        "AMT": 3,
        "R-AMT": 3,
        "R-MMT": 2,
        "R-PMT": 5,
    }  # of one layer and the patch embedding
    assert {arm: len(tuned[Run(arm, 2).key].values) for arm in matrices} == matrices


def test_every_training_gets_what_its_arm_says(model, monkeypatch):
    calls, plainly = [], tune

    def watched(model, classes, shots, arm, plan, seed, **extra):
        calls.append((arm, classes, shots, extra))
        return plainly(model, classes, shots, arm, plan, seed, **extra)

    monkeypatch.setattr(r_amt, "tune", watched)
    tuned, contexts = tune_all(SMOKE, model, 0)
    hand, drawn, most = hand_prompts(model), few_shots(SMOKE, 0), SMOKE.few[-1]
    runs = [run for run in SMOKE.runs(0) if run.arm != "CoOp"]
    learnt = learnt_prompts(model, contexts[Run("CoOp", most).key])
    assert {run.shots for run in runs if run.arm == "permuted"} == {1, 2}
    for run, (arm, classes, shots, extra) in zip(runs, calls, strict=True):
        assert arm is ARMS[run.arm]
        wanted = learnt if run.arm.startswith("CoOp +") else hand
        assert torch.equal(classes, wanted[:BASE] if run.base else wanted), run
        assert torch.equal(shots.pixels, drawn.shots(run.shots, run.base).pixels), run
        if run.arm == "thinned":
            assert torch.equal(extra["dropped"], tuned[Run("R-AMT", most).key].dropped)
        elif run.arm.endswith("permuted"):
            assert extra["until"] == zeros_of(tuned[Run("AMT", run.shots).key].values)
            assert extra["until"] > 0
        else:
            assert extra == {}
    amt, regularised = (zeros_of(tuned[Run(arm, most).key].values) for arm in ("AMT", "R-AMT"))
    assert amt != regularised
    placebos = {arm for arm in ARMS if ARMS[arm].gradients != "own"}
    assert placebos == {"thinned", "permuted", "CoOp + permuted"}


def test_built_and_read_again(tmp_path, monkeypatch):
    setting = replace(SMOKE, first=1, seeds=2, full=1, few=(1,))
    monkeypatch.setitem(SETTINGS, "smoke", setting)
    monkeypatch.setattr(r_amt, "backbone_path", lambda name, profile: tmp_path)
    build(tmp_path, "smoke")
    seed, other = r_amt.load("smoke")
    assert [seed.seed, other.seed] == [1, 2]
    objects = setting.shape.objects(setting.pictures, "train", 2)
    own = pretrain(setting.shape, objects, setting.batch, setting.pretraining(), 2)
    assert torch.equal(other.model.image.patches.weight, own.image.patches.weight)
    assert not torch.equal(seed.model.image.patches.weight, own.image.patches.weight)
    again, contexts = tune_all(setting, seed.model, 1)
    assert set(again) == set(seed.tuned)
    assert set(other.tuned) == {Run(arm, 1).key for arm in LEAN}
    assert other.contexts == {}
    for key, found in seed.tuned.items():
        assert all(map(torch.equal, found.values, again[key].values)), key
    for key, vectors in seed.contexts.items():
        torch.testing.assert_close(vectors, contexts[key])
