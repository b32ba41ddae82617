"""The two towers: what they see, what hooks can do, and what CLIP's parts are."""

import math

import pytest
import torch
from torch.nn import functional as F

from reattend.trunks.image_text import (
    BlockHooks,
    ImageTextModel,
    ImageTower,
    TextTower,
    last_words,
)


def model(seed=0, layers=2):
    torch.manual_seed(seed)
    image = ImageTower(size=15, patch=5, width=12, layers=layers, heads=3)
    return ImageTextModel(image, TextTower(20, 9, 12, layers, 3), joint=7).double().eval()


def pictures(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, 15, 15), generator=generator).to(torch.uint8)


def captions(count=3, length=9, seed=0):
    return torch.randint(20, (count, length), generator=torch.Generator().manual_seed(seed))


def test_patches_are_read_row_by_row():
    tower = model(layers=0).image
    before = tower.embed(pictures())
    changed = pictures()
    changed[:, :, 5:10, 10:15] = 0  # the patch in row 1, column 2 of 3 x 3
    moved = (tower.embed(changed) != before).any(-1)
    assert moved.nonzero()[:, 1].unique().tolist() == [1 + 3 + 2]


def test_tokens_have_length_one_and_the_expected_number():
    both = model()
    image, text = both.image_tokens(pictures()), both.text_tokens(captions())
    assert image.shape == (3, 10, 7)
    assert text.shape == (3, 9, 7)
    for tokens in (image, text):
        torch.testing.assert_close(tokens.norm(dim=-1), torch.ones_like(tokens[..., 0]))


def test_text_is_causal_and_pictures_are_not():
    both, words = model(), captions()
    other = words.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 20
    before, after = both.text(words), both.text(other)
    torch.testing.assert_close(after[:, :5], before[:, :5], atol=1e-12, rtol=0)
    assert (after[:, 5:] - before[:, 5:]).abs().amax(-1).min() > 1e-3
    torch.testing.assert_close(both.text(words[:, :6]), before[:, :6], atol=1e-12, rtol=0)
    seen = both.image(pictures())
    changed = pictures()
    changed[:, :, 10:, 10:] = 0
    assert (both.image(changed) - seen).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("tower", ["image", "text"])
def test_attention_by_hand(tower):
    both = model()
    attention = getattr(both, tower).blocks[0].attention
    x = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(1)).double()
    bias = torch.randn(2, 1, 1, 6, generator=torch.Generator().manual_seed(2)).double()
    seen = torch.ones(6, 6, dtype=torch.bool)
    if tower == "text":
        seen = seen.tril()
    for added in (None, bias):
        mixed, heads = attention(x, added)
        q, k, v = F.linear(x, attention.project.weight, attention.project.bias).chunk(3, -1)
        parts = []
        for h in range(3):
            cut = slice(4 * h, 4 * h + 4)
            scores = q[..., cut] @ k[..., cut].mT / 2
            scores = scores if added is None else scores + added[:, 0]
            parts.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[..., cut])
        torch.testing.assert_close(mixed, attention.out(torch.cat(parts, -1)), atol=1e-12, rtol=0)
        torch.testing.assert_close(heads.keys.transpose(1, 2).flatten(2), k)
        hidden = torch.zeros(6, 6).double().masked_fill(~seen, -math.inf)
        maps = heads.maps(hidden if added is None else hidden + added)
        again = attention.out((maps @ heads.values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(again, mixed, atol=1e-12, rtol=0)


def test_hooks_that_do_nothing_change_nothing():
    both = model()
    torch.testing.assert_close(
        both.image(pictures(), BlockHooks()), both.image(pictures()), atol=0, rtol=0
    )


def test_hooks_are_called_in_order_with_the_states_of_their_place():
    both, calls = model(), []

    class Watch(BlockHooks):
        def before(self, layer, x):
            calls.append(("before", layer, x))
            return x

        def bias(self, layer, x):
            calls.append(("bias", layer, x))

        def between(self, layer, x, heads):
            calls.append(("between", layer, x))
            return x

    both.image(pictures(), Watch())
    names = [(name, layer) for name, layer, _ in calls]
    assert names == [(n, layer) for layer in (0, 1) for n in ("before", "bias", "between")]
    block = both.image.blocks[0]
    start = both.image.embed(pictures())
    torch.testing.assert_close(calls[0][2], start)
    middle = start + block.attention(block.attention_norm(start), None)[0]
    torch.testing.assert_close(calls[2][2], middle)
    torch.testing.assert_close(
        calls[3][2], middle + block.feed_forward(block.feed_forward_norm(middle))
    )


def test_merging_equal_tokens_with_log_sizes_changes_nothing():
    """Proportional attention: two equal tokens, or one of size 2, are the same to everybody."""

    class Merged(BlockHooks):
        """Merges the last two tokens after the first block and keeps account of the sizes."""

        def __init__(self):
            self.sizes = None

        def bias(self, layer, x):
            return None if self.sizes is None else self.sizes.log()[None]

        def between(self, layer, x, heads):
            if layer == 0:
                kept = x.shape[1] - 1
                self.sizes = torch.ones(kept).double()
                self.sizes[-1] = 2
                x = x[:, :kept]
            return x

    tower = model().image
    embedded = tower.embed(pictures())
    embedded[:, -1] = embedded[:, -2]
    plain, merged = tower.states(embedded), tower.states(embedded, Merged())
    assert merged.shape[1] == plain.shape[1] - 1
    torch.testing.assert_close(merged, plain[:, :-1], atol=1e-12, rtol=0)


def test_prompts_are_seen_by_all():
    class Prompted(BlockHooks):
        def before(self, layer, x):
            return torch.cat([x, prompt.expand(len(x), 1, -1)], 1) if layer == 0 else x

    prompt = torch.ones(12, dtype=torch.float64).requires_grad_()
    tower = model().image
    states = tower(pictures(), Prompted())
    assert states.shape[1] == 11
    (gradient,) = torch.autograd.grad(states[:, :10].square().sum(), prompt)
    assert gradient.abs().max() > 0


def test_masked_weights_without_a_hook():
    tower = model().image
    name = "blocks.1.attention.project.weight"
    masked = {name: torch.zeros_like(tower.get_parameter(name))}
    states = torch.func.functional_call(tower, masked, pictures())
    assert (states - tower(pictures())).abs().max() > 1e-3


def test_scale_starts_at_clips_and_is_clamped():
    both = model()
    assert both.scale.item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        both.log_scale.fill_(9.0)
    assert both.scale.item() == pytest.approx(100)


def test_last_words():
    tokens = torch.arange(12.0).view(2, 6, 1)
    mask = torch.arange(6) < torch.tensor([[3], [6]])
    assert last_words(tokens, mask).flatten().tolist() == [2.0, 11.0]


def test_refusals():
    with pytest.raises(ValueError, match="not a whole number"):
        ImageTower(16, 5, 12, 1, 3)
    with pytest.raises(ValueError, match="not a multiple"):
        TextTower(20, 9, 12, 1, 5)
    with pytest.raises(ValueError, match="10 tokens, but positions for 9"):
        model().text(captions(length=10))
