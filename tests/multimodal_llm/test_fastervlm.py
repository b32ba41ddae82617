"""FasterVLM and FastV by their formulae, against transformers' own attention maps and the official arithmetic."""

import pytest
import torch
from scipy.stats import spearmanr
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from reattend.multimodal_llm.fastervlm import (
    attention_curves,
    cls_attention,
    cls_scores,
    cumulated_mass,
    faster_vlm,
    fastv_scores,
    index_correlation,
    mass_inside,
    read_picture,
    top_mass,
)

SHAPE = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 20,
    "patch_size": 4,
}
TOWERS = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(intermediate_size=32, **SHAPE)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(mlp_ratio=2, **SHAPE)),
    "vit": lambda: ViTModel(ViTConfig(intermediate_size=32, **SHAPE)),
}


def tower(name: str, seed: int = 0) -> torch.nn.Module:
    """A tiny tower in float64 whose attention is far from uniform."""
    torch.manual_seed(seed)
    model = TOWERS[name]().double().eval()
    for key, weight in model.named_parameters():
        if "q_proj.weight" in key or "k_proj.weight" in key:
            torch.nn.init.normal_(weight, std=0.5)
    return model


def pictures(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(seed)).double()


# --- [CLS] attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [-2, -1, 1, 2])
@pytest.mark.parametrize("name", TOWERS)
def test_features_and_attention_are_those_of_transformers(name, layer):
    model = tower(name)
    model.set_attn_implementation("eager")
    wanted = model(pictures(), output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    seen = read_picture(model, pictures(), layer)
    place = layer - 1 if layer > 0 else layer
    near = {
        "atol": 2e-6,
        "rtol": 1e-4,
    }  # transformers takes CLIP's eager softmax in single precision
    torch.testing.assert_close(seen.features, wanted.hidden_states[layer][:, 1:], **near)
    torch.testing.assert_close(seen.attention, wanted.attentions[place][:, :, 0, 1:], **near)
    assert seen.attention.std() > 0.02  # peaked enough for a wrong scale to show
    assert not any(m._forward_hooks for n, m in model.named_modules() if n.endswith("_proj"))


def test_what_is_missing_to_one_is_paid_to_cls_itself():
    model = tower("clip")
    model.set_attn_implementation("eager")
    own = model(pictures(), output_attentions=True).attentions[-2][:, :, 0, 0].mean(1)
    scores = cls_scores(read_picture(model, pictures()).attention)
    torch.testing.assert_close(scores.sum(1), 1 - own)
    assert ((scores >= 0) & (scores <= 1)).all()


def test_half_precision_is_scored_in_single():
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 2, *s, generator=generator) for s in ((8,), (9, 8)))
    found = cls_attention(q.bfloat16(), k.bfloat16())
    assert found.dtype == torch.float32
    wanted = cls_attention(q.bfloat16().double(), k.bfloat16().double())
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-6)


def test_scores_are_the_mean_over_heads_and_choose_the_official_set():
    """Values of the official arithmetic on the same numbers."""
    heads = torch.stack([((5 * torch.arange(6) + 2 * h) % 7 + 1).double() for h in range(3)])[None]
    heads = heads / (heads.sum(-1, keepdim=True) + 2)
    official = torch.tensor([[0.1248, 0.1309, 0.1439, 0.1650, 0.1711, 0.1840]]).double()
    torch.testing.assert_close(cls_scores(heads), official, atol=5e-5, rtol=0)
    assert faster_vlm(heads, 3).places.tolist() == [[3, 4, 5]]
    uneven = torch.tensor([[[0.5, 0.0, 0.2], [0.0, 0.4, 0.25]]])
    assert faster_vlm(uneven, 1).places.tolist() == [[0]]  # mean, not maximum of the smaller head


def test_refusals_of_towers():
    with pytest.raises(ValueError, match=r"1\.\.3"):
        read_picture(tower("clip"), pictures(), 0)
    with pytest.raises(ValueError, match=r"1\.\.3"):
        read_picture(tower("clip"), pictures(), 4)
    plain = torch.nn.Linear(2, 2)
    plain.config = CLIPVisionConfig(**SHAPE)
    with pytest.raises(ValueError, match="give queries and keys"):
        read_picture(plain, pictures())


# --- FastV ----------------------------------------------------------------------------------------


def test_fastv_ranks_visual_tokens_by_the_mean_of_the_last_row():
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(3, 4, 12, generator=generator).softmax(-1)
    scores = fastv_scores(rows, slice(2, 9))
    assert scores.shape == (3, 7)
    torch.testing.assert_close(scores[1, 3], (rows[1, :, 5]).sum() / 4)


# --- statistics ----------------------------------------------------------------------------------------


def causal(length: int) -> torch.Tensor:
    """Two heads of made-up causal attention, the mean of them."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    heads = [(((7 + h) * i + 3 * j * (h + 1)) % 11 + 1).double() * (j <= i) for h in (0, 1)]
    return torch.stack([w / w.sum(-1, keepdim=True) for w in heads]).mean(0)[None]


def test_curves_are_those_of_the_official_script():
    """3 tokens before the picture, 5 of it, 4 after; the official numbers to six digits."""
    official = {
        "full": [0.14969, 0.125684, 0.114832, 0.102821, 0.111112],
        "image": [0.171313, 0.17116, 0.149631, 0.118735, 0.162587],
        "text": [0.08908, 0.07088, 0.062614, 0.072475, 0.059065],
        "last": [0.134328, 0.037313, 0.104478, 0.089552, 0.156716],
    }
    curves = attention_curves(causal(12), slice(3, 8))
    assert curves.keys() == official.keys()
    for name, values in official.items():
        torch.testing.assert_close(
            curves[name][0], torch.tensor(values).double(), atol=6e-7, rtol=0
        )


@pytest.mark.parametrize(("tokens", "text"), [(1, 1), (7, 3), (12, 5)])
def test_uniform_causal_attention_gives_harmonic_sums(tokens, text):
    """Row r pays 1 / (r + 1) to each of its keys, so a column collects a part of the harmonic series."""
    length = tokens + text
    weights = torch.tril(torch.ones(length, length).double())
    weights = (weights / weights.sum(-1, keepdim=True))[None]
    curves = attention_curves(weights, slice(0, tokens))
    harmonic = torch.cat([torch.zeros(1), (1 / torch.arange(1, length + 1)).cumsum(0)]).double()
    for j in range(tokens):
        image = (harmonic[tokens] - harmonic[j]) / (tokens - j)
        full = (harmonic[length] - harmonic[j]) / (length - j)
        assert curves["image"][0, j] == pytest.approx(image.item(), abs=1e-6)
        assert curves["full"][0, j] == pytest.approx(full.item(), abs=1e-6)
    assert torch.allclose(curves["last"], torch.full((1, tokens), 1 / length).double())


def test_a_picture_at_the_end_has_no_last_row():
    with pytest.raises(ValueError, match="ends with the picture"):
        attention_curves(causal(8), slice(3, 8))


@pytest.mark.parametrize("seed", range(3))
def test_index_correlation_is_spearmans_ties_included(seed):
    generator = torch.Generator().manual_seed(seed)
    curve = torch.randint(0, 6, (17,), generator=generator).double()
    curve = curve + torch.arange(17) // 4
    wanted = spearmanr(curve.numpy(), range(17)).statistic
    assert index_correlation(curve).item() == pytest.approx(wanted, abs=1e-12)


def test_index_correlation_at_its_ends():
    rising = torch.arange(9.0).square()
    found = index_correlation(torch.stack([rising, -rising, torch.ones(9)]))
    assert found.tolist() == pytest.approx([1, -1, 0], abs=1e-12)


def test_dispersion_is_the_official_cumulated_share():
    scores = torch.tensor([[0.1248, 0.1309, 0.1439, 0.1650, 0.1711, 0.1840]])
    official = torch.tensor([[0.2001, 0.3861, 0.5655, 0.7220, 0.8643, 1.0]])
    torch.testing.assert_close(cumulated_mass(scores), official, atol=1e-4, rtol=0)
    assert top_mass(scores, 0.5).item() == pytest.approx(0.5655, abs=1e-4)
    assert top_mass(torch.ones(2, 50), 0.2).tolist() == pytest.approx([0.2, 0.2])


def test_mass_inside_is_a_share_of_what_the_patches_get():
    scores = torch.tensor([[0.1, 0.2, 0.1]])
    assert mass_inside(scores, torch.tensor([[0.0, 0.5, 1.0]])).item() == pytest.approx(0.5)
