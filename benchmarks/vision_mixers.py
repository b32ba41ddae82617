"""Throughput of the vision trunk by its mixer, in training and in use, beside what each model costs.

    python benchmarks/vision_mixers.py --size 128 --width 64

One trunk, one stage, the same everything but the mixer. Interleaved rounds: each ratio to the
convolutional trunk is taken within its round. Accuracies belong to the papers' notebooks.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from reattend.timing import device_clock, paired_times
from reattend.trunks.language import parameter_count
from reattend.trunks.vision import (
    MixerFactory,
    Stage,
    VisionTrunk,
    convolution,
    multiply_adds,
)
from reattend.vision.biformer import Attention, dense, routed, window
from reattend.vision.halonet import HaloAttention

HEAD_DIM = 16


def mixers(side: int) -> dict[str, MixerFactory]:
    """The mixers by name, for maps of `side` tokens; windows and regions are an eighth of it."""
    part = side // 8
    return {
        "convolution 3 x 3": convolution,
        "full attention": lambda width, stride: Attention(width, width // HEAD_DIM, dense),
        f"windows of {part}": lambda width, stride: Attention(
            width, width // HEAD_DIM, partial(window, size=part)
        ),
        f"halo, block {part}": lambda width, stride: HaloAttention(
            width, width // HEAD_DIM, part, part // 2
        ),
        "routed, 4 of 64 regions": lambda width, stride: Attention(
            width, width // HEAD_DIM, routed(8, 4)
        ),
    }


def training_step(model: VisionTrunk, pixels: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of one batch, without an optimiser."""
    labels = torch.zeros(len(pixels), dtype=torch.long, device=pixels.device)

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(pixels), labels).backward()

    return step


def inference(model: VisionTrunk, pixels: torch.Tensor) -> Callable[[], None]:
    """Forward of one batch."""

    @torch.no_grad()
    def step() -> None:
        model(pixels)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=128, help="side of the pictures, in pixels")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if options.size % 64 or options.width % HEAD_DIM:
        parser.error(f"the side must be a multiple of 64, the width one of {HEAD_DIM}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Seconds of the day: on a CPU all threads are at work.
    clock = device_clock(device) if device.type == "cuda" else time.perf_counter
    shape = (options.batch, 3, options.size, options.size)
    pixels = torch.randint(256, shape, dtype=torch.uint8, device=device)

    models = {}
    for name, mixer in mixers(options.size // 4).items():
        torch.manual_seed(0)
        stage = Stage(options.width, options.blocks, mixer)
        models[name] = VisionTrunk(10, [stage], stem_stride=4).to(device)
    baseline = next(iter(models.values()))
    print(
        f"{options.size} px, {options.blocks} blocks of width {options.width}, batch "
        f"{options.batch}, {device.type}, {torch.get_num_threads()} threads, {options.rounds} "
        "paired rounds; images a second (times the convolution's)"
    )
    for name, model in models.items():
        cells = [f"{name:24} {parameter_count(model) / 1e3:6.0f}k parameters"]
        cells.append(f"{multiply_adds(model, pixels[:1]) / 1e6:6.0f}M multiply-adds")
        for kind, work in (("training", training_step), ("in use", inference)):
            slow, fast = paired_times(
                work(baseline, pixels),
                work(model, pixels),
                rounds=options.rounds,
                clock=clock,
            )
            rate = options.batch / statistics.median(fast)
            cells.append(f"{kind} {rate:6.0f} ({statistics.median(slow / fast):.2f})")
        print("  ".join(cells))


if __name__ == "__main__":
    main()
