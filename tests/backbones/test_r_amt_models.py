"""The small CLIP and what is tuned on it: equal starts, frozen weights, placebos by their definition."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from reattend.backbones.trained import r_amt
from reattend.backbones.trained.r_amt import (
    ARMS,
    BASE,
    SETTINGS,
    Contexts,
    Run,
    build,
    few_shots,
    hand_prompts,
    learnt_prompts,
    masked_features,
    new_masks,
    pretrain,
    tune,
    tune_all,
    tune_contexts,
    untrained,
    zeros_of,
)
from reattend.data.attribute_scenes import NOUNS, VOCABULARY, caption_ids
from reattend.trunks.image_text import last_words

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


def test_base_contexts_know_no_new_class(model):
    """Only the logits of base classes enter their loss."""
    base = few_shots(SMOKE, 0).shots(2, base=True)
    plan = replace(SMOKE.plan, context_steps=1)
    every = tune_contexts(model, base, 2, plan, 5)
    alone = tune_contexts(model, base, 2, plan, 5, classes=BASE)
    assert not torch.equal(every.vectors, alone.vectors)


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
    dropped = found.dropped.mean().item()
    assert dropped > 0.01 if ARMS[arm].strength else dropped < 0.01


def test_placebos(model, shots):
    plan = replace(SMOKE.plan, steps=12, rate=1e-3)
    vectors = hand_prompts(model)
    own = tune(model, vectors, shots, ARMS["AMT"], plan, 0)
    moved = tune(model, vectors, shots, ARMS["permuted"], plan, 0)
    # The first step of Adam has one size, so that M shows the signs of the gradient.
    step = replace(plan, steps=1)
    first, other = (tune(model, vectors, shots, ARMS[a], step, 0) for a in ("AMT", "permuted"))
    for a, b in zip(first.values, other.values, strict=True):
        assert not torch.equal(a, b)
        assert abs((a > 0.01).double().mean() - (b > 0.01).double().mean()) < 0.01
    until = zeros_of(own.values) / 2
    stopped = tune(model, vectors, shots, ARMS["permuted"], plan, 0, until=until)
    assert len(stopped.losses) < len(moved.losses)
    assert zeros_of(stopped.values) >= until
    dropped = torch.linspace(0.1, 0.6, 12)
    thinned = tune(model, vectors, shots, ARMS["thinned"], plan, 0, dropped=dropped)
    torch.testing.assert_close(thinned.dropped, dropped, atol=0.05, rtol=0)


def test_all_trainings_of_a_seed(model):
    tuned, contexts = tune_all(SMOKE, model, 0)
    assert set(tuned) | set(contexts) == {run.key for run in SMOKE.runs()}
    assert Run("R-AMT", 2, base=True).key in tuned
    permuted, own = tuned[Run("permuted", 2).key], tuned[Run("AMT", 2).key]
    assert zeros_of(permuted.values) <= zeros_of(own.values) + 0.1
    masks = new_masks(model, "AMT")
    assert [v.shape for v in masks.values] == [v.shape for v in own.values]
    features = masked_features(model, masks, few_shots(SMOKE, 0).shots(1).pixels)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(NOUNS)))


def test_built_and_read_again(tmp_path, monkeypatch):
    setting = replace(SMOKE, seeds=1)
    monkeypatch.setitem(SETTINGS, "smoke", setting)
    monkeypatch.setattr(r_amt, "backbone_path", lambda name, profile: tmp_path)
    build(tmp_path, "smoke")
    (seed,) = r_amt.load("smoke")
    again, contexts = tune_all(setting, seed.model, 0)
    assert set(again) == set(seed.tuned)
    for key, found in seed.tuned.items():
        assert all(map(torch.equal, found.values, again[key].values)), key
    for key, vectors in seed.contexts.items():
        torch.testing.assert_close(vectors, contexts[key])
