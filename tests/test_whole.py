"""run.py from constants to results, every kind of run, on a text that the LM itself wrote.

Of its own text an LM's cross-entropy is its entropy, and what a splice adds to it is the KL. Where
there is a GPU, the LM has the width and vocabulary of Gemma-2-2B, and the SAEs have real sizes.
"""

import gc
import math
from types import SimpleNamespace

import hub
import numpy as np
import pytest
import tiny
import torch
import transformers
from seams import no_figures  # noqa: F401  a fixture

import run

CUDA = torch.cuda.is_available()
STEPS, BATCH, LAYER, HELD_OUT = 24, 2, 2, 16
CONTEXT, F, K, RANK = (1024, 16_384, 80, 16) if CUDA else (64, 128, 8, 4)
TOKENS = STEPS * BATCH * CONTEXT
SIZES = {"num_hidden_layers": 6}
if not CUDA:
    SIZES |= {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "vocab_size": 600}
    SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 8}
    SIZES |= {"sliding_window": 32, "initializer_range": 0.2}
SMALL = {"DEVICE": "cuda" if CUDA else "cpu", "DTYPE": "bfloat16" if CUDA else "float32"}
SMALL |= {"LAYER": LAYER, "CONTEXT": CONTEXT, "BATCH": BATCH, "LOG_EVERY": 4}
SMALL |= {"TOKENS": TOKENS, "VAL_TOKENS": HELD_OUT * CONTEXT, "EVAL_EVERY": TOKENS // 2}
SMALL |= {"MODEL_REVISION": "", "WANDB_PROJECT": "", "RUN_NAME": "x"}
SMALL |= {"COMPILE": False, "CHECK_SAE": False, "LR": 1e-4 if CUDA else 3e-3}
FRESH = {"SAE": "fresh", "D_SAE": F, "K": K, "LR": 3e-4 if CUDA else 1e-2}
COMPILED = {"COMPILE": True}
LORA = {"RANK": RANK, "LR": 1e-3 if CUDA else 5e-3}
CASES = {  # those without SAE start from the one that `world` has
    "kl of float32 logits": {"LOSS": "kl", "LOGITS": "float32", "KEEP": "special"},
    "mse": {"LOSS": "mse", "KEEP": "first", "SHUFFLE": 8},
    "65k latents": FRESH | {"D_SAE": 4 * F} | COMPILED,
    "low memory": {"LOW_MEMORY": True, "HEAD_CHUNK": 256, "MICRO_BATCH": 1, "CLEAN_BATCH": 1},
    "micro-batches": {"BATCH": 4, "MICRO_BATCH": 2, "CLEAN_BATCH": 2, "KEEP": "outliers"},
    "auxk": FRESH | {"AUXK": 0.03, "DEAD_AFTER": 8 * CONTEXT, "LOSS": "mse"},
    "an MLP's output": FRESH | {"SITE": "hook_mlp_out"} | COMPILED,
    "relu": FRESH | {"ARCHITECTURE": "relu", "D_SAE": F // 4},
    "matryoshka": {"ARCHITECTURE": "matryoshka"},
    "jumprelu ste": {"ARCHITECTURE": "jumprelu", "JUMPRELU_THRESHOLD": "ste"},
    "mlp adapter": LORA | {"TRAIN": "adapter", "ADAPTER": "mlp"},
    "sae_lora": LORA | {"TRAIN": "sae_lora"},
    "lm_lora after": LORA | COMPILED | {"TRAIN": "lm_lora", "LOSS": "kl", "LORA_BLOCKS": "after"},
}
HERE = CASES if CUDA else ("low memory", "lm_lora after")  # other tests have the others
pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An LM, a text of its own, and a fresh TopK SAE: a run never stopped."""
    root = tmp_path_factory.mktemp("world")
    hub.make_gemma(root / "gem", seed=0)  # for its tokeniser
    config = transformers.Gemma2Config(tie_word_embeddings=False, **SIZES)
    torch.manual_seed(0)
    with torch.device(SMALL["DEVICE"]), torch.no_grad():
        dtype = getattr(torch, SMALL["DTYPE"])
        lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        lm.get_output_embeddings().weight.normal_(0, 3 / config.hidden_size**0.5)
        np.save(root / "text.npy", written_by(lm.eval(), HELD_OUT + STEPS * BATCH))
    lm.save_pretrained(root / "gem")
    world = SimpleNamespace(root=root, vocabulary=config.vocab_size)
    assert main(world, root, **FRESH | COMPILED) == 0
    return world


def written_by(lm, sequences: int) -> np.ndarray:
    """Contexts that the LM samples, token by token, from BOS on."""
    tokens_BL, cache = torch.full((sequences, 1), 2), None
    while tokens_BL.shape[1] < CONTEXT:
        out = lm(tokens_BL[:, -1:], past_key_values=cache, use_cache=True)
        p_BV, cache = out.logits[:, -1].float().softmax(-1), out.past_key_values
        tokens_BL = torch.cat([tokens_BL, torch.multinomial(p_BV, 1)], 1)
    return tokens_BL.cpu().numpy().astype(np.uint32)


@pytest.fixture(autouse=True)
def free_memory():
    yield
    gc.collect()
    if CUDA:
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def main(world, runs, **changes) -> int:
    own = {"MODEL": world.root / "gem", "DATASET": world.root / "text.npy"}
    own |= {"SAE": world.root / "x", "CACHE": world.root / "cache", "RUNS": runs}
    return run.main([f"{name}={value}" for name, value in (SMALL | own | changes).items()])


@pytest.mark.parametrize("name", HERE)
def test_a_run_of_every_kind_ends_with_less_loss(world, tmp_path, name):
    case = CASES[name]
    assert main(world, tmp_path, **case) == 0
    found = tiny.read(tmp_path / "x" / "results.json")
    assert all(math.isfinite(x) for x in found.values() if isinstance(x, (int, float)))
    assert found["tokens"] == TOKENS and found["ce_clean"] < math.log(world.vocabulary)
    for when in ("before", "after"):
        added, kl = found[f"ce_{when}"] - found["ce_clean"], found[f"kl_{when}"]
        assert kl > 0.01 and added == pytest.approx(kl, rel=0.2), when
    # one with thresholds, which has fewer latents when its text is short, gains in MSE alone
    in_mse = case.get("LOSS") == "mse" or "ARCHITECTURE" in case
    lower = "fvu" if in_mse else "kl"
    assert found[f"{lower}_after"] < found[f"{lower}_before"]
