"""A small masked autoencoder (MAE) trained here on emoji and stamps: the masked-image encoder.

He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377), at a small
scale: 64 x 64 pixels, patches of 8, 75 % of them hidden; the encoder sees only the visible patches, a
light decoder predicts the hidden ones, and the loss is the squared error of their pixels, each patch
normalised to mean 0 and variance 1. It has seen no label and no picture of the emoji's validation and
test sides. Weak next to a MAE of ImageNet; its part is to be an encoder that only ever reconstructed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from reattend.backbones.store import backbone_path
from reattend.data.images import emoji, stamps
from reattend.training.loop import TrainingPlan, train

SIZE = 64  # pixels
PATCH = 8  # pixels
GRID = SIZE // PATCH
WEIGHTS = "mae.safetensors"


@dataclass(frozen=True)
class Shape:
    """Sizes of encoder and decoder (widths, layers, heads) and the training that goes with them."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    decoder_width: int = 64
    decoder_layers: int = 1
    steps: int = 2000
    batch: int = 64
    pictures: int | None = None  # of each class; None: all


SHAPES = {
    "smoke": Shape(steps=6, batch=16, pictures=6),
    "cpu": Shape(),
    "gpu": Shape(width=384, layers=12, heads=6, decoder_width=192, decoder_layers=4, steps=30_000),
}


def patchify(
    images: Float[Tensor, "items 3 size size"],
) -> Float[Tensor, "items patches pixels"]:
    """Cut into patches, row by row; a patch's values run over rows, columns, colours."""
    items = len(images)
    cut = images.reshape(items, 3, GRID, PATCH, GRID, PATCH)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(items, GRID * GRID, -1)


def sine_positions(width: int) -> Float[Tensor, "patches width"]:
    """Fixed two-dimensional sine and cosine positions; a quarter of the width for each of the four."""
    rates = 1 / 10_000 ** (torch.arange(width // 4) / (width // 4))
    places = torch.arange(GRID)[:, None] * rates
    waves = torch.cat([places.sin(), places.cos()], 1)
    rows, columns = waves.repeat_interleave(GRID, 0), waves.repeat(GRID, 1)
    return torch.cat([rows, columns], 1)


class Block(nn.Module):
    """Pre-normalised transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(
        self, x: Float[Tensor, "items tokens width"]
    ) -> Float[Tensor, "items tokens width"]:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class MaskedAutoencoder(nn.Module):
    """Encoder of visible patches and [CLS], decoder of all patches."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * PATCH * PATCH, shape.width)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, shape.width))
        self.encoder = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.narrow = nn.Linear(shape.width, shape.decoder_width)
        self.hidden_token = nn.Parameter(0.02 * torch.randn(1, 1, shape.decoder_width))
        blocks = [Block(shape.decoder_width, shape.heads) for _ in range(shape.decoder_layers)]
        self.decoder = nn.Sequential(*blocks, nn.LayerNorm(shape.decoder_width))
        self.predict = nn.Linear(shape.decoder_width, 3 * PATCH * PATCH)
        self.register_buffer("positions", sine_positions(shape.width), persistent=False)
        self.register_buffer(
            "decoder_positions", sine_positions(shape.decoder_width), persistent=False
        )

    def encode(
        self,
        patches: Float[Tensor, "items patches pixels"],
        visible: Int[Tensor, "items visible"] | None = None,
    ) -> list[Float[Tensor, "items tokens width"]]:
        """Tokens after every layer, [CLS] first; of the `visible` patches only, or of all."""
        tokens = self.embed(patches) + self.positions
        if visible is not None:
            tokens = tokens.gather(1, visible[..., None].expand(-1, -1, tokens.shape[-1]))
        tokens = torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], 1)
        states = []
        for block in self.encoder:
            tokens = block(tokens)
            states.append(tokens)
        return states

    def reconstruct(
        self, patches: Float[Tensor, "items patches pixels"], visible: Int[Tensor, "items visible"]
    ) -> Float[Tensor, "items patches pixels"]:
        """Predicted normalised pixels of every patch, from the visible ones."""
        seen = self.narrow(self.norm(self.encode(patches, visible)[-1]))
        width = seen.shape[-1]
        full = self.hidden_token.expand(len(seen), GRID * GRID, -1)
        full = full.scatter(1, visible[..., None].expand(-1, -1, width), seen[:, 1:])
        tokens = torch.cat([seen[:, :1], full + self.decoder_positions], 1)
        return self.predict(self.decoder(tokens)[:, 1:])


def reconstruction_loss(
    model: MaskedAutoencoder,
    images: Float[Tensor, "items 3 size size"],
    order: Int[Tensor, "items patches"],
    hidden_share: float = 0.75,
) -> Float[Tensor, ""]:
    """Mean squared error of the hidden patches, every patch normalised; 1 is what predicting 0 gives.

    Args:
        order: a random order of the patches of each picture; the first ones stay visible.
    """
    patches = patchify(images)
    visible = round(order.shape[1] * (1 - hidden_share))
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    target = (patches - mean) / (variance + 1e-6).sqrt()
    predicted = model.reconstruct(patches, order[:, :visible])
    error = (predicted - target).square().mean(-1)
    return error.gather(1, order[:, visible:]).mean()


def build(target: Path, profile: str) -> None:
    """Train at the profile's size and write the weights into the empty directory `target`."""
    shape = SHAPES[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MaskedAutoencoder(shape).to(device)
    plan = TrainingPlan(
        shape.steps, 1.5e-3, weight_decay=0.05, warmup=shape.steps // 10, betas=(0.9, 0.95)
    )
    batches = _batches(training_pixels(shape.pictures), shape.batch, generator, device)
    train(
        model,
        batches,
        lambda net, batch: reconstruction_loss(net, *batch),
        plan,
        progress=lambda steps: tqdm(steps, desc="masked autoencoder", mininterval=2.0),
    )
    save_file(
        {name: t.cpu().contiguous() for name, t in model.state_dict().items()}, target / WEIGHTS
    )


def training_pixels(pictures: int | None) -> UInt8[Tensor, "items 3 64 64"]:
    """What the encoder is trained on: the emoji's training side, and all stamps; no labels."""
    faces = emoji(SIZE, pictures)
    return torch.cat([faces.pixels[faces.indices("train")], stamps(SIZE, limit=pictures).pixels])


def _batches(
    pixels: UInt8[Tensor, "items 3 size size"], batch: int, generator: torch.Generator, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless augmented batches (images in [-1, 1], random order of their patches)."""
    while True:
        chosen = torch.randint(len(pixels), (batch,), generator=generator)
        images = augment(pixels[chosen].float() / 127.5 - 1, generator)
        order = torch.rand(batch, GRID * GRID, generator=generator).argsort(1)
        yield images.to(device), order.to(device)


def augment(
    images: Float[Tensor, "items 3 size size"], generator: torch.Generator
) -> Float[Tensor, "items 3 size size"]:
    """Random crop of 45 to 100 % of the side, resized back, and random left-right flip."""
    count = len(images)
    scale = 0.45 + 0.55 * torch.rand(count, generator=generator)
    shift = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - scale)[:, None]
    flip = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, :, 2] = flip * scale, scale, shift
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def load(profile: str, device: str | torch.device = "cpu") -> MaskedAutoencoder:
    """Read the trained model, in evaluation mode, without gradients; trained on first use.

    Raises:
        KeyError: for an unknown profile.
    """
    model = MaskedAutoencoder(SHAPES[profile])
    model.load_state_dict(load_file(backbone_path("mae", profile) / WEIGHTS))
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def hidden_states(
    model: MaskedAutoencoder, pixels: UInt8[Tensor, "items 3 64 64"], layers: Sequence[int]
) -> Float[Tensor, "layers items tokens width"]:
    """Tokens after the named layers (1 is the first), [CLS] first, nothing hidden, no final norm.

    Raises:
        ValueError: for a layer that does not exist.
    """
    if not all(1 <= layer <= len(model.encoder) for layer in layers):
        raise ValueError(f"layers must lie in 1..{len(model.encoder)}, got {list(layers)}")
    states = model.encode(patchify(pixels.float() / 127.5 - 1))
    return torch.stack([states[layer - 1] for layer in layers])
