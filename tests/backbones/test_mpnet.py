"""MPNet: it knows paraphrases, and a cut model gives the states of the whole one."""

import pytest
import torch
from torch.nn import functional as F

from reattend.assets.store import AssetError, asset_path
from reattend.backbones.pretrained.mpnet import load
from reattend.trunks.encoders import BiEncoder, TextEncoder, tokenise

TEXTS = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell."]


@pytest.fixture(scope="module", autouse=True)
def _only_where_fetched():
    try:
        asset_path("mpnet_1")
    except AssetError:
        pytest.skip("400 MB that no paper needs by default: `reattend build mpnet`")


def test_it_knows_paraphrases():
    tokenizer, model = load()
    with torch.no_grad():
        embedded = F.normalize(BiEncoder(TextEncoder(model))(tokenise(tokenizer, TEXTS, length=32)))
    assert embedded[0] @ embedded[1] > 0.6 > 0.2 > embedded[0] @ embedded[2]


def test_a_cut_model_gives_the_lower_states():
    tokenizer, model = load()
    tokens = tokenise(tokenizer, TEXTS, length=32)
    with torch.no_grad():
        whole = model(tokens.ids, tokens.mask.long(), output_hidden_states=True).hidden_states
        cut = TextEncoder(load(2)[1])(tokens)
    assert len(cut) == 3
    torch.testing.assert_close(cut[2][tokens.mask], whole[2][tokens.mask], rtol=1e-4, atol=1e-5)
