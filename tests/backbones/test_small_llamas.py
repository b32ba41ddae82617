"""The small Llamas and their facts."""

import pytest
import torch

from reattend.backbones.trained import small_llamas
from reattend.backbones.trained.small_llamas import (
    FILLERS,
    FIRST_FACT,
    FIRST_KEY,
    FIRST_VALUE,
    KEYS,
    VALUES,
    VOCABULARY,
    fact_rows,
)


@pytest.mark.parametrize(("length", "facts"), [(9, 8), (64, 8), (200, 64)])
def test_every_answer_follows_from_a_fact_of_its_prompt(length, facts):
    prompt, answer = fact_rows(5, length, facts, 4, torch.Generator().manual_seed(0))
    assert prompt.shape == (5, length)
    assert answer.shape == (5, 7)
    context = prompt[:, :-1]
    assert ((context >= FIRST_FACT).sum(1) == facts).all()
    assert ((context < FILLERS) | (context >= FIRST_FACT)).all()
    asked = torch.cat([prompt[:, -1:], answer[:, 1::2]], dim=1) - FIRST_KEY
    given = answer[:, ::2] - FIRST_VALUE
    for row in range(5):
        found = context[row][context[row] >= FIRST_FACT] - FIRST_FACT
        pairs = dict(zip((found // VALUES).tolist(), (found % VALUES).tolist(), strict=True))
        assert len(pairs) == facts  # every key once
        assert [pairs[k] for k in asked[row].tolist()] == given[row].tolist()
    assert prompt.max() < VOCABULARY


def test_the_same_seed_gives_the_same_rows():
    first, second = (fact_rows(3, 40, 8, 2, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_logits_at_some_places_are_the_models_with_its_gradients():
    torch.manual_seed(0)
    model = small_llamas.untrained(16).double()
    tokens = torch.randint(VOCABULARY, (3, 21), generator=torch.Generator().manual_seed(5))
    places = torch.tensor([0, 7, 19, 20])
    up = torch.randn(3, 4, VOCABULARY, generator=torch.Generator().manual_seed(6)).double()
    found = []
    for logits in (
        small_llamas.logits_at(model, tokens, places),
        model(tokens).logits[:, places],
    ):
        gradients = torch.autograd.grad((logits * up).sum(), list(model.parameters()))
        found.append([logits, *gradients])
    for ours, whole in zip(*found, strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(("facts", "asked"), [(0, 1), (KEYS + 1, 1), (40, 1), (4, 0)])
def test_facts_that_do_not_fit_are_refused(facts, asked):
    with pytest.raises(ValueError, match="facts fit"):
        fact_rows(2, 40, facts, asked, torch.Generator())


def test_training_and_reading_back(tmp_path, monkeypatch):
    setting = small_llamas.Setting((16, 32), ((16, 4, 3), (24, 4, 2)))
    monkeypatch.setitem(small_llamas.SETTINGS, "smoke", setting)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        small_llamas.build(tmp_path / name, "smoke")
    monkeypatch.setattr(small_llamas, "backbone_path", lambda name, profile: tmp_path / "first")
    models = small_llamas.load("smoke")
    assert list(models) == [16, 32]
    for width, model in models.items():
        assert model.config.hidden_size == width
        assert model.config.num_attention_heads == width // small_llamas.HEAD_DIM
        assert not any(p.requires_grad for p in model.parameters())
        files = [tmp_path / name / str(width) / "model.safetensors" for name in ("first", "second")]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert model(torch.zeros(1, 5, dtype=torch.long)).logits.shape == (1, 5, VOCABULARY)


def test_a_width_must_learn_more_than_the_start(tmp_path, capsys, monkeypatch):
    setting = small_llamas.Setting((32,), ((12, 2, 80),))
    monkeypatch.setitem(small_llamas.SETTINGS, "smoke", setting)
    small_llamas.build(tmp_path, "smoke")
    loss = float(capsys.readouterr().out.split("loss")[1].splitlines()[0])
    assert loss < 2.7  # ln 16 = 2.77 is guessing among the values
