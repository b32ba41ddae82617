"""Local attribution maps on functions whose attributions are known."""

import pytest
import torch
from scipy.ndimage import correlate1d

from reattend.studies.lam import blurred, diffusion_index, gini, local_attribution, structure


def picture(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def test_structure_by_a_loop():
    x = picture(2, 3, 5, 4)
    found = [
        sum(
            ((one[c, i + 1, j] - one[c, i, j]) ** 2 + (one[c, i, j + 1] - one[c, i, j]) ** 2) ** 0.5
            for c in range(3)
            for i in range(4)
            for j in range(3)
        )
        for one in x
    ]
    torch.testing.assert_close(structure(x), torch.stack(found))


@pytest.mark.parametrize("sigma", [0.5, 1.2])
def test_blur_is_scipys(sigma):
    x = picture(2, 11, 13)
    line = torch.exp(-(torch.arange(-4.0, 5, dtype=torch.float64) ** 2) / (2 * (sigma + 1e-5) ** 2))
    line = (line / line.sum()).numpy()
    expected = x.numpy()
    for axis in (1, 2):
        expected = correlate1d(expected, line, axis=axis, mode="mirror")
    torch.testing.assert_close(blurred(x, sigma), torch.from_numpy(expected), atol=1e-12, rtol=0)
    torch.testing.assert_close(blurred(x, 0.0), x, atol=1e-12, rtol=0)


def test_contributions_sum_to_the_rise():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(8, 3, 3, padding=1)
    ).double()
    x = picture(3, 16, 16)
    contributions, rise = local_attribution(model, x, (6, 6), 5, steps=400)
    assert contributions.shape == x.shape
    assert rise > 0
    assert abs(contributions.sum().item() / rise - 1) < 0.01
    # nothing beyond the patch, its forward differences and the two convolutions
    seen = contributions.abs().sum(0) > 0
    assert not seen[:4].any()
    assert not seen[13:].any()
    assert seen[4:12, 4:12].all()
    assert not seen[12, 12]


def test_the_network_that_copies_uses_the_patch_alone():
    x = picture(3, 12, 12)
    contributions, _ = local_attribution(lambda y: y, x, (3, 4), 4, steps=10)
    seen = contributions.abs().sum(0) > 0
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[3:7, 4:8] = True
    expected[6, 7] = False  # no forward difference begins or ends there
    assert torch.equal(seen, expected)
    enlarged, _ = local_attribution(lambda y: 2 * y, x, (3, 4), 4, steps=10)
    torch.testing.assert_close(enlarged, 2 * contributions)


def test_flat_pictures_have_no_attribution():
    contributions, rise = local_attribution(lambda y: y, torch.full((3, 8, 8), 0.5), (2, 2), 3, 5)
    assert contributions.abs().max() < 1e-6
    assert abs(rise) < 1e-4


def test_gini_and_diffusion_index():
    assert gini(torch.ones(50)) == pytest.approx(0, abs=1e-12)
    single = torch.zeros(3, 5, 8)
    single[1, 2, 3] = -7.0
    assert gini(single.abs().sum(0)) == pytest.approx(1 - 1 / 40)
    assert diffusion_index(single) == pytest.approx(100 / 40, abs=1e-3)
    assert diffusion_index(torch.full((3, 5, 8), 2.0)) == pytest.approx(100)
    values = picture(30)
    pairs = (values[:, None] - values).abs().sum() / (2 * 30 * values.sum())
    assert gini(values) == pytest.approx(pairs.item())
    # what one colour adds and another takes away cancels out
    assert diffusion_index(torch.stack([single[1], single[1]])) == pytest.approx(100 / 40, abs=1e-3)
