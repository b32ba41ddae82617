"""The build of SeerAttention's gates, on a model of six small layers."""

import types

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.attention.blocks import causal_block_mask
from reattend.backbones.trained import seer_attention as seer_gates
from reattend.training.loop import TrainingPlan

LENGTH = 64


@pytest.fixture(name="small")
def _small(monkeypatch):
    """A small model that reads letters, and settings to match."""
    torch.manual_seed(0)
    shape = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 16, "initializer_range": 0.3}
    config = LlamaConfig(**shape, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    tokenizer = types.SimpleNamespace(
        encode=lambda text, add_special_tokens: [ord(letter) % 90 for letter in text],
        convert_ids_to_tokens=lambda ids: ["." if i == ord(".") % 90 else "x" for i in ids],
    )
    monkeypatch.setattr(seer_gates, "load_smollm2", lambda device: (model, tokenizer))
    monkeypatch.setattr(
        seer_gates, "chapters", lambda side: [f"A text of {n} words. " * 30 for n in "abcd"]
    )
    monkeypatch.setattr(seer_gates, "HIDDEN_EVERY", 9)
    monkeypatch.setitem(seer_gates.SETTINGS, "smoke", seer_gates.Setting(3, LENGTH, 8, 6, 2))
    return model


def tokens(seed):
    return torch.randint(0, 90, (LENGTH,), generator=torch.Generator().manual_seed(seed))


def test_building_twice_gives_the_same_gates(small, tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        seer_gates.build(tmp_path / name, "smoke")
    for name in seer_gates.NAMES:
        one, other = (load_file(tmp_path / x / f"{name}.safetensors") for x in ("first", "second"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    monkeypatch.setattr(seer_gates, "backbone_path", lambda name, profile: tmp_path / "first")
    read = seer_gates.load(small, "smoke")
    assert [len(read.losses[name]) for name in ("gates", "half")] == [6, 3]
    saved = load_file(tmp_path / "first" / "other.safetensors")
    assert torch.equal(read.gates["other"].key_map, saved["key_map"])
    assert not torch.equal(read.gates["other"].key_map, read.gates["gates"].key_map)
    assert read.gates["unplaced"].inv_freq is None
    assert len(read.gates["unplaced"].key_map) == 2
    assert len(read.gates["gates"].key_map) == 6
    assert [row["step"] for row in read.watched] == [1, 2, 3, 4, 5, 6]


def test_distilling_lowers_the_loss_and_raises_the_correlation(small):
    gates = seer_gates.new_gates(small, 8, 3)
    examples = [seer_gates.collect(small, gates, tokens(seed)) for seed in range(2)]
    first = examples[0]

    def state():
        with torch.no_grad():
            predicted = gates(*first[:2]).softmax(-1)
            loss = seer_gates.gate_loss(gates, first).item()
        return loss, seer_gates.map_correlation(predicted, first.truth)

    before = state()
    losses = seer_gates.distil(gates, examples, TrainingPlan(40, 3e-3, 0.0, warmup=2), 0)
    after = state()
    assert len(losses) == 40
    assert after[0] < 0.9 * before[0]
    assert after[1] > before[1]
    assert not any(p.requires_grad for p in gates.parameters())
    torch.testing.assert_close(seer_gates.thin(first).truth, first.truth[:, ::5])


def test_correlation_is_that_of_the_causal_blocks_of_trained_rows():
    torch.manual_seed(0)
    future = ~causal_block_mask(8, 8)
    truth, other = (torch.rand(2, 3, 8, 8).masked_fill(future, 0) for _ in range(2))
    assert seer_gates.map_correlation(truth, truth) == pytest.approx(1)
    assert seer_gates.map_correlation(2 * truth + 1, truth) == pytest.approx(1)
    rows, columns = (~future).nonzero()[3:].T  # the first quarter of the rows has three blocks
    pairs = zip(truth.flatten(0, 1), other.flatten(0, 1), strict=True)
    each = [
        torch.corrcoef(torch.stack([a[rows, columns], b[rows, columns]]))[0, 1] for a, b in pairs
    ]
    want = torch.stack(each).mean().item()
    assert seer_gates.map_correlation(truth, other) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("blocks", [5, 16, 64])
def test_kept_is_the_nearest_number(blocks):
    measured = [seer_gates.rows_density(k, blocks) for k in range(1, blocks + 1)]
    assert measured[-1] == 1
    for share in (0.1, 0.3, 0.8):
        k = seer_gates.kept(share, blocks)
        assert abs(measured[k - 1] - share) == min(abs(x - share) for x in measured)
        rows = [min(k, row + 1) for row in range(blocks)]
        assert seer_gates.rows_blocks(k, blocks) == sum(rows)


def test_sides_share_no_chapter_and_suffice():
    train, test = (seer_gates.chapters(side) for side in ("train", "test"))
    assert min(len(train), len(test)) > 40

    def sequences(text):
        words = text.split()
        return set(zip(*(words[n:] for n in range(12)), strict=False))

    seen = [sequences(text) for text in (*test, *train)]
    for i, one in enumerate(seen[: len(test)]):  # no chapter again, nor an older version of it
        assert all(len(one & other) < 0.1 * len(one) for other in seen[i + 1 :])
    with pytest.raises(ValueError, match="side must be train or test"):
        seer_gates.chapters("both")
