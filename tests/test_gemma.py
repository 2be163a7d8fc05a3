"""A real Gemma (3, 270M), its windows shorter than the contexts: run by `make test-gemma`."""

from pathlib import Path

import pytest
import seams
import torch
from conftest import resume
from transformers import AutoModelForCausalLM

import data
from klsplice import settings
from klsplice.lm import load
from klsplice.lm.check import check, contexts
from klsplice.lm.head import score_head
from klsplice.lm.splice import Splice, next_tokens

GEMMA = str(seams.ROOT / "assets/gemma3-270m")
pytestmark = pytest.mark.skipif(not Path(GEMMA).exists(), reason="make gemma")
BOS, EOS = 2, 1


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """-> the constants, the LM's files and the tokens."""
    words = [f"MODEL={GEMMA}", f"DATASET={seams.ROOT}/assets/topics.jsonl", "DTYPE=float32"]
    words += ["CONTEXT=600", "VAL_TOKENS=1200", "TOKENS=1200"]
    words += [f"CACHE={tmp_path_factory.mktemp('cache')}"]
    cfg = settings.read([str(seams.ROOT / "recipes/gemma3.py"), *words])[0]
    opened = load.open_lm(GEMMA, "", device=cfg.DEVICE, layer=cfg.LAYER, context=cfg.CONTEXT)
    return cfg, opened, data.prepare(cfg, opened.tokenizer, opened.config)


def test_the_sae_stands_in_but_at_bos_and_eos(opened):
    _, _, tokens = opened
    tokens_BL = tokens.val(0, 2)
    assert tokens.bos and (tokens_BL[:, 0] == BOS).all() and (tokens_BL == EOS).any()
    kept_N = ~torch.isin(torch.arange(1200), tokens.active(tokens_BL, None))
    assert torch.equal(kept_N, torch.isin(tokens_BL, torch.tensor([BOS, EOS])).flatten())


@torch.no_grad()
def test_ce_and_kl_equal_an_eager_pass_with_a_hook(opened):
    """Of the last positions of each context: the windows leave its first 88 tokens out there."""
    cfg, opened, tokens = opened
    tokens_BL, last = tokens.val(0, 2), slice(500, 600)

    def change(x_BLD):
        """Everywhere but at BOS, as an SAE would: half of what sets a token apart is gone."""
        mean_BLD = x_BLD[:, 1:].mean((0, 1), keepdim=True)
        return torch.cat([x_BLD[:, :1], 0.5 * (x_BLD[:, 1:] + mean_BLD)], 1)

    eager = AutoModelForCausalLM.from_pretrained(
        GEMMA, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    options = {"use_cache": False, "logits_to_keep": 100}
    logp = lambda: eager(tokens_BL, **options).logits.log_softmax(-1)  # noqa: E731
    clean_BLV = logp()
    hook = lambda block, args, output: change(output)  # noqa: E731  block 9 returns a Tensor
    eager.model.layers[cfg.LAYER].register_forward_hook(hook)
    spliced_BLV, target_BL1 = logp(), next_tokens(tokens_BL)[:, last, None]
    wanted = [(clean_BLV.exp() * (clean_BLV - spliced_BLV)).sum(-1)]
    wanted += [-each.gather(-1, target_BL1)[..., 0] for each in (clean_BLV, spliced_BLV)]

    lm = load.load_lm(opened, dtype=cfg.DTYPE, device=cfg.DEVICE)
    splice = Splice(lm, cfg.LAYER, head_chunk=cfg.HEAD_CHUNK)
    assert not check(splice, contexts(tokens, 1))["whole"]
    clean = splice.clean(tokens_BL)
    spliced = resume(splice, tokens_BL, change(clean.x_BLD))
    both = (each.h_BLD[:, last].flatten(0, 1) for each in (clean, spliced))
    kl_N, ce_clean_N, ce_N = score_head(*both, target_BL1.flatten(), splice.head)
    assert 2.0 < ce_clean_N.mean() < 3.0 and kl_N.mean() > 0.1
    for score_N, wanted_BL in zip((kl_N, ce_clean_N, ce_N), wanted):
        assert torch.allclose(score_N.float(), wanted_BL.flatten(), rtol=1e-3, atol=1e-3)
