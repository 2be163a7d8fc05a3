"""The splice: a resumed pass equals a whole pass with an edited residual, for every family."""

import naive
import pytest
import torch
from conftest import ours

import ops
from errors import UserError
from language_model import check_head
from splice import Splice, put, rows

CONTEXT, LAYER = 24, 1


def edited(lm, tokens_BL, edit):
    """Logits of a whole eager pass in which the block's output is edited by a hook."""
    return naive.run_lm(lm, tokens_BL, LAYER, edit)[0]


@pytest.fixture(params=list(naive.FAMILIES))
def models(request):
    lm = naive.build_lm(request.param, seed=0, context=CONTEXT)
    tokens_BL = torch.randint(3, 97, (3, CONTEXT), generator=torch.Generator().manual_seed(0))
    return lm, Splice(ours(lm), LAYER, head_chunk=64), tokens_BL


def logits(splice, h_BLD):
    return splice.head.logits(h_BLD.flatten(0, 1), torch.float32).view(*h_BLD.shape[:2], -1)


def test_the_clean_pass_gives_the_models_logits(models):
    lm, splice, tokens_BL = models
    found = logits(splice, splice.clean(tokens_BL).h_BLD)
    assert torch.allclose(found, lm(tokens_BL, use_cache=False).logits, atol=5e-4)


def test_resuming_from_an_edited_residual_equals_a_whole_edited_pass(models):
    lm, splice, tokens_BL = models
    edit = lambda x_BLD: x_BLD.roll(1, 1) * 0.5 + 0.1  # noqa: E731
    seen = splice.clean(tokens_BL)
    found = logits(splice, splice.resume(edit(seen.x_BLD), seen.calls))
    wanted = edited(lm, tokens_BL, edit)
    assert torch.allclose(found, wanted, atol=5e-4)
    assert (wanted - lm(tokens_BL).logits).abs().max() > 0.1  # the edit matters


def test_a_whole_pass_with_edits_equals_the_resumed_one(models):
    _, splice, tokens_BL = models
    seen = splice.clean(tokens_BL)
    found = splice.full(tokens_BL, {LAYER: lambda x_BLD: 0.5 * x_BLD})
    assert torch.allclose(found, splice.resume(0.5 * seen.x_BLD, seen.calls), atol=1e-6)


def test_what_one_batch_size_captured_fits_another(models):
    lm, splice, tokens_BL = models
    calls = splice.clean(tokens_BL[:1]).calls
    found = logits(splice, splice.resume(0.5 * splice.residual(tokens_BL), calls))
    assert torch.allclose(found, edited(lm, tokens_BL, lambda x: 0.5 * x), atol=5e-4)


def test_the_identity_leaves_the_logits_equal_bit_for_bit(models):
    _, splice, tokens_BL = models
    seen = splice.clean(tokens_BL)
    assert torch.equal(splice.resume(seen.x_BLD, seen.calls), seen.h_BLD)


def test_the_residual_alone_is_that_of_the_clean_pass(models):
    _, splice, tokens_BL = models
    assert torch.equal(splice.residual(tokens_BL), splice.clean(tokens_BL).x_BLD)


def test_gradients_reach_the_edit_and_nothing_else(models):
    _, splice, tokens_BL = models
    seen = splice.clean(tokens_BL)
    y_BLD = seen.x_BLD.clone().requires_grad_()
    splice.resume(y_BLD, seen.calls).square().sum().backward()
    assert y_BLD.grad.abs().sum() > 0
    assert all(p.grad is None for p in splice.decoder.parameters())


def test_hooks_come_off_even_after_an_error(models):
    _, splice, tokens_BL = models
    with pytest.raises(RuntimeError):
        splice.clean(torch.full((1, CONTEXT), 10_000).float())  # no embedding for floats
    splice.residual(tokens_BL)
    splice.full(tokens_BL, {LAYER: lambda x_BLD: x_BLD})
    for block in splice.blocks:
        assert not block._forward_hooks and not block._forward_pre_hooks


def test_no_cache_reaches_a_block(models, monkeypatch):
    """A resumed pass with a cache would be silently wrong, so a cache is an error."""
    _, splice, tokens_BL = models
    whole = type(splice.decoder).forward
    monkeypatch.setattr(
        type(splice.decoder),
        "forward",
        lambda self, tokens, use_cache: whole(self, tokens, use_cache=True),
    )
    with pytest.raises(RuntimeError, match="cache"):
        splice.clean(tokens_BL)


def test_our_attention_refuses_a_padding_mask():
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="padding"):
        ops.attention(None, q, q, q, torch.ones(1, 1, 4, 4), scaling=1.0)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3])
def test_our_attention_equals_its_definition(softcap, window):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    found, _ = ops.attention(
        None, q, k, v, None, scaling=0.7, softcap=softcap, sliding_window=window
    )
    for head in range(4):
        score = 0.7 * q[:, head].double() @ k[:, head // 2].double().transpose(1, 2)
        score = softcap * torch.tanh(score / softcap) if softcap else score
        for i in range(7):
            first = max(0, i - window + 1) if window else 0
            p = score[:, i, first : i + 1].softmax(-1)
            wanted = (p[:, :, None] * v[:, head // 2, first : i + 1].double()).sum(1)
            assert torch.allclose(found[:, i, head].double(), wanted, atol=1e-6)


@pytest.mark.parametrize("window", [None, 5])
def test_flex_attention_equals_the_plain_maths(window):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 130, 16), torch.randn(2, 2, 130, 16), torch.randn(2, 2, 130, 16)
    ops.prepare_flex(130, [window], "cpu")
    found = ops._flex(q, k, v, ops._BLOCK_MASKS[130, window], 0.7, 2.0)
    wanted, _ = ops.attention(None, q, k, v, None, scaling=0.7, softcap=2.0, sliding_window=window)
    assert torch.allclose(found.transpose(1, 2), wanted, atol=1e-5)
    other, _ = ops.attention(None, q, k, v, None, scaling=0.7, softcap=3.0)
    assert not torch.allclose(found.transpose(1, 2), other, atol=1e-3)


def test_put_replaces_the_active_rows_only_and_rows_reads_them():
    x_BLD, active_N = torch.zeros(2, 3, 4), torch.tensor([1, 5])
    y_BLD = put(x_BLD, torch.ones(2, 4), active_N)
    assert y_BLD.sum() == 8 and (rows(y_BLD, active_N) == 1).all() and x_BLD.sum() == 0


def test_a_head_that_we_would_compute_wrongly_is_refused(monkeypatch):
    lm = ours(naive.build_lm("gemma2", seed=0, context=CONTEXT))
    splice = Splice(lm, LAYER, head_chunk=64)
    check_head(lm, splice, torch.arange(3, 20)[None])
    splice.head.softcap = 0.5
    with pytest.raises(UserError, match="head"):
        check_head(lm, splice, torch.arange(3, 20)[None])


@pytest.mark.parametrize("family", list(naive.FAMILIES))
def test_it_knows_its_block_by_the_name_that_others_will_look_up(family):
    lm = naive.build_lm(family, seed=0, context=CONTEXT)
    splice = Splice(lm, LAYER, head_chunk=64)
    assert lm.get_submodule(splice.name) is splice.blocks[LAYER]
