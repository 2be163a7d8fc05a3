"""The check of the LM against itself: what it finds, what it mends, and what it says."""

import copy

import conftest  # noqa: F401  first: it puts the program on the path
import pytest
import torch
import transformers
from test_families import SIZES, lm_of
from transformers import AutoConfig, AutoModelForCausalLM

from klsplice.errors import UserError
from klsplice.lm import check as checks
from klsplice.lm.check import check
from klsplice.lm.splice import Splice

LAYER, CONTEXT = 1, 24


def contexts():
    return torch.randint(3, 97, (23, CONTEXT), generator=torch.Generator().manual_seed(0))


def splice_of(family, **options):
    return Splice(lm_of(family), LAYER, head_chunk=64, **options)


@pytest.fixture
def with_attention():
    """Puts an LM's attention back after a test has chosen another."""
    changed = []

    def choose(splice, name):
        changed.append((splice.lm, splice.lm.config._attn_implementation))
        splice.lm.set_attn_implementation(name)
        return splice

    yield choose
    for lm, name in changed:
        lm.set_attn_implementation(name)


def test_a_sound_lm_is_not_touched_and_what_was_measured_is_kept():
    found = check(splice_of("llama"), contexts())
    assert found["tokens"] == 11 * CONTEXT and found["attention"] == "sdpa"
    assert not found["whole"]
    for name in ("clean", "spliced"):
        assert abs(found[name]["kl"]) < 1e-6 and abs(found[name]["ce"]) < 1e-6


@pytest.mark.parametrize("micro_batch", [4, 50])
def test_the_learning_pass_is_held_against_the_lm_too(micro_batch, with_attention):
    """Other code may run with gradients than without, compiled or in a kernel of its own."""

    def wrong_with_gradients(module, query, key, value, mask, scaling, **options):
        sdpa = transformers.AttentionInterface()["sdpa"]
        out, _ = sdpa(module, query, key, value, mask, scaling=scaling, **options)
        return out * (0.5 if torch.is_grad_enabled() else 1), None

    splice = splice_of("llama")
    found = check(splice, contexts(), micro_batch)
    assert abs(found["learning"]["kl"]) < 1e-6
    assert "learning" not in check(splice, contexts())
    transformers.AttentionInterface.register("wrong", wrong_with_gradients)
    with_attention(splice, "wrong")
    check(splice, contexts())
    with pytest.raises(UserError, match="Llama"):
        check(splice, contexts(), micro_batch)


def drops_sinks(module, query, key, value, mask, scaling, s_aux=None, **options):
    """As attention that does not know of sinks, or a mask."""
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_an_lm_gets_its_own_attention_where_another_is_wrong(family, with_attention):
    """Attention sinks, softcaps, and windows that only the mask knows."""
    transformers.AttentionInterface.register("drops", drops_sinks)
    splice = with_attention(splice_of(family), "drops")
    found = check(splice, contexts())
    assert found["attention"] == splice.lm.config._attn_implementation == "eager"
    assert abs(found["clean"]["kl"]) < 1e-6


def off_by(splice, size: float):
    """splice.clean with hidden states that give every next word `size` less in its logit."""
    clean, W_VD = splice.clean, splice.head.W_VD.float()

    def wrong(tokens_BL):
        found = clean(tokens_BL)
        if len(tokens_BL) > 1:  # a sequence alone is for the LM itself
            W_BLD = W_VD[checks.next_tokens(tokens_BL)]
            h_BLD = found.h_BLD - size * W_BLD / W_BLD.square().sum(-1, keepdim=True)
            found.h_BLD = h_BLD.to(found.h_BLD.dtype)
        return found

    return wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_of_two_hundredths_of_a_nat_is_found(dtype, monkeypatch):
    """In a pass that is otherwise the LM's own, of an LM of four blocks."""
    splice = Splice(copy.deepcopy(lm_of("llama")).to(dtype), LAYER, head_chunk=64)
    check(splice, contexts())
    monkeypatch.setattr(splice, "clean", off_by(splice, 0.024))
    with pytest.raises(UserError, match=r"\+0\.02\d* nats"):
        check(splice, contexts())


def test_an_lm_that_mixes_a_batchs_sequences_is_refused():
    """Its first sequence is right; the others are not."""
    lm = copy.deepcopy(lm_of("llama"))

    def mix(module, args, out):
        h_BLD = out.last_hidden_state
        out.last_hidden_state = h_BLD + 0.3 * (h_BLD[:1] - h_BLD)
        return out

    splice = Splice(lm, LAYER, head_chunk=64)
    splice.decoder.register_forward_hook(mix)
    with pytest.raises(UserError, match="Llama"):
        check(splice, contexts())


def test_an_unknown_head_and_an_lm_that_is_not_causal_are_refused(monkeypatch):
    splice = splice_of("gemma2")
    monkeypatch.setattr(splice.head, "softcap", 0.5)
    with pytest.raises(UserError, match="head"):
        check(splice, contexts())
    config = {"is_decoder": False, "pad_token_id": 0}
    torch.manual_seed(0)
    bert = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bert", **SIZES | config), dtype=torch.float32
    ).eval()
    with pytest.raises(UserError, match="Bert"):
        check(Splice(bert, LAYER, head_chunk=64), contexts())


def test_noise_of_16_bits_is_judged_by_the_lms_own():
    """A mixture of experts that routes otherwise when rounded otherwise is sound."""
    lm = copy.deepcopy(lm_of("granitemoe")).bfloat16()
    found = check(Splice(lm, LAYER, head_chunk=64), contexts())
    assert found["attention"] == "sdpa"
