"""Points are bought where they decide; params.yaml says what was run."""

import pytest

from reattend.pipeline.errors import CommandError
from reattend.pipeline.grow import set_parameter
from reattend.pipeline.power import points_for
from reattend.records import Test
from tests.pipeline.toy import EXPERIMENT, Checkout

GROW = {"parameter": "n", "unit": "seed", "looks": [4, 8, 16]}


@pytest.fixture
def checkout(tmp_path):
    """A toy whose mean of .75 with spread .2 lies just above its bound of .5."""
    made = Checkout(tmp_path, ["toy"], dvc=False)
    spread = EXPERIMENT.replace(
        "values = 1 + P.scales[0] * random.standard_normal(P.n)",
        "values = 0.75 + 0.2 * (-1.0) ** np.arange(P.n)",
    )
    made.write_paper("toy", spread, grow=GROW)
    set_n(made, 4)
    made.reattend("run", "toy", check=True)
    return made


def set_n(checkout, n):
    params = checkout.root / "params.yaml"
    params.write_text(set_parameter(params.read_text(), "toy", "cpu", "n", n))


def test_power_tells_what_would_decide(checkout):
    done = checkout.reattend("power", check=True)
    first, last = done.stdout.splitlines()
    assert first.startswith("toy: gain.mean: 4 seeds of ")
    assert last == "1 open tests at profile cpu"


def test_growing_stops_when_all_is_decided(checkout):
    before = (checkout.root / "params.yaml").read_text()
    done = checkout.reattend("grow", check=True)
    assert "toy: n = 8, about" in done.stdout
    assert "toy: decided gain in" in done.stdout
    assert "n = 16" not in done.stdout
    after = (checkout.root / "params.yaml").read_text()
    changed = [
        (a, b) for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b
    ]
    assert len(changed) == 1  # one value, everything else as it was
    assert "0 looks in 0 s" in checkout.reattend("grow", check=True).stdout


def test_a_failing_look_leaves_the_parameters(checkout):
    before = (checkout.root / "params.yaml").read_text()
    broken = EXPERIMENT + "\nassert P.n < 5, 'too many'\n"
    checkout.write_paper("toy", broken, grow=GROW)
    done = checkout.reattend("grow")
    assert done.returncode == 1
    assert "too many" in done.stdout
    assert (checkout.root / "params.yaml").read_text() == before


def test_no_look_is_begun_that_would_not_end(checkout):
    done = checkout.reattend("grow", "--budget", "0.01s", check=True)
    assert "0 looks in 0 s; what is open:" in done.stdout


def test_a_value_that_is_no_look_is_refused(checkout):
    set_n(checkout, 5)
    done = checkout.reattend("grow")
    assert done.returncode == 2
    assert "n: 5 at cpu, which is none of the record's looks [4, 8, 16]" in done.stderr


def test_pilots_before_a_run(checkout):
    done = checkout.reattend("power", "toy", "--pilot", "gain.mean=0.8:0.2", check=True)
    assert done.stdout.startswith("gain.mean: about ")
    for pilot in ("gain.mean", "gain.mean=1", "gain.mean=1:0", "gain.other=1:1", "x=1:nan"):
        assert checkout.reattend("power", "toy", "--pilot", pilot).returncode == 2


def test_points_for_a_pilots_spread():
    """Half-width t s / sqrt(n) must fall to 1: s = 2 needs 18 points (t = 2.11, 2.11 * 2 / sqrt(18) = .99)."""
    test = Test(id="t", measures="m", better="higher", unit="seed", reproduced=0, negligible=0.5)
    assert points_for(test, 1.0, 2.0) == 18
    assert points_for(test.model_copy(update={"negligible": 1e-9}), 0.0, 2.0) is None


def test_setting_a_parameter_keeps_the_rest():
    text = (
        "profile: cpu\npapers:\n  a:\n    cpu:\n      n: 4  # seeds\n  b:\n    cpu:\n      n: 4\n"
    )
    assert set_parameter(text, "b", "cpu", "n", 8) == text[:-2] + "8\n"
    assert "n: 8  # seeds" in set_parameter(text, "a", "cpu", "n", 8)
    with pytest.raises(CommandError, match="no line for a, gpu, n"):
        set_parameter(text, "a", "gpu", "n", 8)
