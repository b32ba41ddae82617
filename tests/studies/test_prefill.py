"""Selections are compared at equal cost: counts, densities and masses are exact."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.attention.baselines.block_topk import BlockTopK
from reattend.attention.baselines.streaming_llm import StreamingLLM
from reattend.attention.host import attach
from reattend.studies.prefill import Capture, DenseMaps, RandomLike

SIZE = 8


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 16}
    config = LlamaConfig(**shape, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def maps(model):
    return DenseMaps(model, torch.randint(0, 50, (64,)).tolist(), SIZE)


def test_random_blocks_are_as_many_with_sink_and_diagonal_and_no_future(maps):
    method = BlockTopK(k=4, block_size=SIZE)
    chosen, placebo = maps.select(method), maps.select(RandomLike(method, seed=0))
    for layer, blocks in placebo.items():
        assert torch.equal(blocks.sum((-2, -1)), chosen[layer].sum((-2, -1)))
        assert blocks[..., 0].all()
        assert blocks.diagonal(dim1=-2, dim2=-1).all()
        assert not blocks.triu(1).any()
        assert not torch.equal(blocks, chosen[layer])
    other = maps.select(RandomLike(method, seed=1))
    assert not torch.equal(other[0], placebo[0])


def test_random_blocks_behind_a_cache_keep_the_diagonal(maps):
    query, key, scale = maps.layers[0]
    made = RandomLike(BlockTopK(k=3, block_size=SIZE), seed=0)
    blocks = made.block_mask(query[:, :, -16:], key, scale=scale)[0]
    assert blocks[:, 0, 6].all()
    assert blocks[:, 1, 7].all()
    assert not blocks[:, 0, 7].any()


def test_masses_and_densities(maps):
    everything = StreamingLLM(sink=0, window=64, block_size=SIZE)
    assert maps.covered(everything) == pytest.approx(1.0, abs=1e-5)
    assert maps.density(everything) == 1.0
    diagonal = StreamingLLM(sink=0, window=SIZE, block_size=SIZE)
    assert maps.density(diagonal) == pytest.approx(8 / 36)
    first = [mass[..., 0, 0] for mass in maps.masses.values()]
    assert all(torch.allclose(mass, torch.full_like(mass, SIZE), rtol=1e-4) for mass in first)


@pytest.mark.parametrize("target", [0.0, 0.4, 0.52, 1.0])
def test_the_nearest_density_is_found(maps, target):
    def make(size):
        return StreamingLLM(sink=0, window=size * SIZE, block_size=SIZE)

    found = maps.match(make, target, most=8).window
    densities = {size * SIZE: maps.density(make(size)) for size in range(1, 9)}
    assert found == min(densities, key=lambda size: abs(densities[size] - target))


def test_every_stride_th_layer_is_kept(model):
    with torch.inference_mode(), attach(model, Capture(2)) as captured:
        model(torch.arange(20)[None])
    assert set(captured.seen) == {0}
