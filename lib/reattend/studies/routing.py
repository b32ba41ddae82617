"""What is asked of trained routing models: whether the future leaks, and where their heads attend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reattend.backbones.trained.routing_transformer import routing_layers
from reattend.language_modeling.routing_transformer import Rule
from reattend.trunks.language import Trunk


def set_rule(model: Trunk, rule: Rule) -> None:
    """Let all routing layers choose clusters from the "whole" row or from the "past" alone."""
    for layer in routing_layers(model):
        layer.rule = rule


@contextlib.contextmanager
def held_members(model: Trunk) -> Iterator[None]:
    """The clusters of the first pass inside the block serve all later ones."""

    def first_of(ask):
        kept: list[Tensor] = []

        def members(scores: Tensor) -> Tensor:
            if not kept:
                kept.append(ask(scores))
            return kept[0]

        return members

    layers = routing_layers(model)
    for layer in layers:
        layer.members = first_of(layer.members)
    try:
        yield
    finally:
        for layer in layers:
            del layer.members


@torch.no_grad()
def changes_of_the_past(
    model: Trunk, rows: Int[Tensor, "rows length"], rule: Rule, hold: bool = False
) -> tuple[float, float]:
    """What happens to the states of the first half when the second half of a row is another row's.

    Args:
        rows: at least two; each gets the second half of the one before.
        rule: how clusters are chosen.
        hold: keep the memberships of the unchanged rows.

    Returns:
        the norm of the largest change, and the share of states, in %, that change by more than 1 % of
        their norm.
    """
    half = rows.shape[1] // 2
    replaced = torch.cat([rows[:, :half], rows.roll(1, 0)[:, half:]], 1)
    set_rule(model, rule)
    with held_members(model) if hold else contextlib.nullcontext():
        states, others = (model.hidden(x)[:, :half] for x in (rows, replaced))
    moved = (states - others).norm(dim=-1)
    share = (moved > 0.01 * states.norm(dim=-1)).double().mean()
    return moved.max().item(), 100 * share.item()


@torch.no_grad()
def head_weights(
    model: Trunk, rows: Int[Tensor, "rows length"]
) -> list[Float[Tensor, "rows heads queries keys"]]:
    """Attention of every layer with clusters of the whole row, local heads first."""
    set_rule(model, "whole")
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, x, _: seen.append(module.weights(x[0])))
        for layer in routing_layers(model)
    ]
    try:
        torch.manual_seed(0)
        model(rows)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
