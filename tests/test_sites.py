"""Sites within a block: where they are in seven kinds of LM, and SAEs and transcoders at them."""

import pytest
import torch
from conftest import constants, make_tokens, open_learner, quietly
from test_families import FAMILIES, SIZES, lm_of
from transformers import AutoConfig, AutoModelForCausalLM

from klsplice import site
from klsplice.errors import UserError
from klsplice.formats import read
from klsplice.formats.source import Source
from klsplice.lm.points import taken
from klsplice.lm.splice import Splice
from klsplice.settings import contradictions

LAYER = 1
BEFORE_MLP = "pre_feedforward_layernorm"  # of Gemma
GEMMA = {
    "hook_resid_mid": (BEFORE_MLP, 1),
    "mlp.hook_in": ("mlp", 1),
    "hook_mlp_out": ("post_feedforward_layernorm", 0),
    "mlp.hook_out": ("mlp", 0),
    "hook_attn_out": ("post_attention_layernorm", 0),
    "attn.hook_z": ("self_attn.o_proj", 1),
}
LLAMA = GEMMA | {"hook_resid_mid": ("post_attention_layernorm", 1), "hook_mlp_out": ("mlp", 0)}
LLAMA |= {"hook_attn_out": ("self_attn", 0)}
GPT2 = {"hook_resid_mid": ("ln_2", 1), "mlp.hook_in": ("mlp", 1), "hook_mlp_out": ("mlp", 0)}
GPT2 |= {
    "mlp.hook_out": ("mlp", 0),
    "hook_attn_out": ("attn", 0),
    "attn.hook_z": ("attn.c_proj", 1),
}
PYTHIA = GPT2 | {"hook_attn_out": ("attention", 0), "attn.hook_z": ("attention.dense", 1)}
PYTHIA |= {"hook_resid_mid": ("post_attention_layernorm", 1)}
COHERE = LLAMA | {"hook_resid_mid": ("input_layernorm", 1)}  # parallel, one norm for both
PLACES = {"gemma2": GEMMA, "gemma3_text": GEMMA, "llama": LLAMA, "qwen3": LLAMA, "gpt2": GPT2}
PLACES |= {"gpt_neox": PYTHIA, "cohere": COHERE}
NORMS = {
    "gemma2": BEFORE_MLP,
    "gemma3_text": BEFORE_MLP,
    "gpt2": "ln_2",
    "cohere": "input_layernorm",
}
TRANSCODER = "mlp.hook_in:hook_mlp_out"
WRITES = ("hook_mlp_out", "mlp.hook_out", "hook_attn_out", "attn.hook_z")


def some_tokens():
    return torch.randint(3, 97, (3, 20), generator=torch.Generator().manual_seed(0))


def spliced_at(family, where, layer=LAYER, **options):
    sites = [site.at(where, layer)]
    return Splice(lm_of(family), layer, sites=sites, head_chunk=64, **options)


def run_with(splice, tokens_BL, module, is_input, edit):
    """The LM itself with a tensor edited by a hook -> logits, and the tensor before the edit."""
    seen = []

    def before(_, args, kwargs):
        seen.append(taken(args, kwargs))
        new = edit(seen[0])
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    def after(_, args, output):
        seen.append(output if torch.is_tensor(output) else output[0])
        new = edit(seen[0])
        return new if torch.is_tensor(output) else (new, *output[1:])

    if is_input:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    with handle:
        return splice.lm(tokens_BL, use_cache=False).logits, seen[0]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("point", WRITES)
@pytest.mark.parametrize("family", PLACES)
def test_what_stands_in_is_where_the_module_is(family, point, layer):
    """Read there to the last bit, and spliced as a hooked pass of the LM itself."""
    splice, tokens_BL = spliced_at(family, point, layer), some_tokens()
    clean = splice.clean(tokens_BL)
    name, is_input = PLACES[family][point]
    module = splice.blocks[layer].get_submodule(name)
    half = lambda t: 0.5 * t.roll(1, 0)  # noqa: E731
    wanted, there = run_with(splice, tokens_BL, module, is_input, half)
    assert torch.equal(clean.x_BLD, there)
    assert torch.equal(splice.clean(tokens_BL, to_end=False).x_BLD, there)
    every_N = torch.arange(tokens_BL.numel())
    h_BLD = splice.spliced(clean, every_N, half(there).flatten(0, 1)).h_BLD
    found = splice.head.logits(h_BLD.flatten(0, 1), torch.float32)
    assert (found - wanted.flatten(0, 1)).abs().max() < 5e-4
    assert (wanted - splice.lm(tokens_BL).logits).abs().max() > 0.05  # the edit matters
    same = splice.spliced(clean, every_N, there.flatten(0, 1)).h_BLD
    assert torch.equal(same, clean.h_BLD)


@pytest.mark.parametrize("family", PLACES)
def test_a_transcoder_reads_before_or_after_the_norm_and_its_gain(family):
    read_at = {}
    for point in ("hook_resid_mid", "mlp.hook_in", "ln2.hook_normalized"):
        splice = spliced_at(family, f"{point}:hook_mlp_out")
        ((x_BLD, o_BLD),) = splice.clean(some_tokens()).sites
        read_at[point] = x_BLD
    block = splice.blocks[LAYER]
    for point in ("hook_resid_mid", "mlp.hook_in"):
        name, is_input = PLACES[family][point]
        _, there = run_with(splice, some_tokens(), block.get_submodule(name), is_input, lambda t: t)
        assert torch.equal(read_at[point], there)
    norm = block.get_submodule(NORMS.get(family, "post_attention_layernorm"))
    raw = read_at["hook_resid_mid"]
    eps = next(v for n, v in vars(norm).items() if "eps" in n.lower())
    centred = raw - raw.mean(-1, keepdim=True) * (family in ("gpt2", "gpt_neox", "cohere"))
    bare = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    assert torch.allclose(read_at["ln2.hook_normalized"], bare, atol=1e-4)
    assert not torch.allclose(read_at["mlp.hook_in"], bare, atol=1e-2)


def test_only_active_positions_are_replaced_and_zero_is_the_ablation():
    splice = spliced_at("llama", "hook_mlp_out")
    clean, active_N = splice.clean(some_tokens()), torch.tensor([3, 7, 25])
    mask = torch.ones(60).index_fill(0, active_N, 0.0).view(3, 20, 1)
    block = splice.blocks[LAYER]
    wanted, _ = run_with(splice, some_tokens(), block.mlp, 0, lambda o_BLD: o_BLD * mask)
    h_BLD = splice.zero_ablated(clean, active_N).h_BLD
    found = splice.head.logits(h_BLD.flatten(0, 1), torch.float32)
    assert (found - wanted.flatten(0, 1)).abs().max() < 5e-4


def test_lower_blocks_do_not_run_and_the_block_of_the_site_does():
    splice, ran = spliced_at("llama", "hook_mlp_out", 2), []
    clean = splice.clean(some_tokens())
    handles = [
        block.input_layernorm.register_forward_hook(lambda *a, i=i: ran.append(i))
        for i, block in enumerate(splice.blocks)
    ]
    splice.spliced(clean, torch.arange(60), clean.sites[0][1].flatten(0, 1))
    for handle in handles:
        handle.remove()
    assert ran == [2, 3]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_reach_what_stands_in(checkpointed):
    splice = spliced_at("gemma2", "mlp.hook_in:hook_mlp_out", checkpointed=checkpointed)
    clean, every_N = splice.clean(some_tokens()), torch.arange(60)
    y_ND = clean.sites[0][1].flatten(0, 1).requires_grad_()
    found = splice.spliced(clean, every_N, y_ND).h_BLD
    (g_ND,) = torch.autograd.grad(found.square().sum(), y_ND)
    module = splice.blocks[LAYER].post_feedforward_layernorm
    y_BLD = y_ND.detach().view(3, 20, -1).requires_grad_()
    handle = module.register_forward_hook(lambda *a: y_BLD)
    with handle:
        wanted = splice.decoder(some_tokens(), use_cache=False).last_hidden_state
    (g_BLD,) = torch.autograd.grad(wanted.square().sum(), y_BLD)
    assert torch.allclose(g_ND, g_BLD.flatten(0, 1), atol=1e-4)


@pytest.mark.parametrize("family, point", [("granite", "hook_mlp_out"), ("mamba", "mlp.hook_in")])
def test_a_block_without_such_a_point_is_a_line(family, point):
    """Granite scales what it adds; a mamba block has no MLP."""
    lm = lm_of(family, **({"residual_multiplier": 0.5} if family == "granite" else {}))
    with pytest.raises(UserError, match="has no hook_mlp_out that can be found"):
        Splice(lm, LAYER, sites=[site.at(point, LAYER)], head_chunk=64)


# Bloom's and MPT's MLPs return the residual with their sum; XGLM's and theirs read (B, L, 4 D).
WITHIN = {"bloom": "mlp.dense_4h_to_h", "mpt": "ffn.down_proj", "xglm": "fc2"}


@pytest.mark.parametrize("family", WITHIN)
def test_a_module_that_returns_the_sum_is_not_what_is_added(family):
    splice = spliced_at(family, "hook_mlp_out")
    block, write = splice.blocks[LAYER], splice.points[0][1]
    assert write.module is block.get_submodule(WITHIN[family])
    with pytest.raises(UserError, match="no mlp[.]hook_in that can be found"):
        spliced_at(family, TRANSCODER)


def test_a_block_that_ends_in_a_norm_adds_no_mlp():
    with pytest.raises(UserError, match="no hook_mlp_out that can be found"):
        spliced_at("openai-gpt", "hook_mlp_out")


def test_what_a_block_changes_in_place_is_kept_as_it_was():
    """Falcon adds its attention to what its MLP returned, in that very tensor."""
    sizes = {n: v for n, v in SIZES.items() if n not in ("head_dim", "num_key_value_heads")}
    del sizes["intermediate_size"]
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **sizes))
    splice = Splice(
        lm.eval().requires_grad_(False), 2, sites=[site.at(TRANSCODER, 2)], head_chunk=64
    )
    ((x_BLD, o_BLD),) = splice.clean(some_tokens()).sites
    assert torch.allclose(splice.blocks[2].mlp(x_BLD), o_BLD, atol=1e-5)


def test_a_gain_with_zeros_cannot_be_undone():
    splice = spliced_at("llama", "hook_mlp_out")
    weight = splice.blocks[LAYER].post_attention_layernorm.weight
    before = weight[3].item()
    weight[3] = 0.0
    try:
        with pytest.raises(UserError, match="zeros"):
            spliced_at("llama", "ln2.hook_normalized:hook_mlp_out")
    finally:
        weight[3] = before


@pytest.mark.parametrize(
    "where, says",
    [
        ("hook_nothing", "wanted one of"),
        ("mlp.hook_in", "nothing can stand in"),
        ("hook_resid_post:hook_mlp_out", "within a block"),
        ("hook_mlp_out:hook_attn_out", "is made after"),
        ("hook_mlp_out", ""),
        ("mlp.hook_in:mlp.hook_out", ""),
    ],
)
def test_a_site_that_cannot_be_is_named(where, says):
    found = contradictions(constants(SITE=where, **FRESH), set())
    assert [line for line in found if says and says in line] if says else found == []


# ---- what learns there -----------------------------------------------------------------------

FRESH = {"SAE": "fresh", "D_SAE": 64, "K": 8, "CONTEXT": 20, "LAYER": LAYER, "TOKENS": 400}
FRESH |= {"VAL_TOKENS": 80, "MICRO_BATCH": 2, "CLEAN_BATCH": 2, "EVAL_BATCH": 2, "LR": 1e-3}


def source_at(where, architecture, family="llama", skip=False):
    """A random SAE or transcoder there."""
    width = 32
    rng = torch.Generator().manual_seed(3)
    normal = lambda *size: torch.randn(*size, generator=rng)  # noqa: E731
    weights = {"W_enc_FD": normal(64, width), "b_enc_F": normal(64), "W_dec_FD": normal(64, width)}
    weights |= {"b_dec_D": normal(width)}
    weights["W_dec_FD"] /= weights["W_dec_FD"].norm(dim=1, keepdim=True)
    if architecture == "jumprelu":
        weights["threshold"] = torch.rand(64, generator=rng)
    if architecture == "batchtopk":
        weights["threshold"] = torch.tensor(0.5)
    if skip:
        weights["W_skip_DD"] = 0.1 * normal(width, width)
    k = 8 if architecture.endswith("topk") else None
    made = Source("made", architecture, width, 64, k=k, l1=0.01, site=site.at(where, LAYER))
    made.weights = lambda: {name: t.clone() for name, t in weights.items()}
    return made, weights


LEARN = [
    ("hook_mlp_out", "topk", False),
    ("attn.hook_z", "jumprelu", False),
    (TRANSCODER, "topk", True),
    (TRANSCODER, "relu", False),
    (TRANSCODER, "batchtopk", False),
    ("ln2.hook_normalized:hook_mlp_out", "jumprelu", True),
]


def plain(w, where, architecture, x_ND):
    """y of the formula that such files mean, in float64."""
    w = {name: t.double() for name, t in w.items()}
    reads_x = ":" in where or architecture == "jumprelu"
    x = x_ND.double() - (0 if reads_x else w["b_dec_D"])
    pre = x @ w["W_enc_FD"].T + w["b_enc_F"]
    if architecture == "topk":
        rank = pre.argsort(1, descending=True).argsort(1)
        z = pre.relu() * (rank < 8)
    else:
        z = pre * (pre > w.get("threshold", torch.zeros(())))
    y = z @ w["W_dec_FD"] + w["b_dec_D"]
    return y + x_ND.double() @ w["W_skip_DD"].T if "W_skip_DD" in w else y


@pytest.mark.parametrize("where, architecture, skip", LEARN)
def test_it_is_read_trained_saved_and_read_again(where, architecture, skip, tmp_path):
    """By the formula before; the first step is that of plain autograd; and again after saving."""
    from klsplice.formats import write

    c = constants(**FRESH | {"SITE": where, "SAE": "made", "PASSES": 10, "LR": 3e-3})
    source, weights = source_at(where, architecture, skip=skip)
    tokens = make_tokens(c, vocabulary=97, sequences=20)
    learner = open_learner(c, source, lm_of("llama"), tokens)
    splice, sae = learner.splice, learner.sae
    tokens_BL = tokens.val(0, 2)
    ((x_ND, o_ND),) = splice.clean(tokens_BL).rows(torch.arange(40))
    assert (x_ND is o_ND) == (":" not in where)
    sae.eval()
    y_ND, _ = sae(x_ND)
    assert torch.allclose(y_ND.double(), plain(weights, where, architecture, x_ND), atol=1e-4)
    sae.begin({"mean_square_norm": float(o_ND.square().sum(1).mean()), "l0": 8.0})
    scalars = quietly(c, learner, tokens)
    assert scalars[-1]["mse"] < scalars[0]["mse"]
    moved = {name: t.detach().clone() for name, t in sae.named_parameters()}
    assert skip == ("W_skip_DD" in moved)
    with torch.no_grad():
        y_ND, _ = sae.eval()(x_ND)
    write.save(str(tmp_path), sae, source, c.constants(), bos=False)
    again = read.open_sae(str(tmp_path), "")
    assert again.site == site.at(where, LAYER)
    from sae import build

    found_ND, _ = build(again, again.read_weights()).eval()(x_ND)
    assert torch.allclose(found_ND, y_ND, atol=1e-3 * float(y_ND.abs().max()))


@pytest.mark.parametrize("where", ["hook_mlp_out", TRANSCODER])
def test_the_gradient_of_a_step_is_that_of_plain_autograd(where):
    """0.5 (MSE + alpha KL) through hooks of one's own, alpha held."""
    from conftest import gradients

    c = constants(**FRESH | {"SITE": where, "SAE": "made"})
    source, weights = source_at(where, "topk", skip=":" in where)
    tokens = make_tokens(c, vocabulary=97, sequences=20)
    learner = open_learner(c, source, lm_of("llama"), tokens)
    from finetune import batches_of

    batch = batches_of(c, learner, tokens)(0)
    scalars = gradients(c, learner, batch)
    found = {name: p.grad.clone() for name, p in learner.sae.named_parameters()}
    lm, sae = lm_of("llama"), learner.sae
    for p in sae.parameters():
        p.grad = None
    block, tokens_BL = lm.model.layers[LAYER], tokens.batch(0)
    seen = {}
    clean = lm(tokens_BL).logits.log_softmax(-1)

    def stand_in(module, args, output):
        x_BLD = output if where == "hook_mlp_out" else args[0]
        y_ND, _ = sae(x_BLD.flatten(0, 1))
        seen.update(y=y_ND, o=output)
        return y_ND.view_as(output)

    with block.mlp.register_forward_hook(stand_in):
        spliced = lm(tokens_BL).logits.log_softmax(-1)
    kl = (clean.exp() * (clean - spliced)).sum(-1).mean()
    mse = (seen["y"] - seen["o"].flatten(0, 1)).square().mean()
    (0.5 * (mse + (mse / kl).detach() * kl)).backward()
    assert float(scalars["kl"]) == pytest.approx(kl.item(), rel=1e-4)
    for name, p in sae.named_parameters():
        assert torch.allclose(found[name], p.grad, atol=1e-5 * float(p.grad.abs().max())), name


def test_a_fresh_transcoder_learns_what_the_mlp_does():
    c = constants(**FRESH | {"SITE": TRANSCODER, "LOSS": "mse", "SHUFFLE": 4, "PASSES": 60})
    tokens = make_tokens(c, vocabulary=97, sequences=20)
    source = Source("fresh", "topk", 32, 64, k=8, site=site.at(TRANSCODER, LAYER))
    learner = open_learner(c, source, lm_of("llama"), tokens)
    scalars = quietly(c, learner, tokens)
    assert scalars[-1]["mse"] < 0.7 * scalars[0]["mse"]


# ---- what files say --------------------------------------------------------------------------

SAYS = {
    "blocks.3.hook_resid_post": (3, "hook_resid_post"),
    "blocks.3.hook_resid_pre": (2, "hook_resid_post"),
    "blocks.3.ln2.hook_normalized": (3, "ln2.hook_normalized"),
    "blocks.3.hook_mlp_in": (3, "hook_resid_mid"),
    "model.layers.3.mlp": (3, "mlp.hook_out"),
    "model.layers.3.post_feedforward_layernorm.output": (3, "hook_mlp_out"),
    "model.layers.3.self_attn.o_proj.input": (3, "attn.hook_z"),
    "mlp_out_layer_3": (3, "hook_mlp_out"),
    "mlp.hook_in": (None, "mlp.hook_in"),
    "model.layers.3.self_attn": (3, "model.layers.3.self_attn"),
}


def test_every_family_of_names_is_a_point():
    from klsplice.formats.sites import of_name

    assert {name: of_name(name) for name in SAYS} == SAYS
    assert {*FAMILIES} >= {*PLACES}
