"""Networks of gpu profiles on another device than the processor: nothing they compute with stays behind.

PyTorch's meta device has shapes and no numbers, and mixing it with tensors of the processor is an error.
"""

import pytest
import torch

from reattend.backbones.trained import crossformer, dmt_jepa, hat, inline_attention

ELSEWHERE = torch.device("meta")


def gradients_are_elsewhere(model, loss):
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    return len(gradients) > 4 and all(g.device == ELSEWHERE for g in gradients)


def canvases():
    pixels = torch.zeros(4, 1, 32, 32, device=ELSEWHERE)
    return pixels, torch.zeros(4, dtype=torch.long, device=ELSEWHERE)


@pytest.mark.parametrize("arm", crossformer.SETTINGS["gpu"].arms)
def test_crossformers_follow_their_device(arm):
    model = crossformer.untrained(arm, crossformer.SETTINGS["gpu"], 0).to(ELSEWHERE)
    assert gradients_are_elsewhere(model, crossformer.cross_entropy(model, canvases()))


@pytest.mark.parametrize("arm", inline_attention.SETTINGS["gpu"].arms)
def test_inline_networks_follow_their_device(arm):
    model = inline_attention.untrained(arm, inline_attention.SETTINGS["gpu"].size, 0).to(ELSEWHERE)
    loss = inline_attention.cross_entropy(model, canvases())
    assert gradients_are_elsewhere(model, loss)


@pytest.mark.parametrize(
    ("kind", "arm"),
    [
        (kind, arm)
        for kind in ("signs", "gain", "restoration")
        for arm in getattr(hat.SETTINGS["gpu"], kind).arms
    ],
)
def test_networks_of_hat_follow_their_device(kind, arm):
    task = getattr(hat.SETTINGS["gpu"], kind)
    if kind == "restoration":
        model, shape = hat.untrained_restorer(arm, task, 0), (2, 3, task.crop, task.crop)
    else:
        channels = 1 if task.distance else 2
        model, shape = hat.untrained_solver(arm, task, 0), (2, task.side, task.side, channels)
    model = model.to(ELSEWHERE)
    loss = model(torch.zeros(shape, device=ELSEWHERE)).square().mean()
    assert gradients_are_elsewhere(model, loss)


@pytest.mark.parametrize("arm", dmt_jepa.ARMS)
def test_jepas_follow_their_device(arm):
    setting = dmt_jepa.SETTINGS["gpu"]
    garments = torch.zeros(20, 28, 28, dtype=torch.uint8)
    labels = torch.arange(20) % 10
    batch = next(dmt_jepa.masked_mosaics(garments, labels, setting, 0, ELSEWHERE))
    model = dmt_jepa.untrained(arm, setting, 0).to(ELSEWHERE)
    assert gradients_are_elsewhere(model, dmt_jepa.jepa_loss(arm, model, batch))
    model.update_targets(0.5)
    targets = model.targets(batch[0])
    assert targets.device == ELSEWHERE
