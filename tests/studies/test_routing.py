"""Leak and heads of routing models, against direct computation."""

import pytest
import torch

from reattend.backbones.trained.routing_transformer import (
    SETTINGS,
    recall_rows,
    routing_layers,
    untrained,
)
from reattend.studies.routing import changes_of_the_past, head_weights, held_members, set_rule

SETTING = SETTINGS["smoke"]
ROWS = recall_rows(SETTING, 4, torch.Generator().manual_seed(0))[0]


def model(arm="routing"):
    made = untrained(arm, SETTING, 0).double()
    made(ROWS)  # the first training pass sets the centroids
    return made.eval()


def test_only_clusters_of_the_whole_row_leak():
    made = model()
    assert changes_of_the_past(made, ROWS, "whole", hold=True) == (pytest.approx(0, abs=1e-9), 0)
    assert changes_of_the_past(made, ROWS, "past") == (pytest.approx(0, abs=1e-9), 0)
    largest, share = changes_of_the_past(made, ROWS, "whole")
    assert largest > 1e-3
    assert 0 < share <= 100


def test_the_share_counts_states_of_the_first_half_alone():
    made = model("local")
    assert changes_of_the_past(made, ROWS, "whole") == (0, 0)


def test_held_members_are_given_back():
    made = model()
    other = ROWS.flip(0)
    with held_members(made):
        made.hidden(ROWS)
        held = made.hidden(other)
    free = made.hidden(other)
    assert not torch.allclose(held, free)
    assert all("members" not in vars(layer) for layer in routing_layers(made))


def test_weights_are_those_of_the_layers_inputs():
    made = model()
    set_rule(made, "past")
    weights = head_weights(made, ROWS)
    assert [w.shape for w in weights] == [(4, SETTING.heads, SETTING.length, SETTING.length)] * 2
    first = made.blocks[0]
    x = first.mixer_norm(made.tokens(ROWS))
    shifted = x.lerp(torch.nn.functional.pad(x, (0, 0, 1, -1)), first.mixer.share)
    torch.testing.assert_close(weights[0], first.mixer.mixer.weights(shifted))
    assert not routing_layers(made)[0]._forward_hooks
