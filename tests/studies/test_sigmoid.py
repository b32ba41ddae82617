"""What the study of sigmoid attention trains on and reads off, against plain computations."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reattend.data.mqar import RecallTask
from reattend.language_modeling.sigmoid_attention import Attention
from reattend.studies import sigmoid as study
from reattend.trunks.language import Trunk


def trunk(seed: int = 0, layers: int = 2) -> Trunk:
    torch.manual_seed(seed)
    return Trunk(256, 8, [lambda width: Attention(width, 2, bias=-2.0)] * layers)


def rows(seed: int, count: int = 7, length: int = 9) -> torch.Tensor:
    return torch.randint(256, (count, length), generator=torch.Generator().manual_seed(seed))


def test_bytes_of_a_text_are_its_tokens():
    assert study.Bytes().encode("Aé").tolist() == [65, 0xC3, 0xA9]


def test_even_rows_are_pieces_of_the_text_at_even_distances():
    text = "".join(chr(97 + place % 26) for place in range(100))
    found = study.even_rows([text], rows=4, length=10)
    assert found.shape == (4, 10)
    starts = [text.index(bytes(row.tolist()).decode()) % 26 for row in found]
    assert [(b - a) % 26 for a, b in itertools.pairwise(starts)] == [22] * 3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_loss_is_that_of_the_next_byte(seed):
    model, given = trunk(seed), rows(seed, count=120)
    logs = model(given[:, :-1]).log_softmax(-1)
    expected = -logs.gather(-1, given[:, 1:, None]).mean()
    torch.testing.assert_close(study.next_byte_loss(model, given), expected)
    # 120 rows are two parts of fifty and one of twenty: rows count alike, not parts.
    assert study.test_loss(model, given) == pytest.approx(expected.item(), rel=1e-5)


def test_norms_are_of_every_training_step_and_of_no_other():
    model = trunk()
    norms = study.watch_norms(model)
    given = rows(0)
    outputs = []
    for block in model.blocks:
        block.mixer.register_forward_hook(lambda m, i, o: outputs.append(o.norm(dim=-1).mean()))
    model.train()
    model(given)
    model.eval()
    model(given)
    assert norms == [pytest.approx(torch.stack(outputs[:2]).mean().item())]


def test_another_bias_holds_inside_the_block_only():
    model = trunk()
    with study.other_bias(model, -5.0):
        assert [block.mixer.bias for block in model.blocks] == [-5.0, -5.0]
    with study.other_bias(model, None):
        assert [block.mixer.bias for block in model.blocks] == [-2.0, -2.0]
    assert [block.mixer.bias for block in model.blocks] == [-2.0, -2.0]


def test_recall_is_measured_eight_times():
    task = RecallTask(vocabulary=32, length=8, pairs=2)
    arm = {"activation": "softmax"}
    curve = study.recall_curve(arm, task, seed=0, steps=16, device=torch.device("cpu"))
    assert len(curve) == 8
    assert all(0 <= value <= 100 for value in curve)


@pytest.mark.parametrize("arm", [{"activation": "softmax"}, {"bias": -3.9}, {"activation": "mean"}])
def test_the_image_classifier_sees_all_patches(arm):
    torch.manual_seed(0)
    model = study.ImageClassifier(arm, width=8, layers=1)
    assert len(model.positions) == (28 // 4) ** 2
    pixels = torch.randint(256, (2, 3, 28, 28), dtype=torch.uint8)
    before = model(pixels)
    assert before.shape == (2, 10)
    for corner in ((0, 0), (27, 27)):
        changed = pixels.clone()
        changed[:, 0, corner[0], corner[1]] ^= 128
        assert not torch.allclose(model(changed), before)


def test_the_linear_classifier_is_linear_in_the_pixels():
    model = study.LinearClassifier()
    pixels = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8)
    expected = F.linear(pixels.flatten(1) / 255 - 0.5, model.head.weight, model.head.bias)
    torch.testing.assert_close(model(pixels), expected)
    assert [type(layer) for layer in model.children()] == [nn.Linear]
