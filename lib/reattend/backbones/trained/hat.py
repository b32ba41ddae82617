"""HAT, its parts, their placebos and its rivals, small: on two tasks for windows, and restoring photographs.

Arms of one seed start from the same weights where they share a module, and read the same maps or crops
in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from reattend.backbones.store import backbone_path
from reattend.data.photographs import photographs, random_crops, spoil
from reattend.data.window_tasks import Maps, displaced_signs, faint_gain, has_source
from reattend.training.loop import TrainingLog, TrainingPlan, train
from reattend.vision.hat import HAT, ChannelAttention, HATConfig, HybridGroup, initialise

KEPT = "tasks.safetensors"

ARMS: dict[str, dict[str, str | float]] = {
    "SwinIR": {"cab": "off", "ocab": "off"},
    "+ OCAB": {"cab": "off"},
    "+ OCAB, gamma 0": {"cab": "off", "overlap": 0.0},
    "+ OCAB, own window": {"cab": "off", "ocab": "own"},
    "+ CAB": {"ocab": "off"},
    "+ CAB, blind": {"cab": "blind", "ocab": "off"},
    "HAT": {},
    "HAT, placebo": {"cab": "blind", "ocab": "own"},
}
"""What each arm has of HAT. "gamma 0" and "own window" have OCAB's parameters and cost, not its reach;
"blind" has the CAB's convolutions under a gate that is the same for all pictures."""
RIVALS = {"EDSR": True, "RCAN": False}
"""Residual convolutions in the place of the groups, with a blind channel attention (none, then) or a seeing one."""


@dataclass(frozen=True)
class Task:
    """One of the window tasks: what is drawn, and which network is trained on it for how long."""

    name: str
    arms: tuple[str, ...]
    config: HATConfig
    side: int
    steps: int
    batch: int
    rate: float
    test_maps: int
    distance: int = 0
    noise: float = 0.0

    def draw(self, items: int, generator: Generator) -> Maps:
        """Maps of this task."""
        if self.distance:
            return displaced_signs(items, self.side, self.distance, generator)
        return faint_gain(items, self.side, self.noise, generator)

    def asked(self) -> Bool[Tensor, "side side"]:
        """Pixels that have an answer."""
        return has_source(self.side, self.distance)


@dataclass(frozen=True)
class Restoration:
    """Restoring photographs: shrunk by `scale`, with normal noise of deviation `noise` (of colours in [0, 1])."""

    arms: tuple[str, ...]
    config: HATConfig
    scale: int
    noise: float
    crop: int
    steps: int
    batch: int
    rate: float
    convolutions: int


@dataclass(frozen=True)
class Setting:
    """What one profile trains, every arm with the seeds 0, 1, ..., `seeds` - 1 (or `restorers` - 1)."""

    tasks: tuple[Task, ...]
    seeds: int
    restoration: Restoration
    restorers: int


def faster_tables(model: nn.Module) -> list[dict]:
    """Parameter groups: tables of relative positions learn ten times as fast.

    Adam moves a number by the learning rate at most, and a bias has to grow by several units where
    one key of many is meant.
    """
    named = list(model.named_parameters())
    tables = [p for name, p in named if name.endswith("relative_position_bias_table")]
    rest = [p for name, p in named if not name.endswith("relative_position_bias_table")]
    return [{"params": rest}, {"params": tables, "rate": 10.0}]


def plan_of(steps: int, rate: float) -> TrainingPlan:
    """Adam with a warm-up over a fifteenth of the steps, then a cosine to zero."""
    return TrainingPlan(steps, rate, weight_decay=0.0, warmup=steps // 15, fused=True)


# Window tasks -------------------------------------------------------------------------------------


class TaskNetwork(nn.Module):
    """One group between two linear maps: without the 3 x 3 convolutions around it, blocks alone move anything."""

    def __init__(self, config: HATConfig, channels: int) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, config.dim)
        self.group = HybridGroup(replace(config, conv=False), [0.0] * config.blocks)
        self.norm = nn.LayerNorm(config.dim)
        self.read = nn.Linear(config.dim, 1)
        initialise(self, std=0.1)
        nn.init.normal_(self.embed.weight)
        nn.init.normal_(self.embed.bias)

    def forward(
        self, inputs: Float[Tensor, "batch side side channels"]
    ) -> Float[Tensor, "batch side side"]:
        return self.read(self.norm(self.group(self.embed(inputs))))[..., 0]


def alike(build: Callable[[HATConfig], nn.Module], config: HATConfig, arm: str, seed: int):
    """The network of an arm; those of one seed start with the same weights in all that they share.

    Raises:
        ValueError: for an unknown arm; lists the known ones.
    """
    if arm not in ARMS:
        raise ValueError(f"unknown arm '{arm}'; there are: {', '.join(ARMS)}")
    torch.manual_seed(seed)
    model = build(replace(config, **ARMS[arm]))
    torch.manual_seed(seed)
    full = build(config).state_dict()
    own = model.state_dict()
    shared = {k: v for k, v in full.items() if k in own and v.shape == own[k].shape}
    model.load_state_dict(own | shared)
    return model


def fit_task(
    task: Task, arm: str, seed: int, device: torch.device | str = "cpu"
) -> tuple[TaskNetwork, TrainingLog]:
    """A network trained on fresh maps: the squared error at all pixels that have an answer."""
    channels = 1 if task.distance else 2
    model = alike(partial(TaskNetwork, channels=channels), task.config, arm, seed).to(device)
    generator = Generator().manual_seed(1000 + seed)
    asked = task.asked().to(device)

    def batches() -> Iterator[Maps]:
        while True:
            drawn = task.draw(task.batch, generator)
            yield Maps(drawn.inputs.to(device), drawn.targets.to(device))

    def loss(model: nn.Module, maps: Maps) -> Tensor:
        return (model(maps.inputs) - maps.targets)[:, asked].square().mean()

    log = train(model, batches(), loss, plan_of(task.steps, task.rate), groups=faster_tables)
    return model, log


@torch.no_grad()
def task_errors(
    model: nn.Module, task: Task, seed: int = 99, batch: int = 50
) -> Float[Tensor, "side side"]:
    """Squared error of every pixel on new maps, over the variance of the targets; both tasks' is 1."""
    device = next(model.parameters()).device
    maps = task.draw(task.test_maps, Generator().manual_seed(seed))
    answers = torch.cat([model(part.to(device)).cpu() for part in maps.inputs.split(batch)])
    variance = maps.targets[:, task.asked()].square().mean()
    return (answers - maps.targets).square().mean(0) / variance


# Photographs --------------------------------------------------------------------------------------


class ResidualConvolutions(nn.Module):
    """x + channel attention(two 3 x 3 convolutions of x), as in RCAN; EDSR's block where it is blind."""

    def __init__(self, dim: int, squeeze: int, blind: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1),
            ChannelAttention(dim, squeeze, blind),
        )

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        return x + self.body(x.movedim(-1, 1)).movedim(1, -1)


def untrained_restorer(arm: str, setting: Restoration, seed: int) -> HAT:
    """A network that starts from the spoilt picture itself, or its bicubic enlargement."""

    def build(config: HATConfig) -> HAT:
        return HAT(config, setting.scale, skip=True, features=config.dim)

    model = alike(build, setting.config, "SwinIR" if arm in RIVALS else arm, seed)
    if arm in RIVALS:
        torch.manual_seed(seed)
        dim, squeeze = setting.config.dim, setting.config.squeeze
        count = range(setting.convolutions)
        blocks = (ResidualConvolutions(dim, squeeze, RIVALS[arm]) for _ in count)
        model.layers = nn.Sequential(*blocks)
    return model


def fit_restorer(
    arm: str, setting: Restoration, seed: int, device: torch.device | str = "cpu"
) -> tuple[HAT, TrainingLog]:
    """A network trained by its mean absolute error on random crops of the photographs of nature."""
    model = untrained_restorer(arm, setting, seed).to(device)
    generator = Generator().manual_seed(1000 + seed)
    photos = list(photographs("train").values())

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            clean = random_crops(photos, setting.batch, setting.crop * setting.scale, generator)
            spoilt = spoil(clean, setting.scale, setting.noise, generator)
            yield spoilt.to(device), clean.to(device)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.l1_loss(model(batch[0]), batch[1])

    log = train(model, batches(), loss, plan_of(setting.steps, setting.rate), groups=faster_tables)
    return model, log


# Building and loading -----------------------------------------------------------------------------


WINDOWS = HATConfig(
    dim=16, groups=1, blocks=2, heads=4, window=8, compress=2, squeeze=2, alpha=1.0, conv=False
)
TASK_ARMS = tuple(arm for arm in ARMS if arm != "HAT, placebo")
PARTS = ("SwinIR", "+ OCAB", "+ CAB", "HAT", "HAT, placebo", *RIVALS)
SETTINGS: dict[str, Setting] = {}


def _file(arm: str, seed: int) -> str:
    return f"{arm.replace(',', '').replace(' ', '-')}-{seed}.safetensors"


def build(target: Path, profile: str) -> None:
    """Train all arms of a profile; write the tasks' error maps and losses, and the restorers' weights and losses."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    kept = {}
    for task in setting.tasks:
        for arm in task.arms:
            runs = [fit_task(task, arm, seed, device) for seed in range(setting.seeds)]
            errors = torch.stack([task_errors(model, task) for model, _ in runs])
            kept[f"{task.name}: errors of {arm}"] = errors
            kept[f"{task.name}: losses of {arm}"] = torch.tensor([log.losses for _, log in runs])
            shown = ", ".join(f"{one[task.asked()].mean():.3f}" for one in errors)
            print(f"{task.name}, {arm}: error {shown}", flush=True)
    for arm in setting.restoration.arms:
        losses = []
        for seed in range(setting.restorers):
            model, log = fit_restorer(arm, setting.restoration, seed, device)
            save_model(model, target / _file(arm, seed))
            losses.append(log.losses)
        kept[f"restoration: losses of {arm}"] = torch.tensor(losses)
        print(f"restoration, {arm}: {', '.join(f'{loss[-1]:.4f}' for loss in losses)}", flush=True)
    save_file(kept, target / KEPT)


@dataclass(frozen=True)
class HatModels:
    """What was trained.

    Attributes:
        errors: task -> arm -> error of every pixel over the targets' variance, [seeds, side, side].
        restorers: arm -> trained networks, one a seed.
        losses: task (or "restoration") -> arm -> training loss, [seeds, steps].
    """

    errors: dict[str, dict[str, Float[Tensor, "seeds side side"]]]
    restorers: dict[str, list[HAT]]
    losses: dict[str, dict[str, Float[Tensor, "seeds steps"]]]


def load(profile: str = "cpu", device: torch.device | str = "cpu") -> HatModels:
    """The results and networks of a profile, built on first use."""
    setting, directory = SETTINGS[profile], backbone_path("hat", profile)
    kept = load_file(directory / KEPT)
    arms = {task.name: task.arms for task in setting.tasks}

    def read(arm: str, seed: int) -> HAT:
        model = untrained_restorer(arm, setting.restoration, seed)
        load_model(model, directory / _file(arm, seed))
        return model.to(device).eval()

    return HatModels(
        {n: {arm: kept[f"{n}: errors of {arm}"] for arm in some} for n, some in arms.items()},
        {
            arm: [read(arm, seed) for seed in range(setting.restorers)]
            for arm in setting.restoration.arms
        },
        {
            n: {arm: kept[f"{n}: losses of {arm}"] for arm in some}
            for n, some in (arms | {"restoration": setting.restoration.arms}).items()
        },
    )
