"""Every method in every kind of model: prompts, chunks, single tokens, beams, padding, half precision.

With room for everything a method gives what the model gives alone. With little room the same tokens
must come out of every way to read them: in chunks of whole blocks or at once, padded or alone, as a
beam or in a row.
"""

import functools
from pathlib import Path

import pytest
import torch
import transformers as T
from transformers.cache_utils import DynamicCache

from reattend.attention.host import attach
from reattend.attention.registry import METHODS, methods, table
from reattend.long_context.moa import Plan, Rule
from reattend.long_context.seer_attention import AttentionGates

pytestmark = pytest.mark.filterwarnings("ignore:.*left nothing out")

BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = BASE | {"num_key_value_heads": 2}
MIXED = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**GROUPED)),
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**GROUPED)),
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**GROUPED, head_dim=16)),
    "mistral": lambda: T.MistralForCausalLM(T.MistralConfig(**GROUPED, sliding_window=None)),
    "mixed windows": lambda: T.Qwen2ForCausalLM(
        T.Qwen2Config(**GROUPED, **MIXED, use_sliding_window=True, max_window_layers=0)
    ),
    "gemma3": lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(**GROUPED, **MIXED, head_dim=16)),
    "neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**BASE)),
    "phi": lambda: T.PhiForCausalLM(T.PhiConfig(**GROUPED)),
    "gpt2": lambda: T.GPT2LMHeadModel(
        T.GPT2Config(
            vocab_size=97,
            n_embd=64,
            n_layer=2,
            n_head=4,
            initializer_range=0.2,
            eos_token_id=None,
            bos_token_id=None,
            pad_token_id=0,
        )
    ),
    "opt": lambda: T.OPTForCausalLM(
        T.OPTConfig(
            vocab_size=97,
            hidden_size=64,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            init_std=0.2,
            word_embed_proj_dim=64,
            eos_token_id=None,
            bos_token_id=None,
            pad_token_id=0,
        )
    ),
    # Keys of 24 numbers and values of 12: multi-head latent attention.
    "deepseek_v3": lambda: T.DeepseekV3ForCausalLM(
        T.DeepseekV3Config(
            **BASE,
            num_key_value_heads=4,
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=12,
        )
    ),
}
LENGTH, STEPS = 48, 2
UNROTATABLE = ("gemma3", "neox", "phi", "gpt2", "opt", "deepseek_v3")
BLOCKS = {"block_size": 8}
CHUNKS = {"block_size": 8, "local": 8, "sink": 2, "instruction": 0, "chunk": 4, "window": 1}
SNAP = {"window": 4, "kernel": 3, "recent": 2, "sink": 1}
# With room for everything, and with little.
SETTINGS = {
    "dense": ({}, {}),
    "flexprefill": (
        {"gamma": 1.0, "min_budget": 0, **BLOCKS},
        {"gamma": 0.5, "min_budget": 8, **BLOCKS},
    ),
    "seer_attention": ({"k": 99}, {"k": 2}),
    "hip_attention": (
        {"k": 99, "dense_layers": 0},
        {"k": 8, "block_q": 8, "window": 8, "sink": 2, "dense_layers": 0},
    ),
    "proxyattn": (
        {"gamma": 1.0, "min_budget": 0, "stride": 2, **BLOCKS},
        {"gamma": 0.5, "min_budget": 8, "stride": 2, **BLOCKS},
    ),
    "dhsa": ({"budget": 99, **CHUNKS}, {"budget": 16, **CHUNKS}),
    "moa": ({}, {"length": LENGTH}),
    "streaming_llm": ({"window": 99, **BLOCKS}, {"sink": 8, "window": 16, **BLOCKS}),
    "vertical_slash": (
        {"verticals": 99, **BLOCKS},
        {"verticals": 2, "slashes": 2, "last_queries": 8, **BLOCKS},
    ),
    "vertical_slash_tokens": ({"lines": 99}, {"lines": 9, "local": 4, "last_queries": 8}),
    "flex_vertical_slash": (
        {"coverage": 1.0},
        {"coverage": 0.5, "least": 4, "local": 4, "last_queries": 8},
    ),
    "block_topk": ({"k": 99, **BLOCKS}, {"k": 2, **BLOCKS}),
    "antidiagonal": ({"mass": 1.0, "stride": 2, **BLOCKS}, {"k": 2, "stride": 2, **BLOCKS}),
    "oracle_topk": ({"mass": 1.0, **BLOCKS}, {"k": 2, **BLOCKS}),
    "act": ({"beta": 1.0}, {"alpha": 1.5}),
    "quest": ({"budget": 99, "page": 2}, {"budget": 8, "page": 2}),
    "snapkv": ({"capacity": 99, **SNAP}, {"capacity": 8, **SNAP}),
    "ada_snapkv": ({"capacity": 99, **SNAP}, {"capacity": 8, **SNAP}),
    "h2o": ({"budget": 99}, {"budget": 8}),
    "recycled_attention": ({"budget": 99}, {"budget": 8, "stride": 4}),
    "hip_decoding": (
        {"k": 99, "dense_layers": 0},
        {"k": 8, "window": 4, "sink": 2, "dense_layers": 0, "refresh": 2},
    ),
    "selective_v": ({"keep": 99}, {"keep": 8}),
    "streaming_cache": ({"budget": 99}, {"budget": 8}),
    "oracle_cache": ({"budget": 99}, {"budget": 8}),
}
# Whether a chunk of whole blocks is read as it would be in a prompt read at once.
BLIND_TO_LATER_QUERIES = (
    "dense",
    "seer_attention",
    "hip_attention",
    "moa",
    "streaming_llm",
    "block_topk",
    "antidiagonal",
    "oracle_topk",
)
PAIRS = [
    (model, method)
    for model in MODELS
    for method in METHODS
    if not (method == "seer_attention" and model in UNROTATABLE)
]
EACH = pytest.mark.parametrize(("architecture", "name"), PAIRS)


@functools.cache
def built(architecture, dtype=torch.float32):
    torch.manual_seed(0)
    return MODELS[architecture]().eval().to(dtype)


@functools.cache
def gates(architecture):
    torch.manual_seed(1)
    return AttentionGates.for_model(built(architecture), block_size=8, std=1.0)


@functools.cache
def own_reads(architecture, dtype=torch.float32):
    """What the model alone gives: for a prompt at once, in chunks, and padded."""
    model, prompt, more = built(architecture, dtype), tokens(), tokens(2, length=STEPS)
    return [read(model, prompt, more, **way) for way in ways_to_read()]


def ways_to_read():
    mask, positions = padded()
    return [{}, {"chunks": 20}, {"mask": mask, "positions": positions}]


@pytest.fixture(autouse=True)
def quiet():
    T.logging.set_verbosity_error()
    with torch.no_grad():
        yield


def tokens(seed=1, rows=2, length=LENGTH):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def plan(architecture, little):
    """Rules of their own for every layer and key head; or spans of everything."""
    config = built(architecture).config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if not little:
        return Plan.uniform(Rule(0, 1.0), 2, heads, block_size=8)
    grown = (Rule(8, 0.25), Rule(-8, 0.5), Rule(16, 0.0), Rule(0, 0.5))[:heads]
    return Plan((grown, grown[::-1]), block_size=8)


def settings(architecture, name, little):
    own = dict(SETTINGS[name][little])
    if name == "moa":
        own["plan"] = plan(architecture, little)
    return own | {"gates": gates(architecture)} if name == "seer_attention" else own


def padded(start=13):
    mask = torch.ones(2, LENGTH + STEPS, dtype=torch.long)
    mask[0, :start] = 0
    return mask, (mask.cumsum(-1) - 1).clamp_min(0)


def read(model, prompt, more, *, chunks=None, mask=None, positions=None):
    """Logits of a prompt, in chunks, and of the tokens behind it, one by one."""
    cache, outputs, seen = DynamicCache(config=model.config), [], 0
    for part in (*prompt.split(chunks or prompt.shape[1], dim=1), *more.split(1, dim=1)):
        call, seen = {}, seen + part.shape[1]
        if mask is not None:
            call["attention_mask"] = mask[:, :seen]
        if positions is not None and not isinstance(model, T.OPTForCausalLM):
            call["position_ids"] = positions[:, seen - part.shape[1] : seen]
        outputs.append(model(part, past_key_values=cache, use_cache=True, **call).logits)
    return torch.cat(outputs, dim=1)


def close(ours, expected):
    # Weights of 0.2 make logits of some tens; a wrong entry moves them by more than 0.1.
    torch.testing.assert_close(ours, expected, atol=5e-3, rtol=1e-3)


@EACH
def test_with_room_for_everything_it_is_the_model_alone(architecture, name):
    model, prompt, more = built(architecture), tokens(), tokens(2, length=STEPS)
    expected, real = own_reads(architecture), padded()[0].bool()
    with attach(model, name, **settings(architecture, name, little=False)):
        ours = [read(model, prompt, more, **way) for way in ways_to_read()]
    for number, (our, own) in enumerate(zip(ours, expected, strict=True)):
        close(*((our[real], own[real]) if number == 2 else (our, own)))


@EACH
def test_with_little_room_all_ways_to_read_agree(architecture, name):
    model, prompt, more = built(architecture), tokens(), tokens(2, length=STEPS)
    mask, positions = padded()
    with attach(model, name, **settings(architecture, name, little=True)) as method:
        whole = read(model, prompt, more)
        density = {phase: method.density(phase) for phase in ("prefill", "decode")}
        together = read(model, prompt, more, mask=mask, positions=positions)
        alone = read(model, prompt[:1, 13:], more[:1])
        if name in BLIND_TO_LATER_QUERIES:
            in_chunks = read(model, prompt, more, chunks=16)
    close(together[0, 13:], alone[0])
    close(together[1], whole[1])
    if name in BLIND_TO_LATER_QUERIES:
        close(in_chunks, whole)
    if name not in ("dense", "act"):
        assert density[METHODS[name].phase] < 0.95
        other = density["decode" if METHODS[name].phase == "prefill" else "prefill"]
        assert other < 0.95 if name == "moa" else other == 1.0
        assert (whole - own_reads(architecture)[0]).abs().max() > 0.1


@EACH
def test_the_score_of_a_beam(architecture, name):
    model, prompt = built(architecture), tokens(rows=1)
    call = settings(architecture, name, little=True)
    with attach(model, name, **call):
        result = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=4,
            num_beams=2,
            do_sample=False,
            pad_token_id=0,
            length_penalty=0.0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        written = result.sequences[:, LENGTH:]
        logits = read(model, prompt, written[:, :-1])[:, LENGTH - 1 :]
    score = logits.log_softmax(-1).gather(-1, written[..., None]).sum().item()
    assert result.sequences_scores[0].item() == pytest.approx(score, abs=5e-3)


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(architecture, name, dtype):
    """Finite, in the type of the model, and near it where everything is read."""
    model, prompt, more = built(architecture, dtype), tokens(), tokens(2, length=STEPS)
    mask, positions = padded()
    own = own_reads(architecture, dtype)[0]
    with attach(model, name, **settings(architecture, name, little=True)):
        sparse = read(model, prompt, more, mask=mask, positions=positions)
    with attach(model, name, **settings(architecture, name, little=False)):
        full = read(model, prompt, more)
    assert sparse.dtype == full.dtype == dtype
    assert sparse[mask.bool()].isfinite().all()
    spread = own.float().std()
    coarse = 0.02 if dtype == torch.float16 else 0.15
    assert (full.float() - own.float()).abs().mean() < coarse * spread


def test_the_matrix_names_every_method():
    assert list(SETTINGS) == list(METHODS)


@pytest.mark.parametrize("architecture", UNROTATABLE)
def test_gates_refuse_what_they_cannot_undo(architecture):
    with pytest.raises(ValueError, match="undo the rotary embedding"):
        AttentionGates.for_model(built(architecture))


def test_the_methods_and_their_settings():
    by_name = {entry.name: entry for entry in methods()}
    assert list(by_name) == list(METHODS)
    assert by_name["quest"].saves_from == 1040
    assert by_name["flexprefill"].saves_from == 1025
    assert by_name["seer_attention"].saves_from is None
    assert by_name["quest"].budgets == ("budget",)
    assert by_name["vertical_slash"].budgets == ("verticals", "slashes")
    assert by_name["vertical_slash_tokens"].budgets == ("lines",)
    assert by_name["quest"].settings == {"budget": 1024, "page": 16}
    assert by_name["act"].source == "lib/reattend/long_context/act.py"


# README


def section():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    return text.split("## Use a method on your own model")[1].split("\n## ")[0]


def test_the_table_in_the_readme_is_that_of_the_registry():
    """Else: print(reattend.attention.registry.table()) between its marks, then `reattend report`."""

    def without_claims(markdown):
        return [line.rsplit("|", 2)[0] for line in markdown.strip().splitlines()]

    ours = section().split("<!-- methods -->\n")[1].split("<!-- /methods -->")[0]
    assert without_claims(ours) == without_claims(table())


def test_the_readme_runs_as_it_stands(monkeypatch):
    monkeypatch.setattr(T.AutoModelForCausalLM, "from_pretrained", lambda path: built("llama"))
    names = {"input_ids": tokens(rows=1), "questions": [tokens(3, 1, 5), tokens(4, 1, 5)]}
    exec(section().split("```python")[1].split("```")[0], names)
    assert [answer.tokens.shape[1] for answer in names["answers"]] == [5, 5]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_readme_attaches_with_its_defaults(name):
    model = built("llama")
    needed = {"gates": gates("llama"), "density": 0.5} if name == "seer_attention" else {}
    needed |= {"plan": plan("llama", little=True)} if name == "moa" else {}
    with attach(model, name, **needed) as method:
        read(model, tokens(), tokens(2, length=STEPS))
    assert 0 < method.density() <= 1
    if name == "seer_attention":
        with pytest.raises(TypeError, match=r"seer_attention needs gates .gates trained for the"):
            attach(model, name).__enter__()
