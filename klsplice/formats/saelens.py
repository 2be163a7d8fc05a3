"""cfg.json and sae_weights.safetensors, as SAELens 3 to 6 write them."""

from functools import partial

from klsplice.architectures import MATRIX
from klsplice.errors import UserError
from klsplice.formats import folds, sites
from klsplice.formats.source import Files, Source, integer, name_or_none, text_of

GATED = {"r_mag_F": "r_mag", "b_gate_F": "b_gate", "b_mag_F": "b_mag", "b_dec_D": "b_dec"}
GATED |= {"W_enc_FD": "W_enc.T", "W_dec_FD": "W_dec"}
K_SPARSE = ("topk", "batchtopk", "matryoshka")
SAELENS = {  # its architecture: ours, and its tensors
    "topk": ("topk", MATRIX),
    "standard": ("relu", MATRIX),
    "jumprelu": ("jumprelu", MATRIX | {"threshold": "threshold"}),
    "gated": ("jumprelu", GATED),
    # as a run of SAELens leaves them; what it publishes is a jumprelu
    "batchtopk": ("batchtopk", MATRIX | {"threshold": "topk_threshold"}),
    "matryoshka_batchtopk": ("matryoshka", MATRIX | {"threshold": "topk_threshold"}),
}
SAELENS_TEXT = {"context_size": "context", "prepend_bos": "bos"}
SAELENS_TEXT |= {"exclude_special_tokens": "without_special"}  # a list of ids, too
NORMALISED = {  # what the SAE was trained on -> why its files do not say enough
    "expected_average_only_in": "by a constant that its files do not hold",
    "constant_norm_rescale": "to one norm, each token by its own factor",
    "layer_norm": "to mean 0 and variance 1, each token by its own",
}


def saelens(files: Files) -> Source:
    path = files.path
    config = _as_version_6(files.config, path)
    if str(config["architecture"]) not in SAELENS:
        kind = str(config["architecture"])
        sites.residual_only(files.where, kind if "transcoder" in kind else None)
        what = f"{path}: architecture = {kind!r:.60} is not supported"
        raise UserError(what, f"wanted one of {', '.join(SAELENS)}")
    architecture, names = SAELENS[config["architecture"]]
    if config.get("reshape_activations", "none") != "none":
        what = f"{path}: reshape_activations = {config['reshape_activations']!r:.60}"
        raise UserError(what, "wanted an SAE that reads the residual stream as it is")
    trained = architecture in ("batchtopk", "matryoshka")
    flags = {"apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": trained}
    centred, rescaled = (config.get(name, default) for name, default in flags.items())
    if not isinstance(centred, bool) or not isinstance(rescaled, bool):
        raise UserError(f"{path}: {' or '.join(flags)} is no truth value", "wanted true or false")
    folded = ()
    if config["architecture"] == "gated":
        folded += (folds.gated,)
    if architecture == "matryoshka":
        folded += (partial(folds.groups, ends=_group_ends(config, path)),)
    if rescaled and architecture in K_SPARSE:  # which k win is decided as with unit rows
        folded += (folds.unit_rows,)
    return Source(
        where=files.where,
        architecture=architecture,
        d_in=integer(config, "d_in", path),
        d_sae=integer(config, "d_sae", path),
        k=integer(config, "k", path) if architecture in K_SPARSE else None,
        site=sites.of_name(config["hook_name"]),
        lm_name=name_or_none(config.get("model_name")),
        text=text_of(config, SAELENS_TEXT),
        names=names,
        folds=folded + folds.centring(architecture, centred),
    )


def _as_version_6(config: dict, path: str) -> dict:
    """Versions 3 to 5 named the activation instead of the architecture, kept k among its arguments,
    and had what is in metadata now at the top. Raises UserError."""
    metadata = config.get("metadata")
    new = config | (metadata if isinstance(metadata, dict) else {})
    activation = new.get("activation_fn_str") or new.get("activation_fn") or "relu"
    options = new.get("activation_fn_kwargs")
    architecture = new.get("architecture") or "standard"
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    elif architecture == "standard" and activation != "relu":
        what = f"{path}: activation_fn = {activation!r:.60} is not supported"
        raise UserError(what, "wanted 'relu' or 'topk'")
    if architecture == "topk" and "k" not in new and isinstance(options, dict):
        new["k"] = options.get("k")
    if isinstance(new.get("k"), float) and new["k"].is_integer():  # a BatchTopK's is a mean
        new["k"] = int(new["k"])
    scale = new.get("normalize_activations") or "none"  # false or null before version 4
    if scale != "none":
        why = NORMALISED.get(str(scale), "in a way not known here")
        what = f"{path}: the SAE reads activations that are scaled {why}"
        raise UserError(what, f"normalize_activations is {str(scale)[:40]!r}; wanted 'none'")
    new["hook_name"] = new.get("hook_name") or new.get("hook_point")
    return new | {"architecture": architecture}


def _group_ends(config: dict, path: str) -> list[int]:
    ends, d_sae = config.get("matryoshka_widths"), config.get("d_sae")
    if not isinstance(ends, list) or not ends or not all(type(n) is int for n in ends):
        raise UserError(f"{path}: matryoshka_widths = {ends!r:.60}", "wanted whole numbers")
    return ends if ends[-1] == d_sae else [*ends, d_sae]
