"""The teachers of pair tasks: real cross-attention, blind to padding, better than chance, repeatable."""

import math

import pytest
import torch
from safetensors.torch import load_file

from reattend.backbones.trained.pair_teachers import (
    AlignmentTeacher,
    build,
    load,
    reading_order,
    with_places,
)
from reattend.trunks.encoders import CachedStates


def states(lengths, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return CachedStates(torch.randn(len(lengths), longest, width, generator=generator), mask)


def teacher(outputs=3):
    torch.manual_seed(0)
    return AlignmentTeacher(12, outputs, hidden=8).eval()


def test_padding_and_cls_are_not_read():
    model, first, second = teacher(), states([4, 6]), states([5, 3], seed=1)
    expected = model(first, second)
    changed = first.states.clone()
    changed[0, 4:] = 100.0
    changed[:, 0] = -50.0
    torch.testing.assert_close(model(CachedStates(changed, first.mask), second), expected)


def test_texts_are_read_once_in_an_order_that_no_set_decides():
    of_two = [f"{letter}{number}" for letter in "xyz" for number in range(9)]
    expected = ["a", *of_two, "long"]
    assert reading_order(["long", *reversed(of_two)], ["a", *of_two]) == expected


def test_a_token_is_compared_with_what_it_attends_to():
    """With one token besides [CLS] on each side the softmax is 1: the comparison is of those two."""
    model, first, second = teacher(), states([2]), states([2], seed=1)
    a, b = (with_places(text.states, model.waves)[0, 1] for text in (first, second))
    features = torch.cat([a, b, a * b, (a - b).abs()]), torch.cat([b, a, b * a, (b - a).abs()])
    compared = [model.compare(part) for part in features]
    pooled = torch.cat([compared[0], compared[0], compared[1], compared[1]])
    torch.testing.assert_close(model(first, second)[0], model.classify(pooled))


@pytest.mark.parametrize("waves", [1, 16])
def test_places_are_half_sines_and_cosines_behind_the_states(waves):
    texts = states([4, 7]).states
    joined = with_places(texts, waves)
    assert joined.shape == (2, 7, 12 + 2 * waves)
    torch.testing.assert_close(joined[..., :12], texts, rtol=0, atol=0)
    torch.testing.assert_close(joined[1, 3, 12], torch.tensor(0.5 * math.sin(3.0)))
    last = 3.0 * 30 ** -((waves - 1) / waves)  # the slowest wave
    torch.testing.assert_close(joined[0, 3, -1], torch.tensor(0.5 * math.cos(last)))


def test_two_tokens_that_change_places_are_seen_through_their_places_alone():
    """States that carry no order: only the places can tell that two of them were exchanged."""
    first, second = states([5]), states([5], seed=1)
    exchanged = CachedStates(second.states[:, [0, 1, 4, 3, 2]], second.mask)
    for waves, seen in ((0, False), (16, True)):
        torch.manual_seed(0)
        model = AlignmentTeacher(12, 2, hidden=8, waves=waves).eval()
        change = (model(first, second) - model(first, exchanged)).abs().max().item()
        assert (change > 1e-4) == seen


def test_it_reads_both_texts_together():
    """What a word contributes depends on the other text: the logits are no sum of two parts."""
    model = teacher(1)
    a, b, c, d = (states([4], seed=seed) for seed in range(4))
    mixed = model(a, c) - model(a, d) - model(b, c) + model(b, d)
    assert mixed.abs().item() > 1e-4


@pytest.fixture(scope="module")
def smoke():
    return load("smoke")


def test_stored_logits_belong_to_the_stored_pairs(smoke):
    task = smoke["relations"]
    assert task.kind == "multiclass"
    first, second, targets, logits = task.of("test")
    assert len(first) == len(second) == len(targets) == len(logits) == 48
    assert logits.shape[1] == len(task.classes) == 3
    right = (logits.argmax(1) == targets).double().mean().item()
    assert right == pytest.approx(task.scores["test"])
    with pytest.raises(ValueError, match="unknown split"):
        task.of("dev")


def test_a_teacher_learns_its_training_pairs(smoke):
    assert smoke["relations"].scores["train"] > 0.45  # chance 0.33, 64 pairs, four passes


def test_building_twice_gives_the_same_logits(smoke, tmp_path):
    build(tmp_path, "smoke")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(f"{task}.{kind}" for task in smoke for kind in ("json", "safetensors"))
    again = load_file(tmp_path / "relations.safetensors")["test/logits"]
    # Sums are split by threads, so two machines may round differently.
    torch.testing.assert_close(again, smoke["relations"].of("test")[3], rtol=1e-2, atol=1e-2)
