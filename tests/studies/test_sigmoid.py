"""What the study of sigmoid attention trains on and reads off, against plain computations."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from reattend.data.images import ImageSet
from reattend.data.word_tokens import random_windows
from reattend.language_modeling import sigmoid_attention as method
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


def models(**changes) -> study.ByteModels:
    stream = torch.randint(256, (5_000,), generator=torch.Generator().manual_seed(3))
    sizes = {"length": 12, "batch": 4, "width": 8, "layers": 2, "device": torch.device("cpu")}
    return study.ByteModels(stream, **(sizes | changes))


def test_every_activation_starts_from_the_same_weights():
    first, second = (
        models().untrained(arm, 4).state_dict()
        for arm in ({"heads": 2, "bias": -2.5}, {"heads": 2, "activation": "softmax"})
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["tokens.weight"].std().item() == pytest.approx(8**-0.5, rel=0.1)


def test_layer_scale_holds_both_branches_of_every_layer():
    model = models().untrained({"heads": 2, "layer_scale": 0.1}, 0)
    for block in model.blocks:
        for branch in (block.mixer, block.feed_forward):
            torch.testing.assert_close(branch.gamma, torch.full((8,), 0.1))


def test_rows_and_weights_depend_on_the_seed_alone():
    arm = {"heads": 2, "bias": -2.5}
    first, again, other = (models().train(arm, seed, 0.01, [20]) for seed in (0, 0, 1))
    assert first.log.losses == again.log.losses
    assert first.log.losses != other.log.losses
    assert len(first.norms) == len(first.log.losses) == 20
    # The first rows of a seed are the same whatever the arm: an untrained softmax has their loss.
    unlike = models().train({"heads": 2, "activation": "softmax"}, 0, 0.01, [20])
    windows = random_windows(models().stream, 4, 13, torch.Generator().manual_seed(0))
    start = models().untrained({"heads": 2, "activation": "softmax"}, 0)
    expected = study.next_byte_loss(start, next(windows)).item()
    assert unlike.log.losses[0] == pytest.approx(expected, rel=1e-6)


def test_a_model_is_the_mean_of_its_weights_before_the_stop():
    model = trunk()
    averages, note = study.tail_averages(model, [3, 12, 24])
    for step in range(24):
        with torch.no_grad():
            for weights in model.parameters():
                weights.fill_(step)
        note(step)
    # The last sixth, one step at least: step 2; 10 and 11; 20 to 23.
    for stop, expected in {3: 2.0, 12: 10.5, 24: 21.5}.items():
        assert not averages[stop].training
        for weights in averages[stop].parameters():
            torch.testing.assert_close(weights, torch.full_like(weights, expected))


def test_an_earlier_stop_is_a_shorter_training():
    arm = {"heads": 2, "bias": -2.5}
    both = models().train(arm, 0, 0.01, [20, 40])
    alone = models().train(arm, 0, 0.01, [20])
    assert len(both.log.losses) == 40
    assert both.log.losses[:20] == alone.log.losses
    for name, weights in both.models[20].state_dict().items():
        torch.testing.assert_close(weights, alone.models[20].state_dict()[name])
    assert not torch.equal(both.models[40].tokens.weight, both.models[20].tokens.weight)


def test_training_lowers_the_loss_of_what_can_be_predicted():
    stream = torch.arange(5_000) % 7
    run = study.ByteModels(stream, 12, 4, 8, 1, torch.device("cpu")).train(
        {"heads": 2}, 0, 0.02, [150]
    )
    assert run.log.losses[-1] < 0.2 * run.log.losses[0]


def pictures(count: int = 40) -> ImageSet:
    """Dark and bright pictures, labelled 0 and 1."""
    labels = torch.arange(count) % 2
    noise = torch.randint(60, (count, 3, 28, 28), generator=torch.Generator().manual_seed(0))
    pixels = (noise + 180 * labels[:, None, None, None]).to(torch.uint8)
    whole = torch.full((count, 28, 28), 255, dtype=torch.uint8)
    names = tuple(str(place) for place in range(count))
    return ImageSet(pixels, whole, labels, ("dark", "bright"), names, ("train",) * count, names)


def pieces() -> study.Pieces:
    return study.Pieces.of(pictures(), torch.device("cpu"))


def test_pieces_are_means_of_four_by_four_pixels():
    given, found = pictures(), pieces()
    assert found.pixels.shape == (40, 49)
    block = given.pixels[3, 0, 4:8, 20:24].double().mean() / 255
    # Second row of blocks, sixth column.
    assert found.pixels[3, 7 + 5].item() == pytest.approx(((block - 0.286) / 0.3).item(), rel=1e-5)


def test_a_sheet_is_labelled_by_what_lies_at_the_asked_place():
    found = pieces()
    first, second = (next(found.sheets(200, seed=3)) for _ in range(2))
    assert first.pieces.shape == (200, 16, 49)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.asked, next(found.sheets(200, seed=4)).asked)
    assert set(first.asked.tolist()) == set(range(16))
    for sheet, asked, label in zip(*first, strict=True):
        # Bright pictures are class 1: the mean pixel tells.
        assert (sheet[asked].mean() > 0.4).item() == bool(label)


@pytest.mark.parametrize("arm", [{"activation": "softmax"}, {"bias": -2.8}, {"activation": "mean"}])
def test_the_reader_sees_all_places_and_the_question(arm):
    torch.manual_seed(0)
    model = study.SheetReader(arm, width=8, layers=1)
    sheets = next(pieces().sheets(2, seed=0))
    before = model(sheets)
    assert before.shape == (2, 10)
    for place in (0, 15):
        changed = sheets.pieces.clone()
        changed[:, place] += 1
        assert not torch.allclose(model(sheets._replace(pieces=changed)), before)
    assert not torch.allclose(model(sheets._replace(asked=15 - sheets.asked)), before)


def test_the_linear_reader_is_linear_in_pixels_and_place():
    model, sheets = study.LinearReader(), next(pieces().sheets(3, seed=0))
    places = F.one_hot(sheets.asked, 16).float()
    expected = F.linear(sheets.pieces.flatten(1), model.head.weight, model.head.bias)
    torch.testing.assert_close(model(sheets), expected + places @ model.question.weight)


class Told(torch.nn.Module):
    """Logistic regression on the asked picture alone."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(49, 10)

    def forward(self, sheets):
        return self.head(sheets.pieces[torch.arange(len(sheets.asked)), sheets.asked])


def test_a_fitted_reader_tells_dark_from_bright():
    held_out = next(pieces().sheets(200, seed=9))
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = Told()
        assert study.fit_reader(model, pieces(), 8, 0.02, 60, seed) is model
        assert study.accuracy(model, held_out) == 100
        models.append(model.head.weight)
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])


def test_accuracy_is_in_per_cent():
    class Zero(torch.nn.Module):
        def forward(self, sheets):
            return F.one_hot(torch.zeros(len(sheets.labels), dtype=torch.long), 2).float()

    sheets = next(pieces().sheets(30, seed=0))
    assert study.accuracy(Zero(), sheets) == pytest.approx(
        100 * (sheets.labels == 0).double().mean()
    )


def test_jacobian_norms_are_those_of_single_heads():
    found = study.jacobian_norms([1.0, 8.0], 2, 5, torch.device("cpu"), length=5, width=4)
    draw = torch.Generator().manual_seed(5)
    w_q, w_k, w_v, _ = (
        torch.randn(2, rows, 4, generator=draw, dtype=torch.float64) / 2 for rows in (4, 4, 4, 5)
    )
    x = method.outlier_tokens(2, 5, 4, 8.0, torch.Generator().manual_seed(6))
    b = method.length_bias(5)
    for name, options in {
        "softmax": ("softmax", 0.0),
        "sigmoid": ("sigmoid", b),
        "sigmoid b = 0": ("sigmoid", 0.0),
    }.items():
        for place in range(2):
            a = w_q[place] @ w_k[place].T / 2
            jacobian = torch.autograd.functional.jacobian(
                lambda y, place=place, a=a, options=options: method.single_head(
                    y, a, w_v[place], *options
                ),
                x[place],
            )
            exact = torch.linalg.matrix_norm(jacobian.reshape(20, 20), 2).item()
            # 60 steps of power iteration approach the norm from below.
            assert 0.99 * exact < found[name][1, place] <= exact * (1 + 1e-9)
    a = w_q[1] @ w_k[1].T / 2
    assert found["bound"][1, 1] == pytest.approx(
        method.sigmoid_jacobian_bound(x[1], a, w_v[1], b).item()
    )
    assert (found["sigmoid"] <= found["bound"]).all()
    assert {values.shape for values in found.values()} == {(2, 2)}
