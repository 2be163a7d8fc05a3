"""The spliced pass of any causal LM that is a stack of blocks equals a whole pass with an edit.

Tiny random models of transformers' own classes, with their own attention.
"""

import functools

import pytest
import torch
from conftest import residual, resume
from transformers import AutoConfig, AutoModelForCausalLM

from klsplice.errors import UserError
from klsplice.lm.check import check
from klsplice.lm.splice import Splice

LAYER = 1
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SIZES |= {"max_position_embeddings": 64, "initializer_range": 0.3}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
WINDOW = {"sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MANY = EXPERTS | {"num_local_experts": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
MANY |= {"first_k_dense_replace": 1}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
MLA |= {"v_head_dim": 8, "num_key_value_heads": 4}
MIXED = {"layer_types": ["mamba", "attention"] * 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
GATED_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
GATED_DELTA |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
GEMMA4 = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "global_head_dim": 8}
HYBRID = {"mamba_chunk_size": 16, "num_local_experts": 0, "shared_intermediate_size": 64}
JAMBA = {"num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 8, "mamba_dt_rank": 4}
JAMBA |= {"attn_layer_period": 2, "attn_layer_offset": 1, "pad_token_id": 0}
JAMBA |= {"expert_layer_period": 2, "expert_layer_offset": 1}
NEMOTRON_H = {"hybrid_override_pattern": "M*M-", "mamba_num_heads": 4, "mamba_head_dim": 16}
NEMOTRON_H |= {"ssm_state_size": 8, "n_groups": 1, "chunk_size": 16}
GPT_NEO = {"num_layers": 4, "num_heads": 4, "window_size": 8}
GPT_NEO |= {"attention_types": [[["global", "local"], 2]]}
PLAIN = ["llama", "qwen2", "qwen3", "gemma", "gpt_neox", "phi", "olmo", "olmo2", "starcoder2"]
PLAIN += ["stablelm", "nemotron", "ernie4_5", "smollm3", "helium", "arcee", "persimmon", "biogpt"]
PLAIN += ["diffllama", "apertus", "bitnet", "cwm", "doge", "gpt_neox_japanese", "internlm3"]
PLAIN += ["hunyuan_v1_dense", "jais2", "lfm3", "ministral3", "nanochat", "seed_oss"]
FAMILIES = {  # model type: options beside SIZES
    # attention
    **dict.fromkeys(PLAIN),
    "glm": {"pad_token_id": 0},
    "glm4": {"pad_token_id": 0},
    "phi3": {"pad_token_id": 0},
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 4},
    "openai-gpt": GPT,
    "codegen": GPT | {"rotary_dim": 4},
    "gpt_bigcode": GPT,
    "gpt_neo": GPT_NEO,
    "bloom": {"n_layer": 4, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 4, "attention_heads": 4},
    # heads with a scale of their own (gptj, codegen and phi have a bias)
    "granite": {"logits_scaling": 6.0},
    "cohere": {"logit_scale": 0.0625},
    "hyperclovax": {"logits_scaling": 0.125},
    "minicpm3": MLA | {"dim_model_base": 16},
    # sliding windows, sinks, per-layer inputs
    "mistral": WINDOW,
    "gemma2": WINDOW | {"query_pre_attn_scalar": 8},
    "gemma3_text": WINDOW | {"query_pre_attn_scalar": 8},
    "gemma4_text": WINDOW | GEMMA4 | {"num_kv_shared_layers": 0},
    "cohere2": WINDOW | {"logit_scale": 0.0625},
    "vaultgemma": WINDOW | {"query_pre_attn_scalar": 8},
    "granite_swa": WINDOW | {"logits_scaling": 6.0},
    "olmo3": WINDOW,
    "exaone4": WINDOW,
    "gpt_oss": WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    # mixtures of experts
    "mixtral": {"num_local_experts": 2},
    "phimoe": {"num_local_experts": 2},
    "granitemoe": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS,
    "olmoe": EXPERTS,
    **dict.fromkeys(["afmoe", "ernie4_5_moe", "flint", "glm4_moe", "mimo_v2_flash"], MANY),
    **dict.fromkeys(["deepseek_v2", "deepseek_v3", "glm4_moe_lite"], MANY | MLA),
    "llama4_text": WINDOW | MANY | {"intermediate_size_mlp": 64},
    # state spaces, recurrences and hybrids
    "mamba": {"state_size": 8, "expand": 2, "time_step_rank": 4},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "head_dim": 16, "num_heads": 4, "n_groups": 1, "chunk_size": 16},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "xlstm": {"num_heads": 4, "num_blocks": 4, "chunk_size": 8},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "bamba": MAMBA | {"mamba_chunk_size": 16, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": MAMBA | MIXED | HYBRID,
    "qwen3_next": EXPERTS | GATED_DELTA | {"shared_expert_intermediate_size": 16},
    "jamba": JAMBA,
    "nemotron_h": NEMOTRON_H,
}


@functools.cache
def lm_of(family: str, **more):
    more = {name: list(x) if isinstance(x, tuple) else x for name, x in more.items()}
    config = AutoConfig.for_model(family, **SIZES | (FAMILIES[family] or {}) | more)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for p in lm.parameters():
            if p.ndim == 1:  # norms and biases start at 0 or 1
                p.add_(0.1 * torch.randn_like(p))
    return lm.eval().requires_grad_(False)


def some_tokens():
    return torch.randint(3, 97, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_spliced_pass_has_the_bits_of_a_whole_edited_one(family):
    """And its gradient; for a batch after another of a different size. Logits are the LM's."""
    lm = lm_of(family)
    splice = Splice(lm, LAYER, head_chunk=64)
    splice.clean(some_tokens()[:1])
    tokens_BL = some_tokens()
    clean = splice.clean(tokens_BL)
    logits_NV = splice.head.logits(clean.h_BLD.flatten(0, 1), torch.float32)
    assert torch.allclose(logits_NV, lm(tokens_BL, use_cache=False).logits.flatten(0, 1), atol=1e-3)
    y_BLD = (0.5 * clean.x_BLD.roll(1, 1) + 0.1).requires_grad_()
    passes = [
        resume(splice, tokens_BL, y_BLD).h_BLD,
        splice.edited(tokens_BL, {LAYER: lambda x_BLD: y_BLD}).h_BLD,
    ]
    assert torch.equal(*passes) and (passes[0] - clean.h_BLD).abs().max() > 0.1
    grads = [torch.autograd.grad(h_BLD.square().sum(), y_BLD)[0] for h_BLD in passes]
    assert torch.equal(*grads) and grads[0].abs().sum() > 0
    assert torch.equal(resume(splice, tokens_BL, clean.x_BLD).h_BLD, clean.h_BLD)


@pytest.mark.parametrize("family, scale", [("llama", 1.0), ("granite", 1 / 6), ("cohere", 0.0625)])
def test_a_heads_scale_is_found_from_its_logits(family, scale):
    assert Splice(lm_of(family), LAYER, head_chunk=64).head.scale == scale


def test_blocks_that_read_what_lower_ones_left_are_not_skipped():
    """Gemma 4's last layers take keys and values of earlier ones: the pass is then a whole one."""
    types = ("sliding_attention", "full_attention") * 2
    lm = lm_of("gemma4_text", num_kv_shared_layers=2, layer_types=types)
    splice = Splice(lm, LAYER, head_chunk=64)
    check(splice, some_tokens())
    assert splice.whole
    y_BLD = (0.5 * residual(splice, some_tokens())).requires_grad_()
    found = resume(splice, some_tokens(), y_BLD)
    wanted = splice.edited(some_tokens(), {LAYER: lambda x_BLD: y_BLD})
    assert torch.equal(found.h_BLD, wanted.h_BLD)
    (grad,) = torch.autograd.grad(found.h_BLD.square().sum(), y_BLD)
    assert grad.abs().sum() > 0


def test_a_stack_of_several_streams_is_refused():
    """Gemma 3n hands on four residuals at once."""
    sizes = SIZES | WINDOW | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
    sizes |= {"laurel_rank": 4, "num_kv_shared_layers": 0}
    sizes |= {"activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [64] * 4}
    config = AutoConfig.for_model("gemma3n_text", **sizes)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(UserError):
        Splice(lm, LAYER, head_chunk=64)
