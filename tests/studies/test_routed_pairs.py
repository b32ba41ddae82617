"""Routed regions of trained models, and tables of displaced pairs."""

import numpy as np
import pytest
import torch

from reattend.studies.routed_pairs import patterns_table, regions_table, routes
from reattend.trunks.vision import Stage, VisionTrunk
from reattend.vision.biformer import Attention, bra_cost, routed


def test_routes_are_those_that_each_block_takes():
    torch.manual_seed(0)
    stage = Stage(12, 2, lambda width, stride: Attention(width, 3, routed(4, 3), lce=0))
    model = VisionTrunk(2, [stage], stem_stride=4, channels=1, position=False).eval()
    canvases = torch.randint(256, (5, 1, 32, 32), dtype=torch.uint8)
    found = routes(model, canvases, side=4, topk=3)
    assert [x.shape for x in found] == [(5, 16, 3)] * 2
    assert not torch.equal(*found)
    mixers = [block.mixer for block in model.blocks]
    assert not any(mixer._forward_pre_hooks for mixer in mixers)
    given = []
    handle = mixers[1].register_forward_pre_hook(lambda _, x: given.append(x[0]))
    with torch.no_grad():
        model(canvases)
        handle.remove()
        query, key, _ = mixers[1].project(given[0])
    regions = [x.reshape(5, 4, 2, 4, 2, 12).mean((2, 4)).flatten(1, 2) for x in (query, key)]
    affinity = regions[0] @ regions[1].mT
    own = affinity.gather(2, found[1]).sort(-1).values
    torch.testing.assert_close(own, affinity.topk(3).values.sort(-1).values)


def test_patterns_table_counts_seeds_that_solve_the_task():
    scores = {"routed": [96.0, 94.0, 98.0], "full": [99.0, 99.5, 100.0]}
    table = patterns_table(scores, {"routed": 10.0, "full": 40.0}, {"routed": 82.7})
    assert table["keys per query"].tolist() == [16, 64]
    assert table["multiply-adds of an attention"].tolist() == [10, 40]
    assert table["accuracy (%)"].tolist() == pytest.approx([96, 99.5])
    assert table["seeds above 95 %"].tolist() == [2, 3]
    assert table["lowest"].tolist() == [94, 99]
    assert table["ImageNet, reported (%)"][0] == 82.7
    assert np.isnan(table["ImageNet, reported (%)"][1])


def test_regions_table_is_in_order_with_the_cost_of_each_size():
    table = regions_table({(4, 16): [90.0], (2, 1): [60.0, 70.0], (4, 2): [80.0]}, width=32)
    assert list(zip(table["S"], table["k"], strict=True)) == [(2, 1), (4, 2), (4, 16)]
    assert table["keys per query"].tolist() == [16, 8, 64]
    assert table["accuracy (%)"].tolist() == [65, 80, 90]
    assert table["multiply-adds"][1] == bra_cost(64, 4, 2, 32).attention
