"""ae.pt and config.json, as dictionary_learning and SAE Bench write them, now and before 2025."""

from klsplice.architectures import ARCHITECTURES, BOTH_BIASES
from klsplice.errors import UserError
from klsplice.formats import folds, sites
from klsplice.formats.source import Files, Source, integer, name_or_none, penalty, text_of

GATED = {"W_enc_FD": "encoder.weight", "W_dec_FD": "decoder.weight.T", "b_dec_D": "decoder_bias"}
GATED |= {"r_mag_F": "r_mag", "b_gate_F": "gate_bias", "b_mag_F": "mag_bias"}
OTHERS = {  # dict_class: our architecture, its tensors, what is folded
    "AutoEncoderNew": ("relu", BOTH_BIASES, (folds.centre,)),
    "GatedAutoEncoder": ("jumprelu", GATED, (folds.gated, folds.uncentre)),
}


def dictionary_learning(files: Files) -> Source:
    config, path = files.config, files.path
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise UserError(f"{path} has no trainer block", "wanted dictionary_learning's config.json")
    dict_class = str(trainer.get("dict_class"))
    known = {row.dict_class: (name, row.tensors, ()) for name, row in ARCHITECTURES.items()}
    known = OTHERS | known  # a class of our own comes first
    if dict_class not in known:
        what = f"{path}: dict_class = {dict_class!r:.60} is not supported"
        raise UserError(what, f"wanted one of {', '.join(known)}")
    architecture, names, folded = known[dict_class]
    row = ARCHITECTURES[architecture]
    return Source(
        where=files.where,
        architecture=architecture,
        d_in=integer(trainer, "activation_dim", path),
        d_sae=integer(trainer, "dict_size", path),
        k=integer(trainer, "k", path) if row.has_k else None,
        l1=penalty(trainer, path) if architecture == "relu" else None,
        site=_dictionary_learning_site(config, files.where),
        lm_name=name_or_none(trainer.get("lm_name")),
        text=_text(config),
        config=config,
        names=names,
        folds=folded,
    )


def _text(config: dict) -> dict:
    """What the SAE was trained on; of one that was trained here its KEEP, which counts alone."""
    text = text_of(config.get("buffer"), {"ctx_len": "context", "remove_bos": "without_special"})
    ours = config.get("klsplice")
    keep = name_or_none(ours.get("keep")) if isinstance(ours, dict) else None
    return text | ({"keep": keep, "without_special": None} if keep else {})


def _dictionary_learning_site(config: dict, where: str) -> sites.Site:
    trainer, buffer = config["trainer"], config.get("buffer")
    site = sites.of_name(trainer.get("submodule_name"))
    if site.what is None:  # older files have the layer alone
        site = sites.of_folder(where)
        layer = trainer.get("layer")
        site = site._replace(layer=layer if type(layer) is int else site.layer)
    if isinstance(buffer, dict) and buffer.get("io") == "in":
        site = site._replace(what=f"the input of {trainer.get('submodule_name') or 'a module'}")
    return site
