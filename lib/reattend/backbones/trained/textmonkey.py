"""Readers of small pages that are cut into two crops: TextMonkey's modules, their placebos and their rivals.

A vision transformer reads each crop alone and is then frozen, as in the paper. Arms of one seed start from the same
network and read the same pages in the same order.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from reattend.backbones.store import backbone_path
from reattend.data.digit_pages import COLUMNS, PATCH, ROWS, UNASKED, DigitPages, draw_digit_pages
from reattend.multimodal_llm.textmonkey import (
    CropGrid,
    CrossWindowAttention,
    TokenResampler,
    gather_tokens,
    later_similarity,
    least_similar,
)
from reattend.training.loop import TrainingPlan, train

KEPT = "losses.safetensors"
DIGITS = 10
CROPS = CropGrid(1, 2, ROWS, COLUMNS // 2)
WHOLE = CropGrid(1, 1, ROWS, COLUMNS)

WINDOW_ARMS: dict[str, dict | None] = {
    "no module": None,
    "shift 0": {"shift": 0},
    "zero init": {},
    "default init": {"zero": False},
    "zero scale": {"zero": False},
}
"""Options of the cross-window module of each arm. "shift 0" has its cost, and windows that are the crops. "zero scale"
starts as plain crops too, but by s = 0, with W2 drawn as in "default init"."""

FEW = ("whole page", "zero scale")
"""Networks of the first seeds alone: a ceiling, and an arm that is shown beside others."""

CHOICES = ("similarity", "random", "learned queries", "unsorted")
"""How the latents of an arm with the resampler are chosen; "unsorted" is "similarity" in a random order."""
BARE = ("similarity", "random", "most similar", "stride", "pooling", "merging")
"""How tokens are kept or made in an arm without the resampler."""


@dataclass(frozen=True)
class Setting:
    """What one profile trains.

    Attributes:
        fonts, size, noise: of the pages: names, pixels of the letters, standard deviation (ink is 0 to 1).
        width, blocks, heads: of the vision transformer; a module stands before each block but the first.
        batch: pages of a step.
        steps, arm_steps, reader_steps: of the networks, of the modules, of the readers, which see their pages twice.
        rate: largest learning rate.
        keep: numbers of tokens that are kept of the page's, the smallest last.
        bare: of `BARE`, what is trained without the resampler.
        seeds: one network, its arms and readers of all tokens, for each.
        few: of the first so many seeds, `FEW`, the linear reader and readers of fewer tokens.
    """

    fonts: tuple[str, ...]
    size: int
    noise: float
    width: int
    blocks: int
    heads: int
    batch: int
    steps: int
    arm_steps: int
    reader_steps: int
    rate: float
    keep: tuple[int, ...]
    bare: tuple[str, ...]
    seeds: range
    few: int

    def draw(self, pages: int, generator: Generator) -> DigitPages:
        """Pages of this setting."""
        return draw_digit_pages(pages, self.fonts, self.size, self.noise, generator)

    def plan(self, steps: int) -> TrainingPlan:
        """Warm-up over a twentieth of the steps, then a cosine to zero."""
        return TrainingPlan(
            steps, self.rate, weight_decay=0.01, warmup=max(1, steps // 20), fused=True
        )


# Networks -----------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)), within each crop."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(
        self, x: Float[Tensor, "batch crops tokens width"]
    ) -> Float[Tensor, "batch crops tokens width"]:
        # The fused kernel takes one batch dimension: crops and pages together.
        parts = self.qkv(self.norm1(x)).flatten(0, 1).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(read.view_as(x))
        return x + self.mlp(self.norm2(x))


class PageNetwork(nn.Module):
    """A vision transformer that reads each crop alone, and a linear head on every token.

    Attributes:
        windows: cross-window modules by the number of the block that they stand before; none at first.
    """

    def __init__(self, grid: CropGrid, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.stem = nn.Sequential(
            nn.Conv2d(1, width // 2, 3, 2, 1), nn.GELU(), nn.Conv2d(width // 2, width, 3, 2, 1)
        )
        self.positions = nn.Parameter(0.3 * torch.randn(grid.height * grid.width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.windows = nn.ModuleDict()
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, DIGITS)

    def entering(
        self, pixels: Float[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch crops tokens dim"]:
        """Tokens of the crops after the first block, before which no module can stand."""
        crops = pixels.unflatten(2, (self.grid.columns, -1)).transpose(1, 2)
        patches = self.stem(crops.flatten(0, 1)[:, None]).flatten(2).mT
        return self.blocks[0](patches.unflatten(0, (len(pixels), -1)) + self.positions)

    def leaving(
        self, x: Float[Tensor, "batch crops tokens dim"]
    ) -> Float[Tensor, "batch crops tokens dim"]:
        """Tokens after the last block, from those after the first."""
        for number, block in enumerate(self.blocks[1:], 1):
            if str(number) in self.windows:
                x = self.windows[str(number)](x)
            x = block(x)
        return self.norm(x)

    def tokens(
        self, pixels: Float[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch crops tokens dim"]:
        """Tokens of the crops after the last block."""
        return self.leaving(self.entering(pixels))

    def scores(
        self, tokens: Float[Tensor, "batch crops tokens dim"]
    ) -> Float[Tensor, "batch rows columns digits"]:
        """Scores of the digits at every token of the page, from the tokens after the last block."""
        return self.grid.stitch(self.head(tokens))

    def forward(
        self, pixels: Float[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch rows columns digits"]:
        """Scores of the digits at every token of the page."""
        return self.scores(self.tokens(pixels))


class LinearReader(nn.Module):
    """Scores of the digit at each place, linear in the pixels around its token: what needs no network.

    Args:
        reach: pixels in each direction from the middle of the token; beyond the page they are zero.
    """

    def __init__(self, reach: int = 8) -> None:
        super().__init__()
        self.reach = reach
        self.read = nn.Linear((2 * reach + 1) ** 2, DIGITS)

    def forward(self, pages: DigitPages) -> Float[Tensor, "batch 3 digits"]:
        wide = F.pad(pages.pixels, (self.reach,) * 4)
        offsets = torch.arange(2 * self.reach + 1, device=wide.device)
        middles = (place // PATCH * PATCH + PATCH // 2 for place in (pages.rows, pages.columns))
        down, across = (middle[..., None] + offsets for middle in middles)
        page = torch.arange(len(pages), device=wide.device)[:, None, None, None]
        return self.read(wide[page, down[..., None], across[..., None, :]].flatten(2))


class PlaceReader(nn.Module):
    """One layer of cross-attention from the place that is asked about to a sequence of tokens, and a linear head.

    Like a language model it knows a token by its slot in the sequence and by what it holds, not where it came from.

    Args:
        slots: length of the sequence.
    """

    def __init__(self, width: int, slots: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.places = nn.Embedding(ROWS * COLUMNS, width)
        self.norm = nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, DIGITS)
        nn.init.normal_(self.places.weight, std=0.1)
        # Drawn last, so that readers of any length share the rest.
        self.slots = nn.Parameter(0.1 * torch.randn(slots, width))

    def forward(
        self, sequence: Float[Tensor, "batch slots width"], asked: Int[Tensor, "batch places"]
    ) -> Float[Tensor, "batch places digits"]:
        normed = self.norm(sequence)
        parts = self.query(self.places(asked)), self.key(normed + self.slots), self.value(normed)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.out(read))


def merged(tokens: Float[Tensor, "batch n width"], keep: int) -> Float[Tensor, "batch keep width"]:
    """Bipartite soft matching (ToMe, 2210.09461), repeated until `keep` tokens are left.

    In each round at most half of the tokens, every second one, merge into the most similar of the others; merged tokens
    are means over all that went into them. Cosines of the tokens stand in for those of attention keys.
    """
    sizes = torch.ones_like(tokens[..., :1])
    while tokens.shape[1] > keep:
        gone = min(tokens.shape[1] // 2, tokens.shape[1] - keep)
        unit = F.normalize(tokens, dim=-1)
        best, partner = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)
        order = best.argsort(-1, descending=True)[..., None]
        going, staying = order[:, :gone], order[:, gone:].sort(1).values
        partner = partner[..., None].gather(1, going)
        source, target = (tokens * sizes)[:, ::2], (tokens * sizes)[:, 1::2]
        width = tokens.shape[-1]
        moved = source.gather(1, going.expand(-1, -1, width))
        target = target.scatter_add(1, partner.expand(-1, -1, width), moved)
        counts = sizes[:, 1::2].scatter_add(1, partner, sizes[:, ::2].gather(1, going))
        sums = torch.cat([source.gather(1, staying.expand(-1, -1, width)), target], 1)
        sizes = torch.cat([sizes[:, ::2].gather(1, staying), counts], 1)
        tokens = sums / sizes
    return tokens


class ShortReader(nn.Module):
    """Fewer tokens, by one of `CHOICES` with the resampler or of `BARE` without, and a `PlaceReader` on them.

    Args:
        choice: "all" keeps every token.
        resample: whether the kept tokens read all of them.
        seed: of random places and orders, which differ from page to page.
    """

    def __init__(
        self, choice: str, keep: int, resample: bool, width: int, heads: int, seed: int
    ) -> None:
        super().__init__()
        self.choice, self.keep = choice, keep
        self.reader = PlaceReader(width, keep, heads)
        self.resampler = TokenResampler(width, width, heads, width // heads) if resample else None
        learned = choice == "learned queries"
        self.queries = nn.Parameter(torch.randn(keep, width)) if learned else None
        self.generator = Generator().manual_seed(seed)

    def kept(self, tokens: Float[Tensor, "batch n width"]) -> Int[Tensor, "batch keep"]:
        """Places of the tokens that stay."""
        count, n = tokens.shape[:2]
        if self.choice == "all":
            return torch.arange(n, device=tokens.device).expand(count, -1)
        if self.choice == "stride":
            step = torch.arange(self.keep, device=tokens.device) * n // self.keep
            return step.expand(count, -1)
        if self.choice == "most similar":
            return later_similarity(tokens).topk(self.keep).indices.sort(-1).values
        if self.choice == "random":
            noise = torch.rand(count, n, generator=self.generator).to(tokens.device)
            return noise.topk(self.keep).indices.sort(-1).values
        places = least_similar(tokens, self.keep)
        if self.choice == "unsorted":
            noise = torch.rand(count, self.keep, generator=self.generator).to(tokens.device)
            places = places.gather(1, noise.argsort(-1))
        return places

    def latents(self, tokens: Float[Tensor, "batch n width"]) -> Float[Tensor, "batch keep width"]:
        """The shorter sequence before the resampler."""
        if self.queries is not None:
            return self.queries.expand(len(tokens), -1, -1)
        if self.choice == "merging":
            return merged(tokens, self.keep)
        if self.choice == "pooling":
            page = CROPS.stitch(tokens.unflatten(1, (CROPS.columns, -1))).movedim(-1, 1)
            tall = ROWS * COLUMNS // self.keep // 2  # the means of 1 x 2 tokens, or of 2 x 2
            return F.avg_pool2d(page, (tall, 2)).flatten(2).mT
        return gather_tokens(tokens, self.kept(tokens))

    def forward(
        self, tokens: Float[Tensor, "batch n width"], asked: Int[Tensor, "batch places"]
    ) -> Float[Tensor, "batch places digits"]:
        latents = self.latents(tokens)
        if self.resampler is not None:
            latents = self.resampler(tokens, latents)
        return self.reader(latents, asked)


# Training -----------------------------------------------------------------------------------------


def pages_of(setting: Setting, seed: int, device: torch.device | str) -> Iterator[DigitPages]:
    """Batches of pages, the same for the same seed."""
    generator = Generator().manual_seed(seed)
    while True:
        yield setting.draw(setting.batch, generator).to(device)


def token_loss(
    scores: Float[Tensor, "batch rows columns digits"], pages: DigitPages
) -> Float[Tensor, ""]:
    """Cross-entropy at every token whose centre lies on a digit."""
    return F.cross_entropy(scores.flatten(0, 2), pages.labels.flatten())


def page_loss(network: PageNetwork, pages: DigitPages) -> Float[Tensor, ""]:
    """`token_loss` of a network that reads the pages."""
    return token_loss(network(pages.pixels), pages)


def place_loss(
    scores: Float[Tensor, "batch places digits"], pages: DigitPages
) -> Float[Tensor, ""]:
    """Cross-entropy of the digits that are on the pages."""
    asked = pages.digits.masked_fill(~pages.present, UNASKED)
    return F.cross_entropy(scores.flatten(0, 1), asked.flatten())


def untrained(setting: Setting, grid: CropGrid, seed: int) -> PageNetwork:
    """A network before training."""
    torch.manual_seed(seed)
    return PageNetwork(grid, setting.width, setting.blocks, setting.heads)


def add_windows(network: PageNetwork, arm: str, setting: Setting, seed: int) -> None:
    """Put an arm's modules before each block but the first; those of one seed draw the same numbers.

    Raises:
        ValueError: for an unknown arm; lists the known ones.
    """
    if arm not in WINDOW_ARMS:
        raise ValueError(f"unknown arm '{arm}'; there are: {', '.join(WINDOW_ARMS)}")
    options = WINDOW_ARMS[arm]
    if options is None:
        return
    torch.manual_seed(seed)
    for number in range(1, setting.blocks):
        module = CrossWindowAttention(
            CROPS, setting.width, setting.width, setting.width // 32, window=ROWS, **options
        )
        if arm == "zero scale":
            nn.init.zeros_(module.shift_attn.mlp.scale)
        network.windows[str(number)] = module.to(network.head.weight.device)


def fit_network(
    setting: Setting, grid: CropGrid, seed: int, device: torch.device | str = "cpu"
) -> tuple[PageNetwork, list[float]]:
    """A network trained from scratch, and the loss of every step."""
    network = untrained(setting, grid, seed).to(device)
    pages = pages_of(setting, 1000 + seed, device)
    return network, train(network, pages, page_loss, setting.plan(setting.steps)).losses


def opened(base: PageNetwork, setting: Setting) -> PageNetwork:
    """A network of crops whose tokens now see the whole page; all its weights, and its positions in every crop."""
    network = untrained(setting, WHOLE, 0)
    state = base.state_dict()
    crops = state["positions"].expand(1, base.grid.columns, -1, -1)
    state["positions"] = base.grid.stitch(crops).flatten(0, 2)
    network.load_state_dict(state)
    return network.to(base.head.weight.device)


def fit_whole_page(
    setting: Setting, base: PageNetwork, seed: int
) -> tuple[PageNetwork, list[float]]:
    """What can be reached from a network of crops: `opened`, and all of it trained, twice as long as an arm."""
    network = opened(base, setting)
    pages = pages_of(setting, 2000 + seed, base.head.weight.device)
    return network, train(network, pages, page_loss, setting.plan(2 * setting.arm_steps)).losses


TokenBatch = tuple[Tensor, DigitPages]
"""Tokens of pages, [pages, crops, tokens, dim], and the pages."""


@torch.no_grad()
def entered(network: PageNetwork, setting: Setting, steps: int, seed: int) -> list[TokenBatch]:
    """Pages of a number of steps as they enter the second block: the first one is the same in all arms."""
    pages = pages_of(setting, seed, network.head.weight.device)
    return [(network.entering(drawn.pixels), drawn) for drawn in islice(pages, steps)]


@torch.no_grad()
def left(network: PageNetwork, batches: Iterable[TokenBatch]) -> list[TokenBatch]:
    """The same pages as they leave the last block of a frozen network."""
    return [(network.eval().leaving(entering), drawn) for entering, drawn in batches]


def fit_arm(
    arm: str, setting: Setting, base: PageNetwork, batches: Iterable[TokenBatch], seed: int
) -> tuple[PageNetwork, list[float]]:
    """A frozen network with an arm's modules; they and the head, which starts as the network's, are trained."""
    network = copy.deepcopy(base).requires_grad_(False)
    network.head.requires_grad_(True)
    add_windows(network, arm, setting, seed)

    def loss(model: nn.Module, batch: TokenBatch) -> Tensor:
        return token_loss(model.scores(model.leaving(batch[0])), batch[1])

    return network, train(network, batches, loss, setting.plan(setting.arm_steps)).losses


def fit_linear(setting: Setting, seed: int, device: torch.device | str = "cpu") -> LinearReader:
    """The linear reader, on as many pages as a network."""
    torch.manual_seed(seed)
    reader = LinearReader().to(device)
    pages = pages_of(setting, 1000 + seed, device)

    def loss(model: nn.Module, drawn: DigitPages) -> Tensor:
        return place_loss(model(drawn), drawn)

    train(reader, pages, loss, setting.plan(setting.steps))
    return reader


Readers = dict[str, ShortReader]


def untrained_readers(setting: Setting, seed: int, *, short: bool) -> Readers:
    """Readers of a network's tokens: of all, and if `short` of fewer, by similarity, and by every choice."""

    def make(choice: str, keep: int, resample: bool) -> ShortReader:
        torch.manual_seed(seed)
        return ShortReader(choice, keep, resample, setting.width, setting.heads, seed)

    found = {"all": make("all", ROWS * COLUMNS, False)}
    for keep in setting.keep if short else ():
        # Its rivals are trained where choosing matters most: at the smallest number.
        choices, bare = (CHOICES, setting.bare) if keep == setting.keep[-1] else (CHOICES[:1], ())
        found |= {f"{keep} {name} + resampler": make(name, keep, True) for name in choices}
        found |= {f"{keep} {name}": make(name, keep, False) for name in bare}
    return found


def fit_readers(
    setting: Setting, readers: Readers, batches: Sequence[TokenBatch]
) -> dict[str, list[float]]:
    """Train readers on the same tokens of a frozen network; the loss of every step of each.

    Args:
        batches: for half of the steps; each is read twice.
    """
    losses = {name: [] for name in readers}

    def loss(model: nn.ModuleDict, batch: TokenBatch) -> Tensor:
        tokens, pages = batch
        found = {
            name: place_loss(reader(tokens.flatten(1, 2), pages.tokens), pages)
            for name, reader in model.items()
        }
        for name, value in found.items():
            losses[name].append(value.item())
        return torch.stack(list(found.values())).sum()

    # A bound on the norm of all gradients together would let the readers disturb each other.
    plan = replace(setting.plan(setting.reader_steps), clip=math.inf)
    train(nn.ModuleDict(readers).to(batches[0][0].device), [*batches, *batches], loss, plan)
    return losses


# Building and loading -----------------------------------------------------------------------------

PAPER = Setting(
    fonts=("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral"),
    size=16,
    noise=0.05,
    width=64,
    blocks=2,
    heads=4,
    batch=16,
    steps=1200,
    arm_steps=250,
    reader_steps=700,
    rate=3e-3,
    keep=(36, 18),
    bare=("similarity", "most similar", "stride"),
    seeds=range(10, 17),  # an earlier run had 0 to 3
    few=4,
)
SETTINGS = {
    "smoke": replace(
        PAPER,
        width=32,
        batch=2,
        steps=2,
        arm_steps=12,
        reader_steps=2,
        keep=(36,),
        seeds=range(4),
        few=3,
    ),
    "cpu": PAPER,
    "gpu": replace(
        PAPER,
        width=128,
        blocks=4,
        batch=128,
        steps=3000,
        arm_steps=1000,
        reader_steps=2000,
        bare=BARE,
        seeds=range(10, 18),
        few=8,
    ),
}
READ = ("shift 0", "zero init")
"""Arms whose tokens are read by a `PlaceReader` as well; shorter sequences are made of the last one's."""


def _seeds(setting: Setting, kind: str) -> range:
    return setting.seeds[: setting.few] if kind in FEW else setting.seeds


def _short(setting: Setting, arm: str, seed: int) -> bool:
    return arm == READ[-1] and seed in setting.seeds[: setting.few]


def _file(kind: str, seed: int) -> str:
    return f"{kind.replace(' ', '-')}-{seed}.safetensors"


def build(target: Path, profile: str) -> None:
    """Train all networks, modules and readers of a profile; write weights and losses."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    kept: dict[str, list[list[float]]] = {}

    def keep(kind: str, seed: int, model: nn.Module, losses: list[float]) -> None:
        save_model(model, target / _file(kind, seed))
        kept.setdefault(kind, []).append(losses)

    for seed in setting.seeds:
        base, losses = fit_network(setting, CROPS, seed, device)
        keep("crops", seed, base, losses)
        if seed in _seeds(setting, "whole page"):
            keep("whole page", seed, *fit_whole_page(setting, base, seed))
            save_model(fit_linear(setting, seed, device), target / _file("linear", seed))
        arm_pages = entered(base, setting, setting.arm_steps, 2000 + seed)
        reader_pages = entered(base, setting, setting.reader_steps // 2, 3000 + seed)
        for arm in WINDOW_ARMS:
            if seed not in _seeds(setting, arm):
                continue
            network, losses = fit_arm(arm, setting, base, arm_pages, seed)
            keep(arm, seed, network, losses)
            if arm in READ:
                readers = untrained_readers(setting, seed, short=_short(setting, arm, seed))
                found = fit_readers(setting, readers, left(network, reader_pages))
                save_model(nn.ModuleDict(readers), target / _file(f"readers {arm}", seed))
                for name, losses in found.items():
                    kept.setdefault(f"{arm}: {name}", []).append(losses)
        last = {kind: sum(rows[-1][-20:]) / len(rows[-1][-20:]) for kind, rows in kept.items()}
        print(f"seed {seed}: {', '.join(f'{k} {v:.3f}' for k, v in last.items())}", flush=True)
    save_file({kind: torch.tensor(rows) for kind, rows in kept.items()}, target / KEPT)


@dataclass(frozen=True)
class PageModels:
    """What was trained: lists over seeds (`FEW`, linear readers and readers of fewer tokens: the first), to evaluate.

    Attributes:
        networks: "crops" (before any arm), "whole page", and every arm of `WINDOW_ARMS`.
        readers: by arm of `READ`, of every seed a reader by its name, such as "36 similarity + resampler".
        linear: linear readers.
        losses: training loss of every step, [seeds, steps], by network, and by "arm: reader".
    """

    networks: dict[str, list[PageNetwork]]
    readers: dict[str, list[Readers]]
    linear: list[LinearReader]
    losses: dict[str, Float[Tensor, "seeds steps"]]


def load(profile: str = "cpu", device: torch.device | str = "cpu") -> PageModels:
    """The models of a profile, built on first use."""
    setting, directory = SETTINGS[profile], backbone_path("textmonkey", profile)

    def read(kind: str, seed: int, model: nn.Module) -> nn.Module:
        load_model(model, directory / _file(kind, seed))
        return model.to(device).eval()

    def network(kind: str, seed: int) -> PageNetwork:
        model = untrained(setting, WHOLE if kind == "whole page" else CROPS, seed)
        if kind in WINDOW_ARMS:
            add_windows(model, kind, setting, seed)
        return read(kind, seed, model)

    def readers(arm: str, seed: int) -> Readers:
        models = nn.ModuleDict(untrained_readers(setting, seed, short=_short(setting, arm, seed)))
        return dict(read(f"readers {arm}", seed, models).items())

    kinds = ("crops", "whole page", *WINDOW_ARMS)
    return PageModels(
        {kind: [network(kind, seed) for seed in _seeds(setting, kind)] for kind in kinds},
        {arm: [readers(arm, seed) for seed in setting.seeds] for arm in READ},
        [read("linear", seed, LinearReader()) for seed in _seeds(setting, "whole page")],
        load_file(directory / KEPT),
    )
