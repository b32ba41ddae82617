"""The build of DHSA's boundary predictor, on a model of two small layers."""

import types

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.backbones.trained import dhsa
from reattend.backbones.trained.dhsa import boundary_loss, drawn, new_predictor
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
    monkeypatch.setattr(dhsa, "LAYERS", 2)
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
    data = [[(torch.tensor(n), torch.tensor(k)) for k in range(9)] for n in range(5)]
    batches = drawn(data)
    for _ in range(3):
        epoch = [next(batches) for _ in range(5)]
        assert sorted(int(batch[0][0]) for batch in epoch) == list(range(5))
        assert all(len({int(layer) for _, layer in batch}) == dhsa.LAYERS for batch in epoch)


def test_sides_share_no_chapter(monkeypatch):
    monkeypatch.setattr(dhsa, "documents", lambda asset: [f"{asset} {n}" for n in range(9)])
    sides = {side: dhsa.chapters(side) for side in ("train", "test")}
    assert len(sides["train"]) + len(sides["test"]) == 9
    assert not set(sides["train"]) & set(sides["test"])
    assert dhsa.chapters("train") == sides["train"]
    with pytest.raises(ValueError, match="side must be train or test, got 'all'"):
        dhsa.chapters("all")
