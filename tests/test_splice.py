"""The splice: a resumed pass equals a whole pass with an edited residual, for every family."""

import naive
import pytest
import torch
from conftest import ours, residual, resume

from klsplice.lm import attention
from klsplice.lm.splice import Splice, put, rows

CONTEXT, LAYER = 24, 1


def edited(lm, tokens_BL, edit):
    """Logits of a whole eager pass in which the block's output is edited by a hook."""
    return naive.run_lm(lm, tokens_BL, LAYER, edit)[0]


@pytest.fixture(params=["gemma2", "gpt_neox"])
def models(request):
    lm = naive.build_lm(request.param, seed=0, context=CONTEXT)
    tokens_BL = torch.randint(3, 97, (3, CONTEXT), generator=torch.Generator().manual_seed(0))
    return lm, Splice(ours(lm), LAYER, head_chunk=64), tokens_BL


def logits(splice, h_BLD):
    return splice.head.logits(h_BLD.flatten(0, 1), torch.float32).view(*h_BLD.shape[:2], -1)


def test_both_passes_equal_whole_eager_ones(models):
    """For any batch: of more, or of other, sequences than the pass before it."""
    lm, splice, tokens_BL = models
    edit = lambda x_BLD: x_BLD.roll(1, 1) * 0.5 + 0.1  # noqa: E731
    for part_BL in (tokens_BL[:1], tokens_BL, tokens_BL[1:]):
        clean = splice.clean(part_BL)
        wanted = lm(part_BL, use_cache=False).logits
        assert torch.allclose(logits(splice, clean.h_BLD), wanted, atol=5e-4)
        spliced = resume(splice, part_BL, edit(clean.x_BLD))
        wanted = edited(lm, part_BL, edit)
        assert torch.allclose(logits(splice, spliced.h_BLD), wanted, atol=5e-4)
        assert (wanted - lm(part_BL).logits).abs().max() > 0.1  # the edit matters
        whole = splice.edited(part_BL, {LAYER: edit})
        assert torch.equal(whole.h_BLD, spliced.h_BLD)


def test_lower_blocks_do_not_run_again(models):
    _, splice, tokens_BL = models
    clean = splice.clean(tokens_BL)
    assert torch.equal(residual(splice, tokens_BL), clean.x_BLD)
    ran = []
    for i, block in enumerate(splice.blocks):
        norm = next(m for m in block.modules() if "Norm" in type(m).__name__)
        norm.register_forward_hook(lambda *a, i=i: ran.append(i))
    resume(splice, tokens_BL, clean.x_BLD, clean)
    assert set(ran) == {2, 3}


def test_residuals_of_later_blocks_are_kept_in_both_passes(models):
    _, splice, tokens_BL = models
    splice.kept = (1, 2)
    clean = splice.clean(tokens_BL)
    same = resume(splice, tokens_BL, clean.x_BLD)
    other = resume(splice, tokens_BL, 2 * clean.x_BLD)
    whole = splice.edited(tokens_BL, {LAYER: lambda x_BLD: 2 * x_BLD})
    for block in splice.kept:
        assert torch.equal(same.after[block], clean.after[block])
        assert not torch.equal(other.after[block], clean.after[block])
        assert torch.equal(other.after[block], whole.after[block])
    half = clean.part(slice(1, 2))
    assert torch.equal(half.after[1], clean.after[1][1:2])


def test_gradients_reach_the_edit_and_nothing_else(models):
    _, splice, tokens_BL = models
    y_BLD = residual(splice, tokens_BL).requires_grad_()
    (found,) = torch.autograd.grad(resume(splice, tokens_BL, y_BLD).h_BLD.square().sum(), y_BLD)
    whole = splice.edited(tokens_BL, {LAYER: lambda x_BLD: y_BLD}).h_BLD
    (wanted,) = torch.autograd.grad(whole.square().sum(), y_BLD)
    assert found.abs().sum() > 0 and torch.equal(found, wanted)
    assert all(p.grad is None for p in splice.decoder.parameters())


def test_hooks_and_skipped_blocks_come_off_even_after_an_error(models):
    _, splice, tokens_BL = models
    with pytest.raises(RuntimeError):
        splice.clean(torch.full((1, CONTEXT), 10_000).float())  # no embedding for floats
    with pytest.raises(RuntimeError):
        resume(splice, tokens_BL, torch.zeros(3, CONTEXT, 7))  # of another width
    residual(splice, tokens_BL)
    splice.edited(tokens_BL, {LAYER: lambda x_BLD: x_BLD})
    mine = splice.blocks[0].forward
    splice.blocks[0].forward = mine
    resume(splice, tokens_BL, residual(splice, tokens_BL))
    assert vars(splice.blocks[0]).pop("forward") is mine  # a forward of its own is put back
    for block in splice.blocks:
        assert not block._forward_hooks and not block._forward_pre_hooks
        assert "forward" not in vars(block)


def test_our_attention_refuses_what_it_does_not_know():
    q = torch.zeros(1, 2, 4, 8)
    known = {"scaling": 1.0, "softcap": 1.0, "position_ids": torch.arange(4)}
    attention.attention(None, q, q, q, None, **known, s_aux=None)
    for mask, more in ((torch.ones(1, 1, 4, 4), {}), (None, {"s_aux": torch.zeros(2)})):
        with pytest.raises(ValueError, match="not supported"):
            attention.attention(None, q, q, q, mask, **known, **more)


@pytest.mark.parametrize("window", [None, 3])
def test_our_attention_equals_its_definition(window):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    found, _ = attention.attention(
        None, q, k, v, None, scaling=0.7, softcap=2.0, sliding_window=window
    )
    for head in range(4):
        score = 0.7 * q[:, head].double() @ k[:, head // 2].double().transpose(1, 2)
        score = 2.0 * torch.tanh(score / 2.0)
        for i in range(7):
            first = max(0, i - window + 1) if window else 0
            p = score[:, i, first : i + 1].softmax(-1)
            wanted = (p[:, :, None] * v[:, head // 2, first : i + 1].double()).sum(1)
            assert torch.allclose(found[:, i, head].double(), wanted, atol=1e-6)


@pytest.mark.parametrize("window", [None, 5])
def test_flex_attention_equals_the_plain_maths(window, graphs):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 130, 16), torch.randn(2, 2, 130, 16), torch.randn(2, 2, 130, 16)
    attention.prepare_flex(130, [window], "cpu")
    options = {"scaling": 0.7, "softcap": 2.0, "sliding_window": window}
    compiled = torch.compile(attention.attention)
    with torch.no_grad():
        found, _ = compiled(None, q, k, v, None, **options)
    wanted, _ = attention.attention(None, q, k, v, None, **options)
    assert torch.allclose(found, wanted, atol=1e-5) and not torch.equal(found, wanted)


def test_put_replaces_the_active_rows_only_and_rows_reads_them():
    x_BLD, active_N = torch.zeros(2, 3, 4), torch.tensor([1, 5])
    y_BLD = put(x_BLD, torch.ones(2, 4), active_N)
    assert y_BLD.sum() == 8 and (rows(y_BLD, active_N) == 1).all() and x_BLD.sum() == 0
