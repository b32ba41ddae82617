"""The build of DHSA's boundary predictor, on a model of two small layers."""

import random
import types

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.backbones.trained import dhsa
from reattend.backbones.trained.dhsa import boundary_loss, drawn, new_predictor, stretch
from reattend.long_context.dhsa import focal_loss


@pytest.fixture(name="small")
def _small(monkeypatch):
    """A small model that reads letters, and settings to match."""
    torch.manual_seed(0)
    shape = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 16}
    config = LlamaConfig(**shape, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    tokenizer = types.SimpleNamespace(
        encode=lambda text, add_special_tokens: [ord(letter) % 90 for letter in text],
        convert_ids_to_tokens=lambda ids: ["." if i == ord(".") % 90 else "x" for i in ids],
    )
    monkeypatch.setattr(dhsa, "load_smollm2", lambda device: (model, tokenizer))
    monkeypatch.setattr(
        dhsa, "chapters", lambda side: [f"A text of {n} words. " * 30 for n in "abc"]
    )
    monkeypatch.setattr(dhsa, "STRETCH", 40)
    monkeypatch.setitem(dhsa.SETTINGS, "smoke", dhsa.Setting(3, 60, 8))
    return model


def test_building_twice_gives_the_same_predictor(small, tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        dhsa.build(tmp_path / name, "smoke")
    for name in ("full", "half"):
        one, other = (load_file(tmp_path / x / f"{name}.safetensors") for x in ("first", "second"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    monkeypatch.setattr(dhsa, "backbone_path", lambda name, profile: tmp_path / "first")
    read = dhsa.load(small, "smoke")
    assert len(read.losses) == 8
    for name in ("full", "half"):
        saved = load_file(tmp_path / "first" / f"{name}.safetensors")
        mine = getattr(read, name).state_dict()
        assert all(torch.equal(mine[key], saved[key]) for key in saved)
    assert not torch.equal(read.full.mlp[0].weight, read.half.mlp[0].weight)
    assert not read.full.training


def test_the_loss_is_over_whole_windows_alone(small):
    predictor = new_predictor(small)
    key = torch.randn(2, 30, 16)
    ratios = torch.rand(2, 30) * 3 + 1
    ratios[:, :7] = ratios[:, -8:] = -torch.inf
    loss = boundary_loss(predictor, [(key[0], ratios[0]), (key[1], ratios[1])])
    target = (ratios >= 2).float()
    expected = focal_loss(predictor(key)[:, 7:22], target[:, 7:22])
    torch.testing.assert_close(loss, expected)


def test_every_document_comes_before_any_comes_again():
    data = [
        [(torch.full((300,), n), torch.full((300,), 1.0 + k)) for k in range(4)] for n in range(12)
    ]
    batches = drawn(data)
    steps = [next(batches) for _ in range(6)]
    assert all(len(step) == dhsa.STRETCHES == 8 for step in steps)
    documents = [int(keys[0]) for step in steps for keys, _ in step]
    for epoch in range(4):
        assert sorted(documents[12 * epoch :][:12]) == list(range(12))
    layers = {float(ratios[10]) for step in steps for _, ratios in step}
    assert layers == {1.0, 2.0, 3.0, 4.0}


def test_a_stretch_knows_no_label_where_its_windows_are_cut():
    """Window 4: the first three and the last four logits see zeros in place of keys."""
    keys, ratios = torch.arange(200.0)[:, None], torch.arange(200.0) + 1
    begins = set()
    for seed in range(20):
        part, known = stretch(keys, ratios, random.Random(seed))
        begin = int(part[0])
        assert part[:, 0].tolist() == list(range(begin, begin + dhsa.STRETCH))
        assert torch.isneginf(known[[0, 1, 2, -4, -3, -2, -1]]).all()
        assert known[3:-4].tolist() == list(range(begin + 4, begin + dhsa.STRETCH - 3))
        begins.add(begin)
    assert len(begins) > 10
    assert min(begins) >= 0
    assert max(begins) <= 200 - dhsa.STRETCH
    assert ratios.isfinite().all()  # what is given stays as it was
    assert len(stretch(keys[:50], ratios[:50], random.Random(0))[0]) == 50


def test_sides_share_no_chapter(monkeypatch):
    monkeypatch.setattr(dhsa, "documents", lambda asset: [f"{asset} {n}" for n in range(9)])
    sides = {side: dhsa.chapters(side) for side in ("train", "test")}
    assert len(sides["train"]) + len(sides["test"]) == 9
    assert not set(sides["train"]) & set(sides["test"])
    assert dhsa.chapters("train") == sides["train"]
    with pytest.raises(ValueError, match="side must be train or test, got 'all'"):
        dhsa.chapters("all")
