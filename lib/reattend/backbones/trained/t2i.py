"""A text-to-image diffusion model of coloured things, trained here, and the judge of its pictures.

The model is `reattend.trunks.diffusion.DiffusionUNet` on scenes of `reattend.data.prompt_scenes`; a tenth of
the captions is empty, for classifier-free guidance, and what is kept is the running mean of the weights.
The judge is trained apart (`reattend.backbones.scene_judge`). What the two are worth is measured after
training, at noises that no study uses, and kept beside them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_model, save_model
from torch import Generator, Tensor
from tqdm import tqdm

from reattend.backbones.scene_judge import (
    Judgement,
    SceneJudge,
    asked_surely,
    bent,
    judge_scenes,
    train_judge,
    true_contents,
)
from reattend.backbones.store import backbone_path
from reattend.data.prompt_scenes import (
    LENGTH,
    NOUN_AT,
    VOCABULARY,
    Prompts,
    draw_prompts,
    empty_captions,
    paint,
    pair_prompts,
    single_prompts,
)
from reattend.training.loop import TrainingPlan, train
from reattend.trunks.diffusion import (
    DiffusionShape,
    DiffusionUNet,
    MapRecorder,
    noised,
    sample,
    velocity_loss,
)

JUDGE, QUALITY = "judge.safetensors", "quality.json"
MEASURED = 900
"""Seed of the noises and scenes on which quality is measured; no study may use it."""


@dataclass(frozen=True)
class Setting:
    """What one profile trains.

    Attributes:
        ema: decay of the running mean of the weights.
        seeds: models, each from its own start and scenes.
        judge_steps: of the judge's training, on batches of 64 scenes.
        measured: prompts with two things whose pictures are measured; half as many with one.
        sampling_steps, guidance: of those pictures.
    """

    shape: DiffusionShape
    steps: int
    batch: int
    rate: float
    ema: float
    seeds: int
    judge_steps: int
    measured: int
    sampling_steps: int = 20
    guidance: float = 3.0

    def plan(self) -> TrainingPlan:
        """Short warm-up, then a cosine to zero."""
        warmup = self.steps // 20
        return TrainingPlan(self.steps, self.rate, weight_decay=0.01, warmup=warmup, fused=True)


def _shape(**sizes) -> DiffusionShape:
    """`centre` and `spread` are those of the scenes of `draw_prompts`."""
    return DiffusionShape(len(VOCABULARY), LENGTH, centre=0.8, spread=0.44, **sizes)


SETTINGS = {
    "smoke": Setting(_shape(width=16), 4, 8, 2e-3, 0.5, 1, 4, 8, sampling_steps=3),
    "cpu": Setting(_shape(), 2400, 32, 2e-3, 0.99, 1, 1600, 128),
    "gpu": Setting(
        _shape(side=64, width=96, multiples=(1, 2, 2), heads=4, text_width=128),
        20_000, 128, 1e-3, 0.999, 3, 3000, 512, sampling_steps=50,
    ),
}  # fmt: skip


def untrained(setting: Setting, seed: int) -> DiffusionUNet:
    """The model that training of a seed starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiffusionUNet(setting.shape)


def batches(setting: Setting, seed: int, device: str = "cpu") -> Iterator[tuple[Tensor, ...]]:
    """Endless (pictures, captions, noise, times); a tenth of the captions is empty."""
    generator, count = Generator().manual_seed(seed), setting.batch
    empty = empty_captions(count)
    while True:
        prompts = draw_prompts(count, generator)
        pictures = paint(prompts, setting.shape.side, generator).pixels
        dropped = torch.rand(count, 1, generator=generator) < 0.1
        noise = torch.randn(pictures.shape, generator=generator)
        times = torch.rand(count, generator=generator)
        given = (pictures, empty.where(dropped, prompts.ids()), noise, times)
        yield tuple(part.to(device) for part in given)


def fit(setting: Setting, seed: int, device: str = "cpu") -> tuple[DiffusionUNet, list[float]]:
    """Train one model; returns the running mean of its weights, and the loss of every step."""
    model = untrained(setting, seed).to(device)
    kept = copy.deepcopy(model).eval().requires_grad_(False)

    def average(step: int) -> None:
        decay = min(setting.ema, (1 + step) / (10 + step))
        for mean, now in zip(kept.parameters(), model.parameters(), strict=True):
            mean.lerp_(now.detach(), 1 - decay)

    log = train(
        model,
        batches(setting, seed, device),
        lambda net, batch: velocity_loss(net, *batch),
        setting.plan(),
        after_step=average,
        progress=lambda steps: tqdm(steps, desc=f"diffusion model {seed}", mininterval=2.0),
    )
    return kept, log.losses


# --- what they are worth -----------------------------------------------------------------------------


def draw(
    model: DiffusionUNet,
    prompts: Prompts,
    seed: int,
    *,
    steps: int,
    guidance: float,
    chunk: int = 128,
) -> Float[Tensor, "prompts 3 side side"]:
    """Pictures of these prompts from the noises of a seed, on the model's device, returned on the CPU."""
    side, device = model.shape.side, next(model.parameters()).device
    generator = Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), 3, side, side, generator=generator)
    pictures = [
        sample(
            model,
            part.to(device),
            ids.to(device),
            empty_captions(len(part)).to(device),
            steps=steps,
            guidance=guidance,
        ).cpu()
        for part, ids in zip(noise.split(chunk), prompts.ids().split(chunk), strict=True)
    ]
    return torch.cat(pictures)


def judge_quality(judge: SceneJudge, side: int, count: int = 500) -> dict[str, float]:
    """Shares of held-out painted scenes, shifted and bent, of which the judge has all presences, counts, and
    colours right."""
    generator = Generator().manual_seed(MEASURED)
    scenes = judge_scenes(count, side, generator)
    said, (counts, pairs) = judge(bent(scenes.pixels, generator)), true_contents(scenes)
    right = {
        "presence": (said.presence() > 0) == (counts > 0),
        "count": said.number() == counts.clamp(max=2),
        "colour": ((said.pairs > 0) == (pairs > 0)).flatten(1),
    }
    return {f"judge, {what}": hit.all(1).double().mean().item() for what, hit in right.items()}


def picture_quality(
    pictures: Float[Tensor, "pictures 3 side side"], judge: SceneJudge, prompts: Prompts, name: str
) -> dict[str, float]:
    """Shares of pictures with everything asked for, also in its colours, and with more than that; and the
    share on which the judge agrees with the rule, of the asked things of which the rule is sure."""
    said: Judgement = judge(pictures)
    there = said.asked_presence(prompts) > 0
    rule, sure = asked_surely(pictures, prompts)
    shares = {
        "present": there.all(1),
        "present in its colour": (there & (said.asked_pairs(prompts) > 0)).all(1),
        "more than asked": said.surplus(prompts) > 0,
        "judge agrees where the rule is sure": (rule == there)[sure],
    }
    return {f"{name}, {what}": hit.double().mean().item() for what, hit in shares.items()}


@torch.no_grad()
def map_quality(model: DiffusionUNet, count: int = 128) -> dict[str, float]:
    """Share of things in painted scenes of two in whose box the map of their noun is highest, by side.

    At times .3 to .5, maps averaged over blocks of a side and heads; and the share that the boxes cover.
    """
    device, generator = next(model.parameters()).device, Generator().manual_seed(MEASURED)
    side = model.shape.side
    scenes = paint(draw_prompts(count, generator, 1.0), side, generator)
    time = 0.3 + 0.2 * torch.rand(count, generator=generator)
    noise = torch.randn(scenes.pixels.shape, generator=generator)
    x = noised(model.latent_of(scenes.pixels), noise, time)[0].to(device)
    ids = Prompts(scenes.colours, scenes.nouns).ids().to(device)
    found = {}
    for of in sorted(set(model.blocks.values())):
        recorder = MapRecorder(("cross",), model.blocks_of_side(of))
        model(x, time.to(device), model.encode(ids), recorder.hooks)
        peaks = recorder.mean("cross")[..., NOUN_AT].argmax(1).cpu()
        place = torch.stack([peaks % of, peaks // of], -1).double().add(0.5) * side / of
        inside = (place >= scenes.boxes[..., :2]) & (place <= scenes.boxes[..., 2:])
        found[f"maps of side {of} in the box"] = inside.all(-1).double().mean().item()
    extent = (scenes.boxes[..., 2:] - scenes.boxes[..., :2]).double()
    return found | {"share of the box": (extent.prod(-1) / side**2).mean().item()}


def measured(model: DiffusionUNet, judge: SceneJudge, setting: Setting) -> dict[str, float]:
    """All qualities of one model and of the judge, as shares."""
    found = judge_quality(judge, setting.shape.side) | map_quality(model)
    singles = single_prompts()
    repeats = -(-setting.measured // 2 // len(singles))
    rows = torch.arange(len(singles)).repeat(repeats)[: max(1, setting.measured // 2)]
    asked = {"one thing": singles[rows], "two things": pair_prompts(setting.measured, MEASURED)}
    for name, prompts in asked.items():
        pictures = draw(
            model, prompts, MEASURED, steps=setting.sampling_steps, guidance=setting.guidance
        )
        found |= picture_quality(pictures, judge, prompts, name)
    return found


# --- build and load ----------------------------------------------------------------------------------


def build(target: Path, profile: str) -> None:
    """Train models and judge at the profile's size, measure them, and write all into `target`."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    judge = train_judge(setting.shape.side, setting.judge_steps, 64, seed=0)
    save_model(judge, target / JUDGE)
    qualities = []
    for seed in range(setting.seeds):
        model, _ = fit(setting, seed, device)
        qualities.append(measured(model, judge, setting))
        save_model(model.cpu(), target / _weights(seed))
    (target / QUALITY).write_text(json.dumps(qualities, indent=1) + "\n", encoding="utf8")


def _weights(seed: int) -> str:
    return f"unet-{seed}.safetensors"


def load(profile: str, seed: int = 0, device: str | torch.device = "cpu") -> DiffusionUNet:
    """Read a trained model, in evaluation mode, without gradients to its weights; trained on first use.

    Raises:
        KeyError: for an unknown profile.
        FileNotFoundError: for a seed that the profile does not train.
    """
    model = DiffusionUNet(SETTINGS[profile].shape)
    load_model(model, backbone_path("t2i", profile) / _weights(seed))
    return model.to(device).eval().requires_grad_(False)


def load_judge(profile: str) -> SceneJudge:
    """Read the judge, in evaluation mode, without gradients."""
    judge = SceneJudge()
    load_model(judge, backbone_path("t2i", profile) / JUDGE)
    return judge.eval().requires_grad_(False)


def quality(profile: str, seed: int = 0) -> dict[str, float]:
    """What was measured after training, as shares; see `measured`."""
    return json.loads((backbone_path("t2i", profile) / QUALITY).read_text(encoding="utf8"))[seed]
