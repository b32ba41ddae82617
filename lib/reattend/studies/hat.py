"""What is asked of HAT, its parts and its rivals: who sees what, errors by pixel, restored photographs, diffusion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from reattend.backbones.trained.hat import Restoration, Task, TaskNetwork
from reattend.data.photographs import photographs, spoil
from reattend.data.picture_quality import luma, psnr, ssim
from reattend.data.window_tasks import has_source, source_in_window
from reattend.studies.lam import diffusion_index, local_attribution, path_contributions
from reattend.trunks.language import parameter_count
from reattend.trunks.vision import multiply_adds
from reattend.vision.hat import HAT, SIZES, enlarge

# Reach --------------------------------------------------------------------------------------------


def pixels_seen(
    module: Callable[[Tensor], Tensor],
    x: Float[Tensor, "1 height width dim"],
    pixel: tuple[int, int],
) -> Bool[Tensor, "height width"]:
    """Pixels of a map on which the output at one pixel depends, by its gradient."""
    x = x.detach().requires_grad_()
    module(x)[0, pixel[0], pixel[1]].sum().backward()
    return x.grad[0].abs().sum(-1) > 0


def pixel_classes(task: Task) -> dict[str, Bool[Tensor, "side side"]]:
    """Pixels of the displaced signs by which windows join them with their source."""
    window = task.config.window
    plain = source_in_window(task.side, task.distance, window)
    shifted = source_in_window(task.side, task.distance, window, window // 2)
    some = has_source(task.side, task.distance)
    return {"plain": plain, "shifted only": shifted & ~plain, "neither": some & ~plain & ~shifted}


def mean_error(
    errors: Float[Tensor, "seeds side side"], pixels: Bool[Tensor, "side side"] | None = None
) -> Float[Tensor, " seeds"]:
    """Error of each seed over some of the pixels (all by default), per cent of the targets' variance."""
    chosen = errors.flatten(1) if pixels is None else errors[:, pixels]
    return 100 * chosen.double().mean(1)


def best_from(readings: int, noise: float) -> float:
    """Per cent of a faint gain's variance that the best answer from so many readings leaves."""
    return 100 * noise**2 / (noise**2 + readings)


@torch.no_grad()
def task_errors(
    models: Sequence[TaskNetwork], task: Task, items: int
) -> Float[Tensor, "seeds side side"]:
    """Squared error of every network and pixel on new maps, over the variance of the targets."""
    maps = task.draw(items, Generator().manual_seed(99))
    variance = maps.targets[:, has_source(task.side, task.distance)].square().mean()
    found = []
    for model in models:
        device = model.read.weight.device
        answers = torch.cat([model(part.to(device)).cpu() for part in maps.inputs.split(50)])
        found.append((answers - maps.targets).square().mean(0) / variance)
    return torch.stack(found)


def gain_contributions(
    model: TaskNetwork, task: Task, items: int, steps: int = 10
) -> list[Float[Tensor, "side side"]]:
    """What every reading of a faint gain adds to the answer at the middle pixel, along a path from no readings."""
    device, middle = model.read.weight.device, task.side // 2
    found = []
    for inputs in task.draw(items, Generator().manual_seed(98)).inputs:
        path = inputs.expand(steps + 1, *inputs.shape).clone()
        path[..., 1] *= torch.linspace(0, 1, steps + 1)[:, None, None]
        shown, _ = path_contributions(lambda x: model(x)[:, middle, middle], path.to(device))
        found.append(shown[..., 1].cpu())
    return found


def gain_diffusion(
    models: Sequence[TaskNetwork], task: Task, items: int
) -> Float[Tensor, "seeds items"]:
    """Diffusion index of the readings that the middle pixel's answer uses, by network and map."""
    return torch.tensor(
        [[diffusion_index(m[None]) for m in gain_contributions(one, task, items)] for one in models]
    )


# Photographs --------------------------------------------------------------------------------------


def middle_crops(side: int) -> dict[str, Float[Tensor, "4 3 side side"]]:
    """Four crops around the middle of every test photograph, in [0, 1]."""
    found = {}
    for name, photo in photographs("test").items():
        top, left = (size // 2 for size in photo.shape[1:])
        corners = [(top - side, left - side), (top - side, left), (top, left - side), (top, left)]
        cut = [photo[:, a : a + side, b : b + side] for a, b in corners]
        found[name] = torch.stack(cut).float() / 255
    return found


@torch.no_grad()
def restored(
    model: HAT, spoilt: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch 3 rows columns"]:
    """What a network makes of spoilt pictures, on its device and back."""
    return model(spoilt.to(model.mean.device)).cpu()


def photograph_scores(
    models: Mapping[str, Sequence[HAT]], setting: Restoration, side: int
) -> pd.DataFrame:
    """PSNR and SSIM of every photograph, network and seed; "input" is the spoilt picture, enlarged.

    All networks read the same noise.
    """
    rows = []
    for name, clean in middle_crops(side).items():
        spoilt = spoil(clean, setting.scale, setting.noise, Generator().manual_seed(0))
        answers = [("input", 0, enlarge(spoilt, setting.scale))]
        answers += [
            (a, s, restored(m, spoilt)) for a, ms in models.items() for s, m in enumerate(ms)
        ]
        for arm, seed, answer in answers:
            found = {"arm": arm, "seed": seed, "photograph": name}
            found["psnr"] = psnr(answer, clean, setting.scale).mean().item()
            found["ssim"] = ssim(answer, clean, setting.scale).mean().item()
            rows.append(found)
    return pd.DataFrame(rows)


def mean_psnr(scores: pd.DataFrame) -> dict[str, list[float]]:
    """Mean over photographs of the PSNR of `photograph_scores`, every seed, by arm."""
    means = scores.groupby(["arm", "seed"], sort=False).psnr.mean()
    return {arm: found.tolist() for arm, found in means.groupby("arm", sort=False)}


def structured_patches(
    count: int, side: int, patch: int
) -> dict[str, Float[Tensor, "3 side side"]]:
    """Crops of the test photographs around the patches with the most structure, none twice.

    From every photograph as many, in a grid of crops: those whose middle patch has the largest sum of
    differences of the luma.

    Args:
        count: crops of each photograph.
        side, patch: sides of the crop and of the patch in its middle.
    """
    found, start = {}, (side - patch) // 2
    for name, photo in photographs("test").items():
        cut = photo.unfold(1, side, side).unfold(2, side, side).flatten(1, 2).movedim(1, 0)
        cut = cut.float() / 255
        middle = luma(cut)[:, start : start + patch, start : start + patch]
        detail = middle.diff(dim=1).abs().sum((1, 2)) + middle.diff(dim=2).abs().sum((1, 2))
        for number in detail.topk(count).indices.tolist():
            found[f"{name} {number}"] = cut[number]
    return found


def spoilt_crop(
    clean: Float[Tensor, "3 side side"], setting: Restoration
) -> Float[Tensor, "3 rows columns"]:
    """What the networks get to see of a crop; the same noise for all."""
    return spoil(clean[None], setting.scale, setting.noise, Generator().manual_seed(0))[0]


def attribution(
    model: HAT,
    setting: Restoration,
    clean: Float[Tensor, "3 side side"],
    patch: int,
    steps: int,
) -> tuple[Float[Tensor, "3 rows columns"], float]:
    """What the input's pixels add to the structure of the patch in the middle, and the rise they sum to."""
    device = model.mean.device
    spoilt = spoilt_crop(clean, setting)
    corner = (clean.shape[-1] - patch) // 2
    found, rise = local_attribution(model, spoilt.to(device), (corner, corner), patch, steps)
    return found.cpu(), rise


def diffusion(
    models: Sequence[HAT],
    setting: Restoration,
    crops: Mapping[str, Float[Tensor, "3 side side"]],
    patch: int,
    steps: int,
) -> tuple[Float[Tensor, "seeds items"], Float[Tensor, "seeds items"]]:
    """Diffusion index of every network and crop; and how far contributions miss the rise, over the rise."""
    indices, misses = [], []
    for model in models:
        model.requires_grad_(False)
        maps = [attribution(model, setting, crop, patch, steps) for crop in crops.values()]
        indices.append([diffusion_index(found) for found, _ in maps])
        misses.append([abs(found.sum().item() - rise) / abs(rise) for found, rise in maps])
    return torch.tensor(indices), torch.tensor(misses)


# Sizes --------------------------------------------------------------------------------------------


def published_sizes(side: int = 64) -> pd.DataFrame:
    """Parameters (millions) and multiply-adds (thousand millions) of the published networks at x4.

    Args:
        side: of the input picture.
    """
    rows = []
    for name, config in SIZES.items():
        with torch.device("meta"):
            model, picture = HAT(config, 4).eval(), torch.zeros(1, 3, side, side)
        count, adds = parameter_count(model) / 1e6, multiply_adds(model, picture) / 1e9
        rows.append({"model": name, "parameters": count, "multiply_adds": adds})
    return pd.DataFrame(rows)
