"""HAT, its parts, their placebos and its rivals, small: on two tasks for windows, and restoring photographs.

Arms of one seed start from the same weights where they share a module, and read the same maps or crops
in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from reattend.backbones.store import backbone_path
from reattend.data.photographs import photographs, random_crops, spoil
from reattend.data.window_tasks import Maps, displaced_signs, faint_gain, has_source
from reattend.timing import device_clock, paired_ratio
from reattend.training.loop import TrainingLog, TrainingPlan, train
from reattend.vision.hat import HAT, ChannelAttention, HATConfig, HybridGroup, initialise

KEPT = "losses.safetensors"

ARMS: dict[str, dict[str, str | float]] = {
    "SwinIR": {"cab": "off", "ocab": "off"},
    "+ OCAB": {"cab": "off"},
    "+ OCAB, gamma 0": {"cab": "off", "overlap": 0.0},
    "+ OCAB, own window": {"cab": "off", "ocab": "own"},
    "+ CAB": {"ocab": "off"},
    "+ CAB, blind": {"cab": "blind", "ocab": "off"},
    "HAT": {},
    "HAT, placebo": {"cab": "blind", "ocab": "own"},
    "HAT, own window": {"ocab": "own"},
    "HAT, blind": {"cab": "blind"},
}
"""What each arm has of HAT. "gamma 0" and "own window" have OCAB's parameters and cost, not its reach;
"blind" has the CAB's convolutions under a gate that is the same for all pictures. "placebo" is both."""
PARTS = ("SwinIR", "+ OCAB", "+ CAB", "HAT")
"""The paper's 2 x 2 table of modules: what an arm lacks it does not pay for."""
EQUAL_PARAMETERS = ("HAT, placebo", "HAT, blind", "HAT, own window", "HAT")
"""The same at equal parameters and cost: without OCAB's reach and CAB's gate, without the gate, without the reach."""
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
    distance: int = 0
    noise: float = 0.0

    def draw(self, items: int, generator: Generator) -> Maps:
        """Maps of this task."""
        if self.distance:
            return displaced_signs(items, self.side, self.distance, generator)
        return faint_gain(items, self.side, self.noise, generator)


@dataclass(frozen=True)
class Restoration:
    """Restoring photographs: shrunk by `scale`, with normal noise of deviation `noise` (of colours in [0, 1]).

    Attributes:
        equal_time: arms that are trained once more, for as long as HAT's `steps` take.
        most: steps that these have at most.
    """

    arms: tuple[str, ...]
    config: HATConfig
    scale: int
    noise: float
    crop: int
    steps: int
    batch: int
    rate: float
    equal_time: tuple[str, ...] = ()
    most: int = 0


@dataclass(frozen=True)
class Setting:
    """What one profile trains, every arm with the seeds 0, 1, ..., `seeds` - 1 (or `restorers` - 1)."""

    signs: Task
    gain: Task
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


# Networks -----------------------------------------------------------------------------------------


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


def rival_body(arm: str, config: HATConfig) -> nn.Sequential:
    """What stands in the place of the groups in EDSR and RCAN: two residual blocks for every group."""
    return nn.Sequential(
        *(
            ResidualConvolutions(config.dim, config.squeeze, RIVALS[arm])
            for _ in range(2 * config.groups)
        )
    )


class TaskNetwork(nn.Module):
    """Groups between two linear maps: without the 3 x 3 convolutions around them, blocks alone move anything."""

    def __init__(self, config: HATConfig, channels: int) -> None:
        super().__init__()
        rates = [0.0] * config.blocks
        self.embed = nn.Linear(channels, config.dim)
        self.layers = nn.Sequential(*(HybridGroup(config, rates) for _ in range(config.groups)))
        self.norm = nn.LayerNorm(config.dim)
        self.read = nn.Linear(config.dim, 1)
        initialise(self, std=0.1)
        nn.init.normal_(self.embed.weight)
        nn.init.normal_(self.embed.bias)

    def forward(
        self, inputs: Float[Tensor, "batch side side channels"]
    ) -> Float[Tensor, "batch side side"]:
        return self.read(self.norm(self.layers(self.embed(inputs))))[..., 0]


Network = TaskNetwork | HAT


def untrained(
    make: Callable[[HATConfig], Network], config: HATConfig, arm: str, seed: int
) -> Network:
    """The network of an arm; those of one seed start with the same weights in all that they share.

    Raises:
        ValueError: for an unknown arm; lists the known ones.
    """
    if arm not in ARMS | RIVALS:
        raise ValueError(f"unknown arm '{arm}'; there are: {', '.join(ARMS | RIVALS)}")
    torch.manual_seed(seed)
    model = make(replace(config, **ARMS.get(arm, ARMS["SwinIR"])))
    if arm in RIVALS:
        model.layers = rival_body(arm, config)
    torch.manual_seed(seed)
    full, own = make(config).state_dict(), model.state_dict()
    shared = {k: v for k, v in full.items() if k in own and v.shape == own[k].shape}
    model.load_state_dict(own | shared)
    return model


# Window tasks -------------------------------------------------------------------------------------


def untrained_solver(arm: str, task: Task, seed: int) -> TaskNetwork:
    """A network of a window task before training."""
    channels = 1 if task.distance else 2
    return untrained(partial(TaskNetwork, channels=channels), task.config, arm, seed)


def fit_solver(
    arm: str, task: Task, seed: int, device: torch.device | str = "cpu"
) -> tuple[TaskNetwork, TrainingLog]:
    """A network trained on fresh maps: the squared error at all pixels that have an answer."""
    model = untrained_solver(arm, task, seed).to(device)
    generator = Generator().manual_seed(1000 + seed)
    asked = has_source(task.side, task.distance).to(device)

    def batches() -> Iterator[Maps]:
        while True:
            drawn = task.draw(task.batch, generator)
            yield Maps(drawn.inputs.to(device), drawn.targets.to(device))

    def loss(model: nn.Module, maps: Maps) -> Tensor:
        return (model(maps.inputs) - maps.targets)[:, asked].square().mean()

    log = train(model, batches(), loss, plan_of(task.steps, task.rate), groups=faster_tables)
    return model, log


# Photographs --------------------------------------------------------------------------------------


def untrained_restorer(arm: str, setting: Restoration, seed: int) -> HAT:
    """A network that starts from the spoilt picture itself, or its bicubic enlargement."""
    make = partial(HAT, scale=setting.scale, skip=True, features=setting.config.dim)
    return untrained(make, setting.config, arm, seed)


def restoration_batches(
    setting: Restoration, seed: int, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of spoilt and clean random crops of the photographs of nature."""
    generator = Generator().manual_seed(1000 + seed)
    photos = list(photographs("train").values())
    while True:
        clean = random_crops(photos, setting.batch, setting.crop * setting.scale, generator)
        spoilt = spoil(clean, setting.scale, setting.noise, generator)
        yield spoilt.to(device), clean.to(device)


def absolute_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Float[Tensor, ""]:
    """Mean absolute error of restored crops."""
    return F.l1_loss(model(batch[0]), batch[1])


def fit_restorer(
    arm: str, setting: Restoration, seed: int, device: torch.device | str = "cpu"
) -> tuple[HAT, TrainingLog]:
    """A network trained by its mean absolute error on random crops of the photographs of nature."""
    model = untrained_restorer(arm, setting, seed).to(device)
    batches, plan = restoration_batches(setting, seed, device), plan_of(setting.steps, setting.rate)
    return model, train(model, batches, absolute_error, plan, groups=faster_tables)


def step_runs(
    arms: Sequence[str], setting: Restoration, device: torch.device | str = "cpu", steps: int = 2
) -> dict[str, Callable[[], TrainingLog]]:
    """For every arm a call that trains one network for some steps more: what a step costs, to be timed in turns."""
    plan = plan_of(steps, setting.rate)

    def run(arm: str) -> Callable[[], TrainingLog]:
        model = untrained_restorer(arm, setting, 0).to(device)
        batches = restoration_batches(setting, 0, device)
        return lambda: train(model, batches, absolute_error, plan, groups=faster_tables)

    return {arm: run(arm) for arm in arms}


def equal_time_steps(
    setting: Restoration, device: torch.device | str = "cpu", rounds: int = 9
) -> dict[str, int]:
    """Steps that every arm of `equal_time` takes in the time of HAT's `steps`.

        steps(arm) = steps x median over rounds of (seconds of HAT's step / seconds of the arm's),

    measured on this device in turns, never fewer than HAT's steps nor more than `most`.
    """
    if not setting.equal_time:
        return {}
    device = torch.device(device)
    runs = step_runs((*setting.equal_time, "HAT"), setting, device)
    found = {}
    for arm in setting.equal_time:
        ratio = paired_ratio(runs["HAT"], runs[arm], rounds=rounds, clock=device_clock(device))
        steps = round(setting.steps * float(np.median(ratio)))
        found[arm] = min(max(steps, setting.steps), setting.most)
    return found


def fit_as_long(
    arm: str, setting: Restoration, seed: int, steps: Mapping[str, int], device: torch.device | str
) -> tuple[HAT, TrainingLog]:
    """`fit_restorer` for an arm's own number of steps."""
    return fit_restorer(arm, replace(setting, steps=steps[arm]), seed, device)


# Building and loading -----------------------------------------------------------------------------


WINDOWS = HATConfig(
    dim=16, groups=1, blocks=2, heads=4, window=8, compress=2, squeeze=2, alpha=0.1, conv=False
)
SMALLER = replace(WINDOWS, heads=2, window=4)
SIGN_ARMS = (*tuple(ARMS)[1:4], "+ CAB, blind")
GAIN_ARMS = ("SwinIR", "+ CAB", "+ CAB, blind", "HAT", "HAT, placebo", *RIVALS)
SIGNS = Task("displaced signs", SIGN_ARMS, WINDOWS, 16, 200, 12, 5e-3, distance=2)
GAIN = Task("faint gain", GAIN_ARMS, SMALLER, 24, 400, 8, 5e-3, noise=5.0)
PHOTOGRAPHIC = HATConfig(dim=24, groups=1, blocks=2, heads=3, window=8, squeeze=6, alpha=0.1)
LARGER = HATConfig(dim=48, groups=2, blocks=4, heads=6, window=16, squeeze=12)
FEW_PARTS = ("SwinIR", "HAT", "HAT, placebo", "RCAN")
DENOISING = Restoration(FEW_PARTS, PHOTOGRAPHIC, 1, 25 / 255, 24, 200, 8, 2e-3)
ALL_PARTS = (*PARTS, *EQUAL_PARAMETERS[:-1], *RIVALS)
ENLARGING = Restoration(
    ALL_PARTS, LARGER, 4, 0.0, 32, 500, 16, 1e-3, equal_time=PARTS[:-1], most=1500
)
SETTINGS = {
    "smoke": Setting(
        signs=replace(SIGNS, steps=2, batch=2),
        gain=replace(GAIN, side=8, steps=2, batch=2),
        seeds=3,
        restoration=replace(DENOISING, crop=16, steps=2, batch=1, equal_time=("SwinIR",), most=2),
        restorers=1,
    ),
    "cpu": Setting(
        signs=SIGNS,
        gain=GAIN,
        seeds=4,
        restoration=DENOISING,
        restorers=2,
    ),
    "gpu": Setting(
        signs=SIGNS,
        gain=GAIN,
        seeds=6,
        restoration=ENLARGING,
        restorers=2,
    ),
}


def _file(kind: str, arm: str, seed: int) -> str:
    return f"{kind}-{arm.replace(',', '').replace(' ', '-')}-{seed}.safetensors"


def _fits(
    setting: Setting, steps: Mapping[str, int] | None = None
) -> dict[str, tuple[Sequence[str], int, Callable, Callable]]:
    """What is trained, by kind: its arms, its seeds, how a network is made and how it is trained.

    Args:
        steps: of arms that are trained for as long as HAT; not needed to read them back.
    """
    kinds = {task.name: (task, setting.seeds) for task in (setting.signs, setting.gain)}
    fits = {
        name: (
            task.arms,
            seeds,
            partial(untrained_solver, task=task),
            partial(fit_solver, task=task),
        )
        for name, (task, seeds) in kinds.items()
    }
    pictures = setting.restoration
    make = partial(untrained_restorer, setting=pictures)
    again = partial(fit_as_long, setting=pictures, steps=steps)
    fits["restoration"] = (
        pictures.arms,
        setting.restorers,
        make,
        partial(fit_restorer, setting=pictures),
    )
    fits["equal time"] = (pictures.equal_time, setting.restorers, make, again)
    return fits


def build(target: Path, profile: str) -> None:
    """Train all arms of a profile; write weights and losses."""
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    setting, kept = SETTINGS[profile], {}
    steps = equal_time_steps(setting.restoration, device)
    for kind, (arms, seeds, _, fit) in _fits(setting, steps).items():
        for arm in arms:
            losses = []
            for seed in range(seeds):
                model, log = fit(arm, seed=seed, device=device)
                save_model(model, target / _file(kind, arm, seed))
                losses.append(log.losses)
            kept[f"{kind}: {arm}"] = torch.tensor(losses)
            last = kept[f"{kind}: {arm}"][:, -20:].mean(1).tolist()
            print(f"{kind}, {arm}: loss {', '.join(f'{loss:.4f}' for loss in last)}", flush=True)
    save_file(kept, target / KEPT)


@dataclass(frozen=True)
class HatModels:
    """What was trained, by kind ("displaced signs", "faint gain", "restoration", "equal time") and arm.

    Attributes:
        networks: trained networks, one a seed, in evaluation mode.
        losses: training loss of every step, [seeds, steps].
    """

    networks: dict[str, dict[str, list[Network]]]
    losses: dict[str, dict[str, Float[Tensor, "seeds steps"]]]


def load(profile: str = "cpu", device: torch.device | str = "cpu") -> HatModels:
    """The networks of a profile, built on first use."""
    directory = backbone_path("hat", profile)
    kept = load_file(directory / KEPT)

    def read(kind: str, arm: str, seed: int, make: Callable) -> Network:
        model = make(arm, seed=seed)
        load_model(model, directory / _file(kind, arm, seed))
        return model.to(device).eval()

    networks, losses = {}, {}
    for kind, (arms, seeds, make, _) in _fits(SETTINGS[profile]).items():
        networks[kind] = {a: [read(kind, a, seed, make) for seed in range(seeds)] for a in arms}
        losses[kind] = {arm: kept[f"{kind}: {arm}"] for arm in arms}
    return HatModels(networks, losses)
