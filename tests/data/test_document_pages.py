"""Rendered pages: kinds, ink, repeatability, and what scrambling keeps."""

import torch

from reattend.data.document_pages import make_pages, phase_scrambled


def test_pages_come_in_turn_and_again():
    pages, kinds = make_pages(4, side=224, seed=3)
    assert kinds == ["text", "chart"] * 2
    assert pages.shape == (4, 3, 224, 224)
    assert torch.equal(pages, make_pages(4, side=224, seed=3)[0])
    assert not torch.equal(pages, make_pages(4, side=224, seed=4)[0])
    assert torch.equal(pages[:, 0], pages[:, 2])


def test_pages_are_mostly_empty_and_have_ink():
    pages, _ = make_pages(6, side=336)
    dark = (pages[:, 0] < 128).double().mean((1, 2))
    assert (dark > 0.01).all()
    assert (dark < 0.5).all()


def test_scrambling_keeps_amplitudes_and_not_the_page():
    pages, _ = make_pages(2, side=224)
    mild = pages // 4 + 96  # far from black and white, so that nothing is clipped
    found = phase_scrambled(mild)
    before, after = (torch.fft.rfft2(x[:, 0].double()).abs() for x in (mild, found))
    assert ((before - after).norm() / before.norm()) < 0.02
    for a, b in zip(mild[:, 0].double(), found[:, 0].double(), strict=True):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.3
    assert torch.equal(found, phase_scrambled(mild))
