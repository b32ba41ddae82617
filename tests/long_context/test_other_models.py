"""Notebooks that take a reader's own model: one with another vocabulary goes through them to the end."""

import json
import shutil

import pytest
import torch
import yaml
from tests.pipeline.toy import ROOT, Checkout
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.backbones.store import backbone_path

ENTRIES = 30_000  # of SmolLM2's 49,152: its other tokens do not exist for the model below
PAPERS = {
    "act": (),
    "flexprefill": (),
    "hip_attention": ("--set", "lengths=[192]"),
    "moa": (),
    "proxyattn": (),
    "recycled_attention": ("--set", "length=192"),
    "sparse_frontier": (),
}  # what a run takes besides: fewer entries make longer sentences


@pytest.fixture(scope="module")
def own_model(tmp_path_factory):
    """A directory with a small random Llama and the first entries of SmolLM2's tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    for path in backbone_path("smollm2").iterdir():
        if path.suffix in {".json", ".jinja"} and path.name != "config.json":
            shutil.copy(path, directory)
    stored = json.loads((directory / "tokenizer.json").read_text(encoding="utf8"))
    vocabulary = {entry: n for entry, n in stored["model"]["vocab"].items() if n < ENTRIES}
    pairs = [p if isinstance(p, list) else p.split(" ") for p in stored["model"]["merges"]]
    merges = [pair for pair in pairs if "".join(pair) in vocabulary]
    stored["model"] |= {"vocab": vocabulary, "merges": merges}
    (directory / "tokenizer.json").write_text(json.dumps(stored), encoding="utf8")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ENTRIES,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A checkout that keeps its results to itself."""
    checkout = Checkout.__new__(Checkout)
    checkout.root = tmp_path_factory.mktemp("copy")
    for name in ("lib", "notebooks"):
        ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.egg-info")
        shutil.copytree(ROOT / name, checkout.root / name, ignore=ignore)
    for name in ("params.yaml", "constraints.txt"):
        shutil.copy(ROOT / name, checkout.root)
    checkout.run("git", "init", "-q", check=True)
    return checkout


@pytest.mark.parametrize("slug", PAPERS)
def test_a_model_of_another_vocabulary_is_studied_by_its_own_tokens(copy, own_model, slug):
    done = copy.reattend(
        "run", slug, "--profile", "smoke", "--set", f"model={own_model}", *PAPERS[slug]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (copy.root / "build/study/long_context" / slug / "smoke" / "results.json").exists()


def test_every_notebook_that_takes_a_model_is_here(root):
    papers = yaml.safe_load((root / "params.yaml").read_text(encoding="utf8"))["papers"]
    takes = {slug for slug, profiles in papers.items() if "model" in profiles["smoke"]}
    assert takes == set(PAPERS)
