"""Readers of pages of words that are cut into 2 x 2 crops: TextMonkey's modules, their placebos and their rivals.

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
from reattend.data.document_pages import FONTS
from reattend.data.word_pages import (
    COLUMNS,
    LETTERS,
    PATCH,
    ROWS,
    UNASKED,
    WordPages,
    draw_word_pages,
)
from reattend.multimodal_llm.textmonkey import (
    CropGrid,
    CrossWindowAttention,
    TokenResampler,
    gather_tokens,
    later_similarity,
    least_similar,
    partition,
)
from reattend.training.loop import TrainingPlan, train

KEPT = "losses.safetensors"
CROPS = CropGrid(2, 2, ROWS // 2, COLUMNS // 2)
WHOLE = CropGrid(1, 1, ROWS, COLUMNS)

WINDOW_ARMS: dict[str, dict | None] = {
    "no module": None,
    "shift 0": {"shift": 0},
    "zero init": {},
    "default init": {"zero": False},
}
"""Options of the cross-window module of each arm. "shift 0" has its cost, and no window over a border."""

CHOICES = ("similarity", "random", "learned queries", "kept alone", "by slot", "unsorted")
"""How the latents of an arm with the resampler are chosen. "kept alone" is "similarity" with keys of the kept tokens
alone: the weights of the resampler's branch, without what it reads. Of "by slot" (similarity as well) the reader knows
slots of the sequence in the place of places on the page; "unsorted" is "by slot" in a random order."""
BARE = ("similarity", "random", "most similar", "stride", "pooling", "merging")
"""How tokens are kept or made in an arm without the resampler."""


@dataclass(frozen=True)
class Setting:
    """What one profile trains.

    Attributes:
        fonts, size, noise: of the pages: names, pixels of the letters, standard deviation (ink is 0 to 1).
        width, blocks, heads: of the vision transformer; a module stands before each block but the first.
        batch: pages of a step.
        steps, opened_steps, arm_steps, reader_steps: of the networks, of those that are opened to the whole page, of
            the modules, of the readers, which see their pages twice.
        rate: largest learning rate.
        keep: numbers of tokens that are kept of the page's, the smallest last.
        seeds: one network, its arms and readers of all tokens, for each.
        few: of the first so many seeds, the network of the whole page and the linear reader.
    """

    fonts: tuple[str, ...]
    size: int
    noise: float
    width: int
    blocks: int
    heads: int
    batch: int
    steps: int
    opened_steps: int
    arm_steps: int
    reader_steps: int
    rate: float
    keep: tuple[int, ...]
    seeds: range
    few: int

    def draw(self, pages: int, generator: Generator, split: str = "train") -> WordPages:
        """Pages of this setting."""
        return draw_word_pages(pages, self.fonts, self.size, self.noise, generator, split)

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


class Mixing(nn.Module):
    """x + GELU(conv(GroupNorm(x))): tokens of a crop and their neighbours, still before any attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv = nn.Conv2d(width, width, 3, 1, 1)

    def forward(
        self, x: Float[Tensor, "crops width height columns"]
    ) -> Float[Tensor, "crops width height columns"]:
        return x + F.gelu(self.conv(self.norm(x)))


class PageNetwork(nn.Module):
    """A vision transformer that reads each crop alone, and a linear head on every token.

    Attributes:
        windows: cross-window modules by the number of the block that they stand before; none at first.
    """

    def __init__(self, grid: CropGrid, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.stem = nn.Sequential(
            nn.Conv2d(1, width // 2, 5, 2, 2),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, 2, 1),
            nn.GELU(),
            Mixing(width),
        )
        self.positions = nn.Parameter(0.3 * torch.randn(grid.height * grid.width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.windows = nn.ModuleDict()
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(LETTERS))

    def entering(
        self, pixels: Float[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch crops tokens dim"]:
        """Tokens of the crops after the first block, before which no module can stand."""
        size = PATCH * self.grid.height, PATCH * self.grid.width
        crops = partition(pixels[..., None], size).flatten(0, 1).mT.unflatten(2, size)
        patches = self.stem(crops).flatten(2).mT
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
    ) -> Float[Tensor, "batch rows columns letters"]:
        """Scores of the letters at every token of the page, from the tokens after the last block."""
        return self.grid.stitch(self.head(tokens))

    def forward(
        self, pixels: Float[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch rows columns letters"]:
        """Scores of the letters at every token of the page."""
        return self.scores(self.tokens(pixels))


class LinearReader(nn.Module):
    """Scores of the letter at each place, linear in the pixels around its token: what needs no network.

    Args:
        reach: pixels in each direction from the middle of the token; beyond the page they are zero.
    """

    def __init__(self, reach: int = 8) -> None:
        super().__init__()
        self.reach = reach
        self.read = nn.Linear((2 * reach + 1) ** 2, len(LETTERS))

    def forward(self, pages: WordPages) -> Float[Tensor, "batch places letters"]:
        wide = F.pad(pages.pixels, (self.reach,) * 4)
        offsets = torch.arange(2 * self.reach + 1, device=wide.device)
        middles = (place // PATCH * PATCH + PATCH // 2 for place in (pages.rows, pages.columns))
        down, across = (middle[..., None] + offsets for middle in middles)
        page = torch.arange(len(pages), device=wide.device)[:, None, None, None]
        return self.read(wide[page, down[..., None], across[..., None, :]].flatten(2))


def place_codes() -> Float[Tensor, "tokens codes"]:
    """Sines and cosines of row and column of the page's tokens, row by row."""
    waves = 2 * math.pi / torch.tensor([3, 4.5, 7, 10, 15, 22, 33, 50])
    rows, columns = torch.meshgrid(torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij")
    turns = torch.cat([rows.flatten()[:, None] * waves, columns.flatten()[:, None] * waves], 1)
    return torch.cat([turns.sin(), turns.cos()], 1)


CODES = 32
"""Channels of `place_codes`."""


class PlaceReader(nn.Module):
    """One layer of cross-attention from the place that is asked about to a sequence of tokens, and a linear head.

    Per head h of code c_a of the asked place, tokens x and their codes c:

        weights_h = softmax((Q_h c_a) . (P_h c + K_h LN(x)) / sqrt(32))

    Q and P start as 1.2 times the identity, so that a reader looks near the asked place first.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.register_buffer("codes", place_codes(), persistent=False)
        self.norm = nn.LayerNorm(width)
        self.query, self.place = (nn.Linear(CODES, heads * CODES, bias=False) for _ in range(2))
        self.key = nn.Linear(width, heads * CODES, bias=False)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, len(LETTERS))
        with torch.no_grad():
            for layer in (self.query, self.place):
                layer.weight.copy_(1.2 * torch.eye(CODES).repeat(heads, 1))
            self.key.weight.mul_(0.1)

    def forward(
        self,
        sequence: Float[Tensor, "batch slots width"],
        codes: Float[Tensor, "batch slots codes"],
        asked: Int[Tensor, "batch places"],
    ) -> Float[Tensor, "batch places letters"]:
        normed = self.norm(sequence)
        keys = self.place(codes) + self.key(normed)
        parts = self.query(self.codes[asked]), keys, self.value(normed)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.out(read))


def merged(
    tokens: Float[Tensor, "batch n channels"], keep: int, width: int
) -> Float[Tensor, "batch keep channels"]:
    """Bipartite soft matching (ToMe, 2210.09461), repeated until `keep` tokens are left.

    In each round at most half of the tokens, every second one, merge into the most similar of the others; merged tokens
    are means over all that went into them. Cosines of the first `width` channels stand in for those of attention keys.
    """
    sizes = torch.ones_like(tokens[..., :1])
    while tokens.shape[1] > keep:
        gone = min(tokens.shape[1] // 2, tokens.shape[1] - keep)
        unit = F.normalize(tokens[..., :width], dim=-1)
        best, partner = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)
        order = best.argsort(-1, descending=True)[..., None]
        going, staying = order[:, :gone], order[:, gone:].sort(1).values
        partner = partner[..., None].gather(1, going)
        source, target = (tokens * sizes)[:, ::2], (tokens * sizes)[:, 1::2]
        channels = tokens.shape[-1]
        moved = source.gather(1, going.expand(-1, -1, channels))
        target = target.scatter_add(1, partner.expand(-1, -1, channels), moved)
        counts = sizes[:, 1::2].scatter_add(1, partner, sizes[:, ::2].gather(1, going))
        sums = torch.cat([source.gather(1, staying.expand(-1, -1, channels)), target], 1)
        sizes = torch.cat([sizes[:, ::2].gather(1, staying), counts], 1)
        tokens = sums / sizes
    return tokens


class ShortReader(nn.Module):
    """Fewer tokens, by one of `CHOICES` with the resampler or of `BARE` without, and a `PlaceReader` on them.

    Args:
        choice: "all" keeps every token.
        resample: whether the kept tokens go through the resampler and read all of them (each other alone, if
            the choice is "kept alone").
        seed: of random places and orders, which differ from page to page.
    """

    def __init__(
        self, choice: str, keep: int, resample: bool, width: int, heads: int, seed: int
    ) -> None:
        super().__init__()
        self.choice, self.keep = choice, keep
        self.reader = PlaceReader(width, heads)
        self.resampler = TokenResampler(width, width, heads, width // heads) if resample else None
        learned = choice == "learned queries"
        self.queries = nn.Parameter(torch.randn(keep, width)) if learned else None
        self.query_codes = nn.Parameter(torch.randn(keep, CODES)) if learned else None
        numbers = torch.arange(float(ROWS * COLUMNS)).view(1, ROWS, COLUMNS, 1)
        places = CROPS.cut(numbers).flatten().long()
        self.register_buffer("page_places", places, persistent=False)  # of the crops' tokens
        self.generator = Generator().manual_seed(seed)

    def kept(self, tokens: Float[Tensor, "batch n width"]) -> Int[Tensor, "batch keep"]:
        """Which tokens of the crops' sequence stay."""
        count, n = tokens.shape[:2]
        if self.choice == "all":
            return torch.arange(n, device=tokens.device).expand(count, -1)
        if self.choice == "stride":
            return self.slots(n).expand(count, -1)
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

    def slots(self, n: int) -> Int[Tensor, " keep"]:
        """Of every slot of the shorter sequence, the token of n that has its part of the way through."""
        return torch.arange(self.keep, device=self.page_places.device) * n // self.keep

    def latents(
        self, tokens: Float[Tensor, "batch n width"]
    ) -> tuple[Float[Tensor, "batch keep width"], Float[Tensor, "batch keep codes"]]:
        """The shorter sequence before the resampler, and what the reader knows of the places of its members."""
        count, n, width = tokens.shape
        if self.queries is not None:
            return self.queries.expand(count, -1, -1), self.query_codes.expand(count, -1, -1)
        codes = self.reader.codes[self.page_places]
        if self.choice in ("merging", "pooling"):
            both = torch.cat([tokens, codes.expand(count, -1, -1)], -1)
            if self.choice == "merging":
                short = merged(both, self.keep, width)
            else:
                crops = both.unflatten(1, (CROPS.rows * CROPS.columns, -1))
                tall = ROWS * COLUMNS // self.keep // 2  # the means of 1 x 2 tokens, or of 2 x 2
                page = F.avg_pool2d(CROPS.stitch(crops).movedim(-1, 1), (tall, 2))
                short = page.flatten(2).mT
            return short[..., :width], short[..., width:]
        places = self.kept(tokens)
        known = self.slots(n) if self.choice in ("by slot", "unsorted") else places
        return gather_tokens(tokens, places), codes[known].expand(count, -1, -1)

    def forward(
        self, tokens: Float[Tensor, "batch n width"], asked: Int[Tensor, "batch places"]
    ) -> Float[Tensor, "batch places letters"]:
        latents, codes = self.latents(tokens)
        if self.resampler is not None:
            latents = self.resampler(latents if self.choice == "kept alone" else tokens, latents)
        return self.reader(latents, codes, asked)


# Training -----------------------------------------------------------------------------------------


def pages_of(setting: Setting, seed: int, device: torch.device | str) -> Iterator[WordPages]:
    """Batches of pages, the same for the same seed."""
    generator = Generator().manual_seed(seed)
    while True:
        yield setting.draw(setting.batch, generator).to(device)


def token_loss(
    scores: Float[Tensor, "batch rows columns letters"], pages: WordPages
) -> Float[Tensor, ""]:
    """Cross-entropy at every token whose centre lies on a letter."""
    return F.cross_entropy(scores.flatten(0, 2), pages.labels.flatten())


def page_loss(network: PageNetwork, pages: WordPages) -> Float[Tensor, ""]:
    """`token_loss` of a network that reads the pages."""
    return token_loss(network(pages.pixels), pages)


def place_loss(
    scores: Float[Tensor, "batch places letters"], pages: WordPages
) -> Float[Tensor, ""]:
    """Cross-entropy of the letters that are on the pages."""
    asked = pages.letters.masked_fill(~pages.present, UNASKED)
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
            CROPS, setting.width, setting.width, setting.width // 32, window=CROPS.height, **options
        )
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
    crops = state["positions"].expand(1, base.grid.rows * base.grid.columns, -1, -1)
    state["positions"] = base.grid.stitch(crops).flatten(0, 2)
    network.load_state_dict(state)
    return network.to(base.head.weight.device)


def fit_whole_page(
    setting: Setting, base: PageNetwork, seed: int
) -> tuple[PageNetwork, list[float]]:
    """What can be reached from a network of crops: `opened`, and all of it trained, on the pages of an arm."""
    network = opened(base, setting)
    pages = pages_of(setting, 2000 + seed, base.head.weight.device)
    return network, train(network, pages, page_loss, setting.plan(setting.opened_steps)).losses


TokenBatch = tuple[Tensor, WordPages]
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

    def loss(model: nn.Module, drawn: WordPages) -> Tensor:
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
        choices, bare = (CHOICES, BARE) if keep == setting.keep[-1] else (CHOICES[:1], ())
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
    fonts=FONTS,
    size=14,
    noise=0.05,
    width=64,
    blocks=2,
    heads=4,
    batch=6,
    steps=800,
    opened_steps=250,
    arm_steps=500,
    reader_steps=300,
    rate=3e-3,
    keep=(144, 72),
    seeds=range(20, 24),  # runs on digits had 0 to 3 and 10 to 16
    few=3,
)
SETTINGS = {
    "smoke": replace(
        PAPER,
        width=32,
        batch=2,
        steps=2,
        opened_steps=2,
        arm_steps=12,
        reader_steps=2,
        keep=(144,),
        seeds=range(3),
        few=3,
    ),
    "cpu": PAPER,
    "gpu": replace(
        PAPER,
        width=128,
        blocks=4,
        batch=128,
        steps=3000,
        opened_steps=1000,
        arm_steps=2000,
        reader_steps=2000,
        seeds=range(20, 28),
        few=8,
    ),
}
READ = ("shift 0", "zero init")
"""Arms whose tokens are read by a `PlaceReader` as well; shorter sequences are made of the last one's."""


def _seeds(setting: Setting, kind: str) -> range:
    return setting.seeds[: setting.few] if kind == "whole page" else setting.seeds


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
            network, losses = fit_arm(arm, setting, base, arm_pages, seed)
            keep(arm, seed, network, losses)
            if arm in READ:
                readers = untrained_readers(setting, seed, short=arm == READ[-1])
                found = fit_readers(setting, readers, left(network, reader_pages))
                save_model(nn.ModuleDict(readers), target / _file(f"readers {arm}", seed))
                for name, losses in found.items():
                    kept.setdefault(f"{arm}: {name}", []).append(losses)
        last = {kind: sum(rows[-1][-20:]) / len(rows[-1][-20:]) for kind, rows in kept.items()}
        print(f"seed {seed}: {', '.join(f'{k} {v:.3f}' for k, v in last.items())}", flush=True)
    save_file({kind: torch.tensor(rows) for kind, rows in kept.items()}, target / KEPT)


@dataclass(frozen=True)
class PageModels:
    """What was trained: lists over seeds (networks of the whole page and linear readers: the first), to evaluate.

    Attributes:
        networks: "crops" (before any arm), "whole page", and every arm of `WINDOW_ARMS`.
        readers: by arm of `READ`, of every seed a reader by its name, such as "144 similarity + resampler".
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
        models = nn.ModuleDict(untrained_readers(setting, seed, short=arm == READ[-1]))
        return dict(read(f"readers {arm}", seed, models).items())

    kinds = ("crops", "whole page", *WINDOW_ARMS)
    return PageModels(
        {kind: [network(kind, seed) for seed in _seeds(setting, kind)] for kind in kinds},
        {arm: [readers(arm, seed) for seed in setting.seeds] for arm in READ},
        [read("linear", seed, LinearReader()) for seed in _seeds(setting, "whole page")],
        load_file(directory / KEPT),
    )
