import math
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.multimodal_llm.modality_interference import (
    FLOOR,
    IGNORED,
    Attack,
    Batch,
    Objective,
    adversarial_change,
    answer_logits,
    answer_loss,
    attack_mask,
    consistency,
    delta_cp,
    interference_loss,
    jensen_shannon,
    js_consistency,
    kl_consistency,
    picture_versions,
    text_versions,
)

VOCABULARY, WIDTH = 12, 6


class MeanModel(nn.Module):
    """Each place reads the mean of the embeddings so far: small, causal, and without any randomness."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
        self.mix = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.head = nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64)
        self.projector = nn.Linear(5, WIDTH, dtype=torch.float64)
        for number, parameter in enumerate(self.parameters()):
            angles = 0.7 * torch.arange(parameter.numel(), dtype=torch.float64) + number
            parameter.data = angles.sin().view_as(parameter)

    def embed(self, ids, pictures):
        embeddings = self.words(ids)
        visual = (ids == 1)[..., None].expand_as(embeddings)
        return embeddings.masked_scatter(visual, self.projector(pictures))

    def forward(self, embeddings):
        count = torch.arange(1, embeddings.shape[1] + 1, dtype=embeddings.dtype)[:, None]
        return self.head(torch.tanh(self.mix(embeddings.cumsum(1) / count)))


# Token 1 stands for a place of the picture. Origins of an image-heavy, a text-heavy and a vqa item; then
# two more versions of the first and one of the second.
IDS = torch.tensor(
    [
        [1, 1, 3, 4, 5, 6],
        [1, 1, 3, 4, 7, 8],
        [1, 1, 2, 9, 3, 10],
        [1, 1, 9, 4, 5, 6],
        [1, 1, 4, 4, 5, 6],
        [1, 1, 3, 4, 7, 8],
    ]
)
KINDS = ("image_heavy", "text_heavy", "vqa", "image_heavy", "image_heavy", "text_heavy")
ITEMS, ORIGINS = torch.tensor([0, 1, 2, 0, 0, 1]), torch.tensor([0, 1, 2])


def last_as_label(ids):
    labels = torch.full_like(ids, IGNORED)
    labels[:, -1] = ids[:, -1]
    return labels


def small_batch(model):
    angles = torch.arange(30, dtype=torch.float64)
    pictures = torch.cat([(0.3 * angles).cos().view(6, 5), (0.9 * angles).cos().view(6, 5)])
    embeddings = model.embed(IDS, pictures)
    return Batch(embeddings, last_as_label(IDS), IDS == 1, KINDS, ITEMS, ORIGINS)


def random_logits(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# --- the official code's numbers ------------------------------------------------------------------
# luisrui/Modality-Interference-in-MLLMs, Qwen classes, run once on these very tensors in float64.


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [(kl_consistency, 0.012958755466754285), (js_consistency, 0.002429421171026842)],
)
def test_consistency_equals_the_official_codes_in_its_released_form(divergence, expected):
    model = MeanModel()
    found = interference_loss(
        model, small_batch(model), Objective(divergence=divergence, released=True)
    )
    assert found.consistency.item() == pytest.approx(expected, rel=1e-12)
    assert found.answers.item() == pytest.approx(2.8729029117515297, rel=1e-12)
    assert found.total.item() == pytest.approx((found.answers + found.consistency).item())


@pytest.mark.parametrize(
    ("divergence", "total", "steadiness", "slopes"),
    [
        (
            kl_consistency,
            5.790124685672762,
            0.018894675138285737,
            {
                "words": 0.4712431590698148,
                "mix": 1.3235409322561702,
                "head": 2.1362465394958363,
                "projector": 0.16510972860900916,
            },
        ),
        (
            js_consistency,
            5.782122090140447,
            0.002889484073657571,
            {
                "words": 0.4751113205012834,
                "mix": 1.3375161803559317,
                "head": 2.155388458849361,
                "projector": 0.16199397958605422,
            },
        ),
    ],
)
def test_the_whole_loss_and_its_gradients_equal_the_official_codes(
    divergence, total, steadiness, slopes, monkeypatch
):
    def start(shape, generator=None):
        angles = torch.arange(math.prod(shape), dtype=torch.float64)
        return ((1.3 * angles).sin().view(shape) + 1) / 2

    monkeypatch.setattr(torch, "rand", start)
    model = MeanModel()
    objective = Objective(Attack(radius=0.2, rate=0.8, steps=2), divergence, 0.5, released=True)
    found = interference_loss(model, small_batch(model), objective)
    found.total.backward()
    assert found.total.item() == pytest.approx(total, rel=1e-12)
    assert found.consistency.item() == pytest.approx(steadiness, rel=1e-12)
    assert found.attacked.item() == pytest.approx(2.907774436352089, rel=1e-12)
    for name, expected in slopes.items():
        slope = model.get_submodule(name).weight.grad.norm().item()
        assert slope == pytest.approx(expected, rel=1e-9), name


def test_attacked_places_are_the_official_codes():
    found = attack_mask(KINDS, IDS == 1, last_as_label(IDS))
    image, text, none = [0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]
    assert found.int().tolist() == [image, text, none, image, image, text]


def test_attack_mask_refuses_what_it_does_not_know():
    labels = last_as_label(IDS)
    with pytest.raises(ValueError, match="unknown kind 'audio'; there are: image_heavy"):
        attack_mask(("audio",) * 6, IDS == 1, labels)
    with pytest.raises(ValueError, match="5 kinds for 6 sequences"):
        attack_mask(KINDS[:5], IDS == 1, labels)


# --- the attack -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_attack_stays_in_the_ball_and_in_its_places(steps, seed):
    model = MeanModel()
    batch = small_batch(model)
    mask = attack_mask(batch.kinds, batch.visual, batch.labels)
    change = adversarial_change(
        model,
        batch.embeddings,
        batch.labels,
        mask,
        Attack(0.3, 50.0, steps),
        torch.Generator().manual_seed(seed),
    )
    assert change.abs().max() <= 0.3
    assert change.abs().max() > 0.25  # and fills it: a start in half the ball would not
    assert (change[~mask] == 0).all()
    assert (change[mask] != 0).all()
    assert change.min() < -0.25
    assert not change.requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_small_step_raises_the_inner_loss_by_its_slope(seed):
    model = MeanModel()
    batch = small_batch(model)
    mask = attack_mask(batch.kinds, batch.visual, batch.labels)

    def changed(rate, steps=1):
        attack, generator = Attack(1.0, rate, steps), torch.Generator().manual_seed(seed)
        return adversarial_change(model, batch.embeddings, batch.labels, mask, attack, generator)

    def loss(change):
        return answer_loss(model(batch.embeddings + change), batch.labels).item()

    start, rate = changed(0.0), 1e-3
    free = start.clone().requires_grad_(True)
    value = answer_loss(model(batch.embeddings.detach() + free), batch.labels)
    (slope,) = torch.autograd.grad(value, free)
    moved = changed(rate)
    torch.testing.assert_close(moved, start + rate * slope * mask[..., None])
    rise = rate * (slope * mask[..., None]).square().sum().item()
    assert loss(moved) - loss(start) == pytest.approx(rise, rel=1e-2)
    assert loss(changed(rate, 5)) > loss(moved)


def test_without_a_ball_the_attacked_loss_is_the_answers():
    model = MeanModel()
    found = interference_loss(
        model, small_batch(model), Objective(Attack(0.0, 1.0), kl_consistency)
    )
    assert found.attacked.item() == pytest.approx(found.answers.item(), rel=1e-14)


def test_vqa_is_not_attacked():
    model = MeanModel()
    batch = small_batch(model)
    alone = Batch(batch.embeddings, batch.labels, batch.visual, ("vqa",) * 6, ITEMS, ORIGINS)
    found = interference_loss(model, alone, Objective(Attack(0.5, 1.0)))
    assert found.attacked.item() == pytest.approx(found.answers.item(), rel=1e-14)


def test_the_attacked_half_trains_the_language_model_alone():
    model = MeanModel()
    found = interference_loss(model, small_batch(model), Objective(Attack(0.2, 0.8)))
    found.attacked.backward()
    assert model.projector.weight.grad is None
    assert model.words.weight.grad is None
    assert model.mix.weight.grad.norm() > 0.1
    assert model.head.weight.grad.norm() > 0.1


# --- consistency ----------------------------------------------------------------------------------

DIVERGENCES = (kl_consistency, js_consistency, jensen_shannon)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_predictions_diverge_by_nothing_and_others_by_more(divergence):
    same = random_logits(2, 7)
    assert divergence(same, same.expand(3, 2, 7)).item() == pytest.approx(0, abs=1e-7)
    for seed in range(1, 4):
        assert divergence(same, random_logits(3, 2, 7, seed=seed)).item() > 0.1


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_origin_is_constant(divergence):
    origin, versions = random_logits(2, 7), random_logits(3, 2, 7, seed=1)
    origin.requires_grad_(True)
    versions.requires_grad_(True)
    divergence(origin, versions).backward()
    assert origin.grad is None
    assert versions.grad.abs().max() > 0.01


def test_kl_is_that_of_torch():
    origin, versions = random_logits(2, 7), random_logits(3, 2, 7, seed=1)
    expected = F.kl_div(
        origin.log_softmax(-1).expand(3, 2, 7),
        versions.log_softmax(-1),
        log_target=True,
        reduction="sum",
    )
    assert kl_consistency(origin, versions).item() == pytest.approx(expected.item(), rel=1e-9)


def test_jensen_shannon_is_symmetric_and_bounded_and_the_released_js_is_not():
    one, other = random_logits(1, 7), random_logits(1, 7, seed=1)
    both = jensen_shannon(one, other[None]).item(), jensen_shannon(other, one[None]).item()
    assert both[0] == pytest.approx(both[1], rel=1e-9)
    far = torch.tensor([[40.0, 0, 0]], dtype=torch.float64)
    assert jensen_shannon(far, far.roll(1)[None]).item() == pytest.approx(math.log(2), abs=1e-4)
    assert js_consistency(far, far.roll(1)[None]).item() > 10


def test_js_as_coded_sums_one_side_and_averages_the_other():
    origin, version = random_logits(2, 7), random_logits(2, 7, seed=1)
    p, q = origin.softmax(-1), version.softmax(-1)
    m = (p + q) / 2
    to_p, to_q = ((m * (m / x).log()).sum() for x in (p, q))
    found = js_consistency(origin, version.expand(3, 2, 7))
    assert found.item() == pytest.approx(((3 * to_p + to_q) / 2).item(), rel=1e-9)


def test_versions_have_a_least_probability():
    far = torch.tensor([[200.0, 0.0]], dtype=torch.float64)
    found = kl_consistency(torch.zeros(1, 2, dtype=torch.float64), far[None])
    q = torch.tensor([1.0, FLOOR], dtype=torch.float64) / (1 + FLOOR)
    assert found.item() == pytest.approx((q * (2 * q).log()).sum().item(), rel=1e-12)


def test_released_form_does_not_read_what_predicts_a_one_token_answer():
    logits, labels = random_logits(6, 6, 9), last_as_label(IDS)

    def value(released, changed):
        return consistency(changed, labels, ITEMS, ORIGINS, kl_consistency, released=released)

    other = logits.clone()
    other[:, -2] = random_logits(6, 9, seed=5)
    assert value(True, other) == value(True, logits) > 0.1
    assert value(False, other) != pytest.approx(value(False, logits).item(), rel=0.01)
    after = logits.clone()
    after[:, -1] = random_logits(6, 9, seed=5)
    assert value(False, after) == value(False, logits)
    assert value(True, after) != pytest.approx(value(True, logits).item(), rel=0.01)


def test_answers_of_several_tokens_are_read_where_they_are_predicted():
    logits = random_logits(6, 9)
    labels = torch.tensor([IGNORED, IGNORED, 3, IGNORED, 4, 5])
    torch.testing.assert_close(answer_logits(logits, labels), logits[[1, 3, 4]])
    torch.testing.assert_close(answer_logits(logits, labels, released=True), logits[[2, 4, 5]])


def test_consistency_is_a_mean_over_items_that_have_versions():
    logits, labels = random_logits(6, 6, 9), last_as_label(IDS)
    read = logits[:, -2:-1]
    first = kl_consistency(read[0], read[[3, 4]])
    second = kl_consistency(read[1], read[[5]])
    found = consistency(logits, labels, ITEMS, ORIGINS, kl_consistency)
    assert found.item() == pytest.approx(((first + second) / 2).item(), rel=1e-12)
    alone = consistency(logits[:3], labels[:3], ITEMS[:3], ORIGINS, kl_consistency)
    assert alone == 0


def test_references_replace_origins_and_leave_the_versions():
    logits, labels = random_logits(6, 6, 9), last_as_label(IDS)
    read = logits[:, -2:-1]
    swapped = consistency(
        logits, labels, ITEMS, ORIGINS, kl_consistency, references=torch.tensor([1, 0, 2])
    )
    expected = (kl_consistency(read[1], read[[3, 4]]) + kl_consistency(read[0], read[[5]])) / 2
    assert swapped.item() == pytest.approx(expected.item(), rel=1e-12)


def test_with_an_attack_the_attacked_are_versions_too():
    model = MeanModel()
    batch = small_batch(model)
    objective = Objective(Attack(0.2, 0.0), kl_consistency)
    found = interference_loss(model, batch, objective, generator=torch.Generator().manual_seed(3))
    mask = attack_mask(batch.kinds, batch.visual, batch.labels)
    noise = adversarial_change(
        model,
        batch.embeddings,
        batch.labels,
        mask,
        Attack(0.2, 0.0),
        torch.Generator().manual_seed(3),
    )
    read = torch.cat([model(batch.embeddings), model(batch.embeddings + noise)])[:, -2:-1]
    parts = [
        kl_consistency(read[0], read[[3, 4, 6, 9, 10]]),
        kl_consistency(read[1], read[[5, 7, 11]]),
        kl_consistency(read[2], read[[8]]),
    ]
    assert found.consistency.item() == pytest.approx(sum(parts).item() / 3, rel=1e-12)


# --- diagnosis ------------------------------------------------------------------------------------


def test_delta_cp_is_the_share_of_changed_decisions():
    assert delta_cp(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, 2, 3])) == 0.25
    with pytest.raises(ValueError, match="at least one item"):
        delta_cp(torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long))


def test_a_model_that_does_not_see_the_other_modality_changes_no_decision():
    model = MeanModel()
    batch = small_batch(model)
    other = batch.embeddings.clone()
    other[:, 2:4] += random_logits(6, 2, WIDTH)

    def choices(embeddings, hidden):
        shown = embeddings.clone()
        shown[:, 2:4] = 0 if hidden else shown[:, 2:4]
        return model(shown)[:, -2].argmax(-1)

    assert delta_cp(choices(batch.embeddings, True), choices(other, True)) == 0
    assert delta_cp(choices(batch.embeddings, False), choices(other, False)) > 0


def test_text_versions_keep_the_question_and_name_an_option():
    options, sentences = ("fish", "bird", "tool"), ("one two", "three four")
    for seed in range(5):
        found = text_versions("what is it ?", options, sentences, random.Random(seed), sentences=7)
        assert found["origin"] == "what is it ?"
        assert all(text.endswith("what is it ?") for text in found.values())
        assert len(found["unrelated"].split()) == 2 * 7 + 4
        assert set(found["unrelated"].split()[:-4]) <= {"one", "two", "three", "four"}
    named = {
        text_versions("q", options, sentences, random.Random(s))["misleading"].split()[-3]
        for s in range(40)
    }
    assert named == set(options)  # the right one included
    for seed in range(9):
        told = text_versions("q", options, sentences, random.Random(seed), depicted="bird")
        assert told["misleading"] == "this picture seems to depict a bird . q"


def test_picture_versions_are_noise_the_picture_black_and_white():
    real = torch.full((3, 20, 31), 7, dtype=torch.uint8)
    found = picture_versions(real, torch.Generator().manual_seed(0))
    assert list(found) == ["origin", "real", "black", "white"]
    assert found["real"] is real
    assert found["black"].unique().tolist() == [0]
    assert found["white"].unique().tolist() == [255]
    noise = found["origin"].double()
    assert noise.min() == 0
    assert noise.max() == 255
    assert noise.mean().item() == pytest.approx(127.5, abs=6)


# --- a reader's own model -------------------------------------------------------------------------


def test_a_hugging_face_model_is_trained_through_its_input_embeddings():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    llama, projector = LlamaForCausalLM(config).eval(), nn.Linear(5, 16)
    ids = torch.randint(2, 40, (6, 9))
    seen = torch.ones_like(ids)
    ids[0, 7:], seen[0, 7:] = 0, 0  # padding on the right, as in the official training
    labels = torch.full_like(ids, IGNORED)
    labels[1:, -1], labels[0, 6] = ids[1:, -1], ids[0, 6]
    visual = torch.arange(9).expand(6, 9) < 3
    pictures = torch.randn(6, 3, 5)

    def batch():
        words = llama.get_input_embeddings()(ids)
        embeddings = torch.cat([projector(pictures), words[:, 3:]], 1)
        return Batch(embeddings, labels, visual, KINDS, ITEMS, ORIGINS)

    def model(embeddings):
        return llama(inputs_embeds=embeddings, attention_mask=seen).logits

    objective = Objective(Attack(0.01, 1.0, 2), js_consistency, 0.1)
    parameters = [*llama.parameters(), *projector.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=2e-2)
    totals = []
    for step in range(20):
        found = interference_loss(
            model, batch(), objective, generator=torch.Generator().manual_seed(step)
        )
        optimiser.zero_grad()
        found.total.backward()
        optimiser.step()
        totals.append(found.total.item())
    assert totals[-1] < 0.5 * totals[0]
    assert found.attacked > 0
    assert found.consistency > 0
    assert projector.weight.grad.norm() > 0
    expected = llama(
        inputs_embeds=batch().embeddings, attention_mask=seen, labels=labels
    ).loss  # transformers shifts the labels itself
    assert answer_loss(model(batch().embeddings), labels).item() == pytest.approx(
        expected.item(), rel=1e-5
    )
