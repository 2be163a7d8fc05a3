"""Readers of the SAE files of single projects: sparsify, Llama Scope, Gemma Scope 1 and 2.

Each is called with where the SAE is, as the constant names it, and the paths of its files by name;
it returns a Source and raises UserError.
"""

from klsplice.errors import UserError
from klsplice.formats import sites, tensors
from klsplice.formats.architectures import MATRIX
from klsplice.formats.sites import Site
from klsplice.formats.source import Source, integer, name_or_none, read_config

SPARSIFY = {"W_enc_FD": "encoder.weight", "b_enc_F": "encoder.bias", "W_dec_FD": "W_dec"}
SPARSIFY |= {"b_dec_D": "b_dec"}
LLAMA_SCOPE = {"W_enc_FD": "encoder.weight", "b_enc_F": "encoder.bias"}
LLAMA_SCOPE |= {"W_dec_FD": "decoder.weight.T", "b_dec_D": "decoder.bias"}


def open_sparsify(where, has) -> Source:
    """EleutherAI's sparsify: a TopK whose encoder reads x - b_dec; a folder a layer."""
    path, file = has["cfg.json"], has["sae.safetensors"]
    config = read_config(path)
    for name, wanted in (("activation", "topk"), ("transcode", False), ("skip_connection", False)):
        if config.get(name, wanted) != wanted:
            what = f"{path}: {name} = {config[name]!r:.60} is not supported"
            raise UserError(what, f"wanted {wanted!r}")
    d_in = integer(config, "d_in", path)
    latents = "num_latents" if config.get("num_latents") else "expansion_factor"
    d_sae = integer(config, latents, path) * (1 if latents == "num_latents" else d_in)
    return Source(
        where=where,
        architecture="topk",
        d_in=d_in,
        d_sae=d_sae,
        k=integer(config, "k", path),
        site=sites.of_folder(where),
        weights=lambda: tensors.renamed(tensors.read_safetensors(file), SPARSIFY, (), file),
    )


def open_llama_scope(where, has) -> Source:
    """OpenMOSS's Llama Scope: a JumpReLU with one threshold, on activations that are scaled to a
    norm of sqrt(d_model) on average; the constants of that are folded into the weights."""
    path, file = has["hyperparams.json"], has["checkpoints/final.safetensors"]
    config = read_config(path)
    d_in, d_sae = integer(config, "d_model", path), integer(config, "d_sae", path)
    norms = config.get("dataset_average_activation_norm")
    threshold = config.get("jump_relu_threshold")
    plain = config.get("act_fn") == "jumprelu" and isinstance(norms, dict)
    numbers = (threshold, *(norms.get(n) for n in ("in", "out"))) if plain else (None,)
    if not all(isinstance(n, (int, float)) and n > 0 for n in numbers):
        what = f"{path} is not of a JumpReLU with its threshold and average norms"
        raise UserError(what, "wanted a residual SAE of Llama Scope")

    def weights() -> dict:
        found = tensors.renamed(tensors.read_safetensors(file), LLAMA_SCOPE, (), file)
        into, out = (d_in**0.5 / norms[n] for n in ("in", "out"))
        found["W_enc_FD"] *= into
        found["W_dec_FD"] /= out
        found["b_dec_D"] /= out
        return found | {"threshold": found["b_enc_F"].new_full((d_sae,), threshold)}

    site = sites.of_name(config.get("hook_point_in"))
    hook_out = config.get("hook_point_out", config.get("hook_point_in"))
    if hook_out != config.get("hook_point_in"):
        site = site._replace(what=f"{site.what}, and writes {str(hook_out)[:80]}")
    return Source(where, "jumprelu", d_in, d_sae, site=site, weights=weights)


def open_gemma_scope(where, has) -> Source:
    path = has["params.npz"]
    known = {"site": sites.of_folder(where), "lm_name": sites.model_of_folder(where)}
    return _jumprelu(where, path, tensors.read_npz(path), MATRIX, **known)


def open_gemma_scope_2(where, has) -> Source:
    path, file = has.get("config.json"), has["params.safetensors"]
    config = read_config(path) if path else {}  # some folders have none
    if config.get("architecture", "jump_relu") not in ("jump_relu", "jumprelu"):
        what = f"{path}: architecture = {config.get('architecture')!r:.60} is not supported"
        raise UserError(what, "wanted jump_relu")
    names = {"W_enc_FD": "w_enc.T", "b_enc_F": "b_enc", "W_dec_FD": "w_dec", "b_dec_D": "b_dec"}
    lm_name = name_or_none(config.get("model_name")) or sites.model_of_folder(where)
    known = {"site": _site_of_gemma_scope_2(config, where), "lm_name": lm_name}
    return _jumprelu(where, file, tensors.read_safetensors(file), names, **known)


def _jumprelu(where, file, found: dict, names: dict, **known) -> Source:
    """Of tensors that are read already, since no config says their sizes."""
    d_in, d_sae = tensors.encoder_shape(found, names["W_enc_FD"].removesuffix(".T"), file)
    weights = lambda: tensors.renamed(found, names, ("threshold",), file)  # noqa: E731
    return Source(where, "jumprelu", d_in, d_sae, weights=weights, **known)


def _site_of_gemma_scope_2(config: dict, where: str) -> Site:
    hook, out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    if isinstance(hook, list) or config.get("type", "sae") != "sae":
        kind = config.get("type") if isinstance(config.get("type"), str) else "crosscoder"
        return Site(None, f"several places (it is a {kind[:40]})")
    site = sites.of_name(hook)
    if out is not None and out != hook:
        site = site._replace(what=f"{str(hook)[:80]}, and writes {str(out)[:80]}")
    return site if site.what else sites.of_folder(where)
