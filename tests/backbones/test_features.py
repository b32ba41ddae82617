"""The cache of frozen features: same key, same features; anything changed, another key."""

import pytest
import torch
from torch import nn

from reattend.backbones import features
from reattend.backbones.features import (
    cached_tokens,
    content_key,
    extract,
    read_tokens,
    write_tokens,
)


def pictures(count: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=generator)


def encode(pixels: torch.Tensor) -> torch.Tensor:
    """Two layers, four tokens, three channels."""
    tokens = pixels.float().flatten(2)[:, :, :4].mT / 255
    return torch.stack([tokens, 2 * tokens])


def test_batches_are_put_together_in_order():
    whole, parts = (extract(encode, pictures(), "test", batch=size) for size in (5, 2))
    assert whole.dtype == torch.float16
    assert whole.shape == (2, 5, 4, 3)
    assert torch.equal(whole, parts)


def test_values_too_large_for_half_precision_are_refused():
    with pytest.raises(ValueError, match="half precision"):
        extract(lambda x: encode(x) * 1e6, pictures(), "test")


def test_key_follows_weights_pictures_layers_and_size():
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    key = content_key(model, pictures(), [1, 2], 112)
    assert key == content_key(model, pictures(), [1, 2], 112)
    others = {
        content_key(model, pictures(4), [1, 2], 112),
        content_key(model, pictures(), [1], 112),
    }
    others.add(content_key(model, pictures(), [1, 2], 98))
    with torch.no_grad():
        model.weight[0, 0] += 1e-3
    others.add(content_key(model, pictures(), [1, 2], 112))
    assert key not in others
    assert len(others) == 4


def test_second_call_reads_the_first_ones_file(tmp_path):
    model, calls = nn.Linear(3, 3), []

    def counted(pixels):
        calls.append(len(pixels))
        return encode(pixels)

    arguments = (model, counted, pictures(), [1, 2], 4, "test", tmp_path)
    first, second = cached_tokens(*arguments), cached_tokens(*arguments)
    assert torch.equal(first, second)
    assert calls == [5]
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "features.safetensors"
    tokens = torch.ones(1, 2, 3, dtype=torch.float16)

    def disk_full(_tensors, file):
        file.write_bytes(b"half of it")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(features, "save_file", disk_full)
        with pytest.raises(OSError, match="no space left"):
            write_tokens(path, tokens)
    assert list(tmp_path.iterdir()) == []
    write_tokens(path, tokens)
    assert torch.equal(read_tokens(path), tokens)
