"""A small CLIP on real captioned pictures: frozen tokens of two real encoders, and linear maps trained on them.

Pictures go through the ViT-S/14 and captions through MiniLM once; their tokens are kept in half precision.
What is trained are linear maps of both into one space, contrastively (CLIP, 2103.00020); captions that come
twice in a batch share their target. A picture is the direction of A cls + B mean(patches), a caption that of
C mean(words). Both are sums over tokens, so that B patch and C word can be compared too.

Layers, dropout, batch and width were chosen on another random split of the same pictures. On today's
validation side 500 steps, dropout of .7, word maps that start as the identity and picture maps as a ridge
regression, targets softened by similar captions, and words left out at random each leave recall at 5 and at
10 within two points of this recipe, both ways: it stays.

Names of shapes: `pictures`, `captions` (each once), `tokens` ([CLS], then patches row by row), `words` (pieces
of words, padded), `joint`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float16, Int, UInt8
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.backbones.features import extract
from reattend.backbones.pretrained.minilm import load as load_minilm
from reattend.backbones.pretrained.vit import hidden_states
from reattend.backbones.pretrained.vit import load as load_vit
from reattend.backbones.store import backbone_path
from reattend.data.captioned_pictures import captioned_pictures
from reattend.training.contrastive import shared_targets, symmetric_info_nce
from reattend.training.loop import TrainingPlan, decay_matrices, train
from reattend.trunks.encoders import (
    CachedStates,
    TextEncoder,
    Tokens,
    index_batches,
    masked_mean,
    tokenise,
)

# Of the ViT: the saliency training has moved the last ones away. Two layers side by side found more than one.
LAYERS = (7, 10)
SEEN, SAID = 384 * len(LAYERS), 384  # channels of a token of a picture and of a caption
LONGEST = 32  # pieces of words in a caption, [CLS] and [SEP] among them
ARMS = ("paired", "shuffled")
"""The model, and its placebo: trained alike after the captions have been dealt out anew among the concepts."""


@dataclass(frozen=True)
class Setting:
    """What one profile makes.

    Attributes:
        size: side of the pictures in pixels, as the ViT sees them.
        limit: pictures of each class or folder; None: all.
        rate, decay: learning rate and weight decay.
        dropped: share of channels that training leaves out of every picture and caption at random.
    """

    size: int
    limit: int | None
    joint: int
    batch: int
    steps: int
    rate: float
    decay: float
    dropped: float

    @property
    def plan(self) -> TrainingPlan:
        """Warm-up over a tenth of the steps, then a cosine to zero."""
        return TrainingPlan(
            self.steps, self.rate, self.decay, warmup=max(1, self.steps // 10), fused=True
        )


SETTINGS = {
    "smoke": Setting(56, 2, 32, 16, 4, 1e-3, 0.1, 0.5),
    "cpu": Setting(112, None, 512, 512, 1000, 1e-3, 0.1, 0.5),
    "gpu": Setting(224, None, 512, 1024, 3000, 1e-3, 0.1, 0.5),
}


# --- the model -----------------------------------------------------------------------------------


class Heads(nn.Module):
    """Linear maps of the tokens of both encoders into the joint space, after channels are standardised.

    `scale` is the factor of cosines in the logits, 1 / temperature: learned as its logarithm, at most 100.

    Args:
        dropped: share of standardised channels that are left out at random while training.
    """

    def __init__(self, joint: int, dropped: float = 0.0) -> None:
        super().__init__()
        self.cls = nn.Linear(SEEN, joint)
        self.patch = nn.Linear(SEEN, joint, bias=False)
        self.word = nn.Linear(SAID, joint)
        self.dropout = nn.Dropout(dropped)
        self.log_scale = nn.Parameter(torch.tensor(math.log(20)))
        for kind, width in (("cls", SEEN), ("patch", SEEN), ("word", SAID)):
            self.register_buffer(f"{kind}_mean", torch.zeros(width))
            self.register_buffer(f"{kind}_spread", torch.ones(width))

    @property
    def scale(self) -> Float[Tensor, ""]:
        """1 / temperature, at most 100."""
        return self.log_scale.clamp(max=math.log(100)).exp()

    def standardise_by(self, **states: Float[Tensor, "_ _"]) -> None:
        """Set mean and spread of the channels of "cls", "patch" and "word" to those of some states."""
        for kind, rows in states.items():
            getattr(self, f"{kind}_mean").copy_(rows.mean(0))
            getattr(self, f"{kind}_spread").copy_(rows.std(0) + 1e-6)

    def _mapped(
        self, kind: str, states: Float[Tensor, "*rows channels"]
    ) -> Float[Tensor, "*rows joint"]:
        mean, spread = getattr(self, f"{kind}_mean"), getattr(self, f"{kind}_spread")
        return getattr(self, kind)(self.dropout((states.float() - mean) / spread))

    def picture_tokens(
        self, tokens: Float[Tensor, "pictures tokens seen"]
    ) -> Float[Tensor, "pictures tokens joint"]:
        """[CLS] and patches in the joint space, every token of length 1."""
        cls, patches = self._mapped("cls", tokens[:, :1]), self._mapped("patch", tokens[:, 1:])
        return F.normalize(torch.cat([cls, patches], 1), dim=-1)

    def word_tokens(
        self, states: Float[Tensor, "captions words said"]
    ) -> Float[Tensor, "captions words joint"]:
        """Words, those of padding too, in the joint space, every token of length 1."""
        return F.normalize(self._mapped("word", states), dim=-1)

    def pictures(self, pooled: Float[Tensor, "pictures 2 seen"]) -> Float[Tensor, "pictures joint"]:
        """One vector of length 1 a picture, from what `pooled` makes of its tokens."""
        cls, patches = pooled.unbind(1)
        return F.normalize(self._mapped("cls", cls) + self._mapped("patch", patches), dim=-1)

    def captions(self, means: Float[Tensor, "captions said"]) -> Float[Tensor, "captions joint"]:
        """One vector of length 1 a caption, from the mean of its words."""
        return F.normalize(self._mapped("word", means), dim=-1)


def pooled(
    tokens: Float[Tensor, "pictures tokens seen"],
) -> Float[Tensor, "pictures 2 seen"]:
    """[CLS] and the mean of the patches."""
    return torch.stack([tokens[:, 0].float(), tokens[:, 1:].mean(1, dtype=torch.float32)], 1)


@dataclass(frozen=True)
class CaptionedTokens:
    """What the frozen encoders say of all pictures and captions, in half precision.

    Attributes:
        tokens: of the ViT; [CLS], then the patches row by row; the states after both layers side by side.
        words: of MiniLM, for each caption once; [CLS] and [SEP] are among them.
        ids: MiniLM's numbers of these pieces of words.
        caption_of: which caption each picture has.
        captions: each caption once, in the order of the alphabet.
        concepts, sources, splits: of each picture, see `captioned_pictures`.
    """

    tokens: Float16[Tensor, "pictures tokens seen"]
    words: CachedStates
    ids: Int[Tensor, "captions words"]
    caption_of: Int[Tensor, " pictures"]
    captions: tuple[str, ...]
    concepts: tuple[str, ...]
    sources: tuple[str, ...]
    splits: tuple[str, ...]

    def indices(self, split: str) -> Int[Tensor, " chosen"]:
        """Positions of the pictures of one split."""
        return torch.from_numpy(np.flatnonzero(np.array(self.splits) == split))


# --- the build -----------------------------------------------------------------------------------


def build(target: Path, profile: str) -> None:
    """Keep the tokens of all pictures and captions, and train the maps on those of the training side."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    pictures = captioned_pictures(setting.size, setting.limit)
    captions = sorted(set(pictures.captions))
    pieces, words = read_captions(captions)
    tokens = see_pictures(pictures.pixels, setting.size, device)
    caption_of = torch.tensor([captions.index(caption) for caption in pictures.captions])
    arrays = {"tokens": tokens, "words": words.states, "mask": words.mask, "ids": pieces.ids}
    save_file(arrays | {"caption_of": caption_of}, target / "tokens.safetensors")
    names = ("concepts", "sources", "splits")
    facts = {"captions": captions} | {name: getattr(pictures, name) for name in names}
    (target / "items.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf8")
    kept = _read(target)
    for arm in ARMS:
        heads, losses = fit(arm, setting, kept, device)
        save_model(heads, target / f"{arm}.safetensors")
        print(f"{arm}: {np.mean(losses[-20:]):.2f} nats over the last 20 steps", flush=True)


def see_pictures(
    pixels: UInt8[Tensor, "pictures 3 height width"], size: int, device: str | torch.device = "cpu"
) -> Float16[Tensor, "pictures tokens seen"]:
    """[CLS] and patch tokens of pictures as the maps take them."""
    model = load_vit(device)
    model.encoder.layer = model.encoder.layer[: max(LAYERS)]  # those above are of no use here

    def encode(part: Tensor) -> Tensor:
        states = hidden_states(model, part.to(device), LAYERS, size)
        return torch.cat([*states], dim=-1)[None]

    return extract(encode, pixels, "pictures through the ViT")[0]


def read_captions(captions: Sequence[str]) -> tuple[Tokens, CachedStates]:
    """Captions in pieces of words, and MiniLM's last states of them, as the maps take them."""
    tokenizer, model = load_minilm()
    pieces = tokenise(tokenizer, list(captions), length=LONGEST)
    encoder = TextEncoder(model, frozen=len(model.encoder.layer))
    return pieces, encoder.cache(pieces)


def dealt_out(
    caption_of: Int[Tensor, " pictures"], concepts: Sequence[str], seed: int
) -> Int[Tensor, " pictures"]:
    """A caption of another concept for each picture: concepts pass their captions on in a random ring.

    Pictures of one concept get one and the same caption, the first of their giver.
    """
    names = sorted(set(concepts))
    order = np.random.default_rng(seed).permutation(len(names))
    receiver = {names[a]: names[b] for a, b in zip(order, np.roll(order, 1), strict=True)}
    first = {name: int(caption_of[concepts.index(name)]) for name in names}
    return torch.tensor([first[receiver[name]] for name in concepts])


def fit(
    arm: str, setting: Setting, kept: CaptionedTokens, device: str | torch.device = "cpu"
) -> tuple[Heads, list[float]]:
    """Train the maps of one arm on the training side; the maps, and the loss of every step in nats."""
    rows = kept.indices("train")
    seen, caption_of = pooled(kept.tokens[rows]).to(device), kept.caption_of[rows]
    said = masked_mean(kept.words.states.float(), kept.words.mask).to(device)
    torch.manual_seed(0)
    heads = Heads(setting.joint, setting.dropped).to(device)
    heads.standardise_by(cls=seen[:, 0], patch=seen[:, 1], word=said[caption_of])
    if arm == "shuffled":
        caption_of = dealt_out(caption_of, [kept.concepts[i] for i in rows], seed=0)

    def loss(heads: Heads, index: Tensor) -> Tensor:
        chosen = caption_of[index]
        logits = heads.scale * heads.pictures(seen[index]) @ heads.captions(said[chosen]).T
        return symmetric_info_nce(logits, logits, shared_targets(chosen).to(device))

    batches = index_batches(len(rows), min(setting.batch, len(rows)), seed=0)
    log = train(heads, batches, loss, setting.plan, groups=decay_matrices)
    return heads, log.losses


def _read(directory: Path) -> CaptionedTokens:
    arrays = load_file(directory / "tokens.safetensors")
    facts = json.loads((directory / "items.json").read_text(encoding="utf8"))
    words = CachedStates(arrays["words"], arrays["mask"])
    names = {name: tuple(values) for name, values in facts.items()}
    return CaptionedTokens(arrays["tokens"], words, arrays["ids"], arrays["caption_of"], **names)


def load(profile: str = "cpu", device: str | torch.device = "cpu", arm: str = "paired") -> Heads:
    """The trained maps of a profile, in evaluation mode; built on first use.

    Args:
        arm: "paired", or "shuffled" for the placebo.
    """
    heads = Heads(SETTINGS[profile].joint)
    load_model(heads, backbone_path("clip", profile) / f"{arm}.safetensors")
    return heads.to(device).eval().requires_grad_(False)


def load_tokens(profile: str = "cpu") -> CaptionedTokens:
    """The kept tokens of all pictures and captions of a profile; built on first use."""
    return _read(backbone_path("clip", profile))
