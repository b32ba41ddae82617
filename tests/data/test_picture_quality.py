"""PSNR and SSIM against their definitions, on odd sizes."""

import math

import pytest
import torch

from reattend.data.picture_quality import luma, psnr, ssim


def pictures(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_luma_of_known_colours():
    # ITU-R BT.601: black 16, white 235, pure red 81.481, green 144.553, blue 40.966
    colours = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    found = luma(colours[:, :, None, None]).flatten()
    expected = torch.tensor([16.0, 235, 81.481, 144.553, 40.966])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_psnr_of_a_known_difference():
    original = 0.5 * pictures(2, 3, 9, 7) + 0.2
    moved = original + 0.1  # luma rises by 21.9
    expected = 20 * math.log10(255 / 21.9)
    torch.testing.assert_close(
        psnr(moved, original), torch.full((2,), expected).double(), atol=1e-4, rtol=0
    )
    assert psnr(original, original).isinf().all()
    edged = original.clone()
    edged[:, :, 0] += 0.1
    assert psnr(edged, original, border=1).isinf().all()
    assert not psnr(edged, original).isinf().any()
    # What is out of range is clipped first.
    torch.testing.assert_close(
        psnr(original + 5, original), psnr(torch.ones_like(original), original)
    )


@pytest.mark.parametrize("border", [0, 2])
def test_ssim_by_a_loop_over_windows(border):
    x, y = pictures(1, 3, 17, 16), pictures(1, 3, 17, 16, seed=1)
    y = 0.7 * x + 0.3 * y
    a, b = luma(x)[0].double(), luma(y)[0].double()
    if border:
        a, b = (z[border:-border, border:-border] for z in (a, b))
    line = torch.tensor([math.exp(-((i - 5) ** 2) / 4.5) for i in range(11)]).double()
    weights = torch.outer(line, line) / line.sum() ** 2
    found = []
    for row in range(a.shape[0] - 10):
        for column in range(a.shape[1] - 10):
            p, q = (z[row : row + 11, column : column + 11] for z in (a, b))
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
            c = (weights * (p - mp) * (q - mq)).sum()
            one, two = 6.5025, 58.5225  # (.01 x 255)², (.03 x 255)²
            top = (2 * mp * mq + one) * (2 * c + two)
            found.append(top / ((mp**2 + mq**2 + one) * (vp + vq + two)))
    torch.testing.assert_close(ssim(x, y, border)[0], torch.stack(found).mean(), atol=1e-6, rtol=0)
    torch.testing.assert_close(ssim(x, x), torch.ones(1).double())


def test_batches_are_scored_picture_by_picture():
    x, y = pictures(2, 2, 3, 16, 15), pictures(2, 2, 3, 16, 15, seed=1)
    for score in (psnr, ssim):
        found = score(x, y)
        assert found.shape == (2, 2)
        torch.testing.assert_close(found[1, 0], score(x[1, 0], y[1, 0]))


def test_numbers_of_scikit_image():
    """Of scikit-image 0.26 on the luma of two pictures of waves: population covariance, Gaussian windows."""
    places = torch.arange(3 * 19 * 23, dtype=torch.float64).view(3, 19, 23)
    one = 0.5 + 0.4 * torch.sin(0.37 * places)
    two = 0.5 + 0.3 * torch.sin(0.37 * places + 0.3)
    assert ssim(one, two).item() == pytest.approx(0.9194611471572046, abs=1e-12)
    assert psnr(one, two).item() == pytest.approx(25.945861071408494, abs=1e-12)
