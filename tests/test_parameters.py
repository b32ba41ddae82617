"""Parameters are checked with one line that says what is allowed."""

from typing import Literal

import pytest

from reattend.parameters import (
    ParameterError,
    Parameters,
    load_params,
    parameter,
    profile_values,
    resolve,
)


class Example(Parameters):
    length: int = parameter("context length", unit="tokens", ge=16, le=4096)
    gammas: list[float] = parameter("mass", unit="1", gt_each=0, le_each=1, min_length=1)
    mode: Literal["a", "b"] = parameter("which way")


GOOD = {"length": 64, "gammas": [0.5, 1.0], "mode": "a"}


def test_good_values_and_overrides():
    assert resolve(Example, GOOD, {"length": 128}).length == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 8}, r"'length' = 8: must be a whole number in tokens \(>= 16, <= 4096\)"),
        ({"length": [8]}, r"'length' = \[8\]: must be a whole number"),
        ({"length": "many"}, r"'length' = 'many'"),
        ({"gammas": 0.5}, r"'gammas' = 0.5: must be a list of numbers \(at least 1"),
        ({"gammas": []}, r"'gammas' = \[\]"),
        ({"gammas": [0.5, 1.5]}, r"'gammas': every element must be <= 1, got 1.5"),
        ({"gammas": [0]}, r"'gammas': every element must be > 0"),
        ({"mode": "c"}, r"'mode' = 'c': must be one of 'a', 'b'"),
        ({"lenght": 8}, r"unknown parameter 'lenght'; this notebook has: length, gammas, mode"),
    ],
)
def test_bad_values_are_named_in_one_line(change, message):
    with pytest.raises(ParameterError, match=message) as caught:
        resolve(Example, GOOD, change)
    assert "\n" not in str(caught.value)


def test_missing_value():
    with pytest.raises(ParameterError, match=r"no value for the parameter 'mode'"):
        resolve(Example, {"length": 64, "gammas": [1.0]})


def test_unknown_paper_and_profile(root, tmp_path):
    with pytest.raises(ParameterError, match="unknown paper 'nope'"):
        profile_values(root, "nope", "cpu")
    known = next(iter(load_params(root)["papers"]))
    with pytest.raises(ParameterError, match="there are: smoke, cpu, gpu"):
        profile_values(root, known, "fast")
    with pytest.raises(ParameterError, match=r"no params\.yaml"):
        load_params(tmp_path)
    (tmp_path / "params.yaml").write_text("profile: cpu")
    with pytest.raises(ParameterError, match="needs the keys"):
        load_params(tmp_path)
