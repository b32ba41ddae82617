"""Canvases with one picture: where it lies, what surrounds it, what is asked."""

import pytest
import torch

from reattend.data.lone_pictures import lone_pictures


@pytest.mark.parametrize(("side", "size", "channels"), [(3, 4, 1), (5, 2, 3)])
def test_one_cell_holds_the_picture_and_all_are_asked_its_class(side, size, channels):
    pictures = torch.arange(1, 7, dtype=torch.uint8)[:, None, None, None]
    pictures = pictures.expand(6, channels, size, size) + torch.arange(size, dtype=torch.uint8)
    classes = torch.tensor([0, 1, 2, 0, 1, 2])
    generator = torch.Generator().manual_seed(0)
    canvases, labels = lone_pictures(pictures, classes, 400, side, generator)
    assert canvases.shape == (400, channels, side * size, side * size)
    assert labels.shape == (400, side, side)
    found = set()
    for canvas, label in zip(canvases, labels, strict=True):
        lit = canvas[0, ::size, ::size].nonzero()
        assert len(lit) == 1
        row, column = (place * size for place in lit[0].tolist())
        cell = canvas[:, row : row + size, column : column + size]
        number = int(cell[0, 0, 0]) - 1
        assert torch.equal(cell, pictures[number])
        assert canvas.long().sum() == cell.long().sum()
        assert (label == classes[number]).all()
        found.add((row // size, column // size, number))
    assert {place[:2] for place in found} == {(r, c) for r in range(side) for c in range(side)}
    assert {place[2] for place in found} == set(range(6))
