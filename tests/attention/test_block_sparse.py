"""The backends against each other, and against tampering with the future."""

import pytest
import torch
import torch.nn.functional as F

from reattend.attention import block_sparse
from reattend.attention.block_sparse import block_sparse_attention
from reattend.attention.blocks import block_count, causal_block_mask, query_block_count

# (queries, keys, block size): odd prefills, a multiple, chunks behind a cache, one query, less than
# a block
GRIDS = [
    (63, 63, 16),
    (64, 64, 16),
    (111, 111, 16),
    (257, 257, 32),
    (40, 111, 16),
    (33, 64, 16),
    (1, 50, 16),
    (9, 9, 16),
]
HEADS = [(9, 3), (2, 2), (4, 1)]


def problem(queries, keys, size, heads=(9, 3), seed=0, share=0.4, causal=True):
    """Random tensors and a ragged block mask with rows of no, one, some and all blocks."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads[0], queries, 16), (2, heads[1], keys, 16), (2, heads[1], keys, 12)]
    inputs = [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]
    rows = query_block_count(queries, keys if causal else queries, size)
    mask = torch.rand(2, heads[0], rows, block_count(keys, size), generator=generator) < share
    mask[0, 0, 0] = False
    mask[0, 1, -1] = False
    mask[0, 1, -1, 0] = True
    mask[1, 0, -1] = True
    return inputs, mask


def run(inputs, mask, size, gradient=None, **settings):
    """Output, and with a gradient of the output also the gradients of the inputs."""
    for x in inputs:
        x.grad = None
    output = block_sparse_attention(*inputs, mask, block_size=size, **settings)
    if gradient is None:
        return [output.detach()]
    output.backward(gradient)
    return [output.detach(), *(x.grad for x in inputs)]


def assert_agree(inputs, mask, size, **settings):
    gradient = torch.randn(*inputs[0].shape[:3], 12, generator=torch.Generator().manual_seed(9))
    dense = run(inputs, mask, size, gradient, backend="dense", **settings)
    names = ["output", "gradient of query", "gradient of key", "gradient of value"]
    for backend in ("gather", "masked"):
        found = run(inputs, mask, size, gradient, backend=backend, **settings)
        for name, expected, ours in zip(names, dense, found, strict=True):
            worst = (ours - expected).abs().max().item()
            assert worst < 2e-5, f"{name} of {backend} differs by {worst:.1e}"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]}of{heads[1]}")
@pytest.mark.parametrize(("queries", "keys", "size"), GRIDS)
def test_backends_equal_dense_forward_and_backward(queries, keys, size, heads, seed):
    inputs, mask = problem(queries, keys, size, heads, seed)
    assert_agree(inputs, mask, size)


@pytest.mark.parametrize(("queries", "keys"), [(40, 111), (64, 64), (111, 40)])
def test_backends_equal_dense_without_causality(queries, keys):
    inputs, mask = problem(queries, keys, 16, causal=False)
    assert_agree(inputs, mask, 16, causal=False)


def test_gather_in_many_chunks(monkeypatch):
    monkeypatch.setattr(block_sparse, "GATHERED_NUMBERS", 1)
    inputs, mask = problem(111, 111, 16)
    assert_agree(inputs, mask, 16, scale=0.7)


def test_a_scale_off_by_one_per_cent_would_be_caught():
    inputs, mask = problem(111, 111, 16)
    (exact,) = run(inputs, mask, 16, backend="dense", scale=0.25)
    (wrong,) = run(inputs, mask, 16, backend="gather", scale=0.2525)
    assert (exact - wrong).abs().max() > 1e-4


def test_masks_are_shared_by_broadcasting():
    inputs, mask = problem(63, 63, 16)
    shared = mask[:1, :1]
    (ours,) = run(inputs, shared, 16, backend="gather")
    (expected,) = run(inputs, shared.expand(2, 9, -1, -1), 16, backend="dense")
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["dense", "gather", "masked"])
def test_rows_without_blocks_give_zeros(backend):
    inputs, mask = problem(63, 63, 16)
    output, *gradients = run(inputs, mask, 16, torch.ones(2, 9, 63, 12), backend=backend)
    assert (output[0, 0, :16] == 0).all()
    assert (output[1, 0, -15:] != 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    (nothing,) = run(inputs, torch.zeros_like(mask), 16, backend=backend)
    assert (nothing == 0).all()


@pytest.mark.parametrize("backend", ["dense", "gather", "masked"])
def test_the_future_has_no_influence(backend):
    inputs, mask = problem(111, 111, 16)
    mask[:] = True
    mask[:, :, 3, 1] = False  # not everything, which would bypass the backend
    (before,) = run(inputs, mask, 16, backend=backend)
    with torch.no_grad():
        for x in inputs[1:]:
            x[:, :, 70:] = 100.0
    (after,) = run(inputs, mask, 16, backend=backend)
    assert torch.equal(before[:, :, :70], after[:, :, :70])
    assert (before[:, :, 70:] != after[:, :, 70:]).any(-1).all()


def test_unselected_blocks_have_no_influence():
    inputs, mask = problem(64, 64, 16)
    mask[..., 1] = False
    (before,) = run(inputs, mask, 16, backend="gather")
    with torch.no_grad():
        for x in inputs[1:]:
            x[:, :, 16:32] = float("nan")
    (after,) = run(inputs, mask, 16, backend="gather")
    assert torch.equal(before, after)


@pytest.mark.parametrize("queries", [1, 40, 111])
def test_everything_selected_takes_the_fused_dense_kernel(queries, monkeypatch):
    inputs, mask = problem(queries, 111, 16)
    everything = causal_block_mask(*mask.shape[-2:]).expand(2, 9, -1, -1)
    monkeypatch.setattr(block_sparse, "_gather", None)  # calling it would fail
    (ours,) = run(inputs, everything, 16, backend="gather")
    (expected,) = run(inputs, everything, 16, backend="dense")
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("keys", "causal"), [(111, True), (60, True), (111, False)])
def test_flex_receives_exactly_the_selected_tokens(keys, causal):
    """Builds the block mask of flex_attention without compiling anything."""
    _, mask = problem(60 if causal else 48, keys, 16, causal=causal)
    if causal:
        mask = mask & causal_block_mask(*mask.shape[-2:])
    queries = mask.shape[-2] * 16 - (-keys % 16 if causal else 0)
    built = block_sparse._flex_block_mask(mask, 16, queries, keys, causal)
    assert torch.equal(built.to_dense().bool(), mask)
    partial = torch.zeros_like(mask)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in mask.shape[:3])).tolist():
        columns = built.kv_indices[b, h, i, : built.kv_num_blocks[b, h, i]].tolist()
        partial[b, h, i, columns] = True
    seen = built.mask_mod(0, 0, torch.arange(queries)[:, None], torch.arange(keys))
    padded = F.pad(seen.expand(queries, keys), (0, -keys % 16, 0, -queries % 16), value=True)
    whole = padded.unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).all(3).all(1)
    # Blocks that skip the token mask must be wholly visible to every real query.
    assert (whole | partial | ~mask).all()


def test_flex_equals_dense_on_cpu():
    inputs, mask = problem(40, 63, 16, heads=(4, 2))
    with torch.no_grad():
        try:
            (ours,) = run(inputs, mask, 16, backend="flex")
        except RuntimeError as error:
            if "C++ compiler" not in str(error):
                raise
            pytest.skip(str(error))
    (expected,) = run(inputs, mask, 16, backend="dense")
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_flex_refuses_gradients_on_cpu():
    inputs, mask = problem(40, 63, 16)
    with pytest.raises(NotImplementedError, match="gather"):
        run(inputs, mask, 16, backend="flex")


def test_wrong_masks_and_backends_are_refused():
    inputs, mask = problem(63, 63, 16)
    with pytest.raises(ValueError, match="must be 4 x 4, got 3 x 4"):
        run(inputs, mask[:, :, 1:], 16)
    with pytest.raises(ValueError, match="backend must be one of"):
        block_sparse.check_backend("triton")
    with pytest.raises(ValueError, match="queries <= keys"):
        run([inputs[0], inputs[1][:, :, :20], inputs[2][:, :, :20]], mask, 16)
