"""A real Gemma (3, 270M), its windows shorter than the contexts: run by `make test-gemma`."""

import json

import conftest  # noqa: F401  first: it puts the program on the path
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
from klsplice import settings
from klsplice.lm import load
from klsplice.lm.check import check, contexts
from klsplice.lm.head import score_head
from klsplice.lm.splice import Splice, next_tokens

ROOT = settings.PROGRAM
GEMMA = str(ROOT / "assets/gemma3-270m")
pytestmark = pytest.mark.skipif(not (ROOT / "assets/gemma3-270m").exists(), reason="make gemma")
BOS, EOS = 2, 1


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    words = [
        f"MODEL={GEMMA}",
        f"DATASET={ROOT}/assets/topics.jsonl",
        "CONTEXT=600",
        "DTYPE=float32",
    ]
    words += ["VAL_TOKENS=1200", "TOKENS=1200", f"CACHE={tmp_path_factory.mktemp('cache')}"]
    return settings.read([str(ROOT / "recipes/gemma3.py"), *words])[0]


@pytest.fixture(scope="module")
def opened(cfg):
    lm = {"device": cfg.DEVICE, "layer": cfg.LAYER, "context": cfg.CONTEXT}
    return load.open_lm(cfg.MODEL, "", **lm)


@pytest.fixture(scope="module")
def tokens(cfg, opened):
    return data.prepare(cfg, opened.tokenizer, opened.config)


def test_contexts_start_with_bos_and_the_sae_is_not_used_there_nor_at_document_ends(tokens):
    tokens_BL = tokens.val(0, 2)
    assert tokens.bos and tokens_BL.shape == (2, 600)
    assert (tokens_BL[:, 0] == BOS).all() and not (tokens_BL[:, 1:] == BOS).any()
    assert (tokens_BL == EOS).any()
    kept_N = ~torch.isin(torch.arange(1200), tokens.active(tokens_BL, None))
    assert torch.equal(kept_N, torch.isin(tokens_BL, torch.tensor([BOS, EOS])).flatten())
    first = json.loads((ROOT / "assets/topics.jsonl").open().readline())["text"]
    assert first.startswith(AutoTokenizer.from_pretrained(GEMMA).decode(tokens_BL[0, 1:100]))


@torch.no_grad()
def test_clean_and_spliced_ce_and_kl_equal_those_of_an_eager_pass_with_a_hook(cfg, opened, tokens):
    """Of the last positions of each context: the windows leave its first 88 tokens out there."""
    tokens_BL, last = tokens.val(0, 2), slice(500, 600)

    def change(x_BLD):
        """Everywhere but at BOS, as an SAE would: half of what sets a token apart is gone."""
        mean_BLD = x_BLD[:, 1:].mean((0, 1), keepdim=True)
        return torch.cat([x_BLD[:, :1], 0.5 * (x_BLD[:, 1:] + mean_BLD)], 1)

    eager = AutoModelForCausalLM.from_pretrained(
        GEMMA, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    logits = [eager(tokens_BL, use_cache=False, logits_to_keep=100).logits.log_softmax(-1)]
    hook = lambda block, args, output: change(output)  # noqa: E731  block 9 returns a Tensor
    eager.model.layers[cfg.LAYER].register_forward_hook(hook)
    logits.append(eager(tokens_BL, use_cache=False, logits_to_keep=100).logits.log_softmax(-1))
    target_BL1 = next_tokens(tokens_BL)[:, last, None]
    wanted = [(logits[0].exp() * (logits[0] - logits[1])).sum(-1)]
    wanted += [-log_BLV.gather(-1, target_BL1)[..., 0] for log_BLV in logits]
    del eager, logits

    lm = load.load_lm(opened, dtype=cfg.DTYPE, device=cfg.DEVICE)
    splice = Splice(lm, cfg.LAYER, head_chunk=cfg.HEAD_CHUNK)
    checked = check(splice, contexts(tokens, 1))
    assert checked["attention"] == "sdpa" and not checked["whole"]
    clean = splice.clean(tokens_BL)
    spliced = splice.spliced(tokens_BL, change(clean.x_BLD))
    h_clean_ND, h_ND = (each.h_BLD[:, last].flatten(0, 1) for each in (clean, spliced))
    found = score_head(h_clean_ND, h_ND, target_BL1.flatten(), splice.head)
    kl, ce_clean, ce = (score_N.mean().item() for score_N in found)
    assert 2.0 < ce_clean < 3.0 and ce > ce_clean + 0.1 and kl > 0.1
    for score_N, wanted_BL in zip(found, wanted):
        assert torch.allclose(score_N.float(), wanted_BL.flatten(), rtol=1e-3, atol=1e-3)
