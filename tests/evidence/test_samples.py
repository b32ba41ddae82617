"""Samples: labels, units, refusals."""

import numpy as np
import pytest
import torch

from reattend.evidence import Exact, Sample
from reattend.evidence.samples import points


def test_repeated_measurements_of_a_unit_are_one_point():
    sample = Sample([1.0, 3.0, 10.0, 20.0], seed=["a", "a", "b", "b"])
    kept = points(sample, "seed")
    assert kept.labels == {"seed": ("a", "b")}
    assert kept.quantities["value"].tolist() == [2.0, 15.0]


def test_items_of_one_trained_model_are_one_point():
    kept = points(Sample(np.array([[1.0, 2.0], [3.0, 7.0]]), seed=[0, 1], item=["x", "y"]), "seed")
    assert kept.quantities["value"].tolist() == [1.5, 5.0]
    assert kept.unit == "seed"


def test_a_matrix_is_unfolded_row_by_row():
    kept = points(Sample([[1.0, 2.0], [3.0, 4.0]], seed=[7, 8], item=["x", "y"]), "seed x item")
    assert kept.labels == {"seed": ("7", "7", "8", "8"), "item": ("x", "y", "x", "y")}
    assert kept.quantities["value"].tolist() == [1, 2, 3, 4]


def test_points_keep_six_digits():
    assert points(Sample([1 / 3], item=[0]), "item").quantities["value"][0] == 0.333333
    assert points(Exact(2 / 3), "exact").quantities["value"][0] == 0.666667


def test_several_quantities_share_their_units():
    sample = Sample({"a": [1.0, 2.0, 3.0], "b": [4.0, 5.0, 9.0]}, item=[0, 1, 1])
    kept = points(sample, "item")
    assert kept.quantities["a"].tolist() == [1.0, 2.5]
    assert kept.quantities["b"].tolist() == [4.0, 7.0]


def test_labels_of_numpy_and_torch_are_those_of_python():
    for labels in (range(2), np.arange(2), torch.arange(2)):
        assert points(Sample(torch.tensor([1.0, 2.0]), seed=labels), "seed").labels["seed"] == (
            "0",
            "1",
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sample([1.0, float("nan")], seed=[0, 1]), "NaN or infinite"),
        (lambda: Sample([1.0]), "names its units"),
        (lambda: Sample([], seed=[]), "without measurements"),
        (lambda: Sample([1.0, 2.0], seed=[0]), "one label for each value"),
        (lambda: Sample({"a": [1.0], "b": [1.0, 2.0]}, seed=[0]), "one label for each value"),
        (lambda: Sample([[1.0, 2.0]], seed=[0]), "takes seed= for its rows and item="),
        (lambda: Sample([[1.0, 2.0]], seed=[0, 1], item=[0]), "a seed for each row"),
        (lambda: Exact(float("inf")), "must be finite"),
        (lambda: points(Sample([1.0], item=[0]), "seed"), "needs the label 'seed'; given: item"),
        (lambda: points(Sample([1.0], item=[0]), "seed x item"), "needs the label 'seed'"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_exact_numbers_and_samples_are_not_exchanged():
    with pytest.raises(TypeError, match="takes Exact"):
        points(Sample([1.0], item=[0]), "exact")
    with pytest.raises(TypeError, match="takes Sample"):
        points(Exact(1.0), "item")
