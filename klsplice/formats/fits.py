"""Whether an SAE belongs to this LM, this layer and this text."""

from klsplice.errors import UserError
from klsplice.formats.sites import RESIDUAL, same_model
from klsplice.formats.source import Source


def check_fits(source: Source, width: int, *, model: str, layer: int, strict: bool) -> None:
    """The SAE must read the residual after a block, of this model's width; and it must be of this
    model and layer (warned if not strict). Raises UserError."""
    if source.site.what not in (None, RESIDUAL):
        what = f"SAE = {source.where} reads {source.site.what}, not {RESIDUAL}"
        raise UserError(what, "wanted an SAE of the residual stream, resid_post")
    if source.d_in is not None and source.d_in != width:
        what = f"the SAE reads width {source.d_in}, {model} has width {width}"
        raise UserError(what, "SAE and MODEL do not belong together")
    doubts = {}
    if source.site.layer not in (None, layer):
        what = f"LAYER = {layer}, the SAE is of layer {source.site.layer}"
        doubts[what] = f"LAYER={source.site.layer}"
    if source.lm_name and not same_model(source.lm_name, model):
        doubts[f"the SAE is of {source.lm_name}, MODEL = {model}"] = f"MODEL={source.lm_name}"
    for what, fix in doubts.items():
        if strict:
            raise UserError(what, f"set {fix}, or CHECK_SAE=False if you mean it")
        print(f"warning: {what}")
    if source.note:
        print(f"note: {source.note}")
    if source.site.what is None:
        where = f"the residual after block {layer}"
        print(f"warning: the SAE's files do not say where it reads; it is given {where} (LAYER)")


def check_text(source: Source, *, starts_with_bos: bool, keep: str, context: int) -> None:
    """Warn where an SAE was trained on other contexts than a run gives it.

    source.text: context, their length; bos, whether they start with BOS; without_special, whether
    it never saw BOS, EOS and pad; keep, the KEEP of its run. Only what its config says is compared.
    """
    text, doubts = source.text, {}
    bos, context_then, keep_then = text.get("bos"), text.get("context"), text.get("keep")
    if bos is not None and bos != starts_with_bos:
        if bos:
            doubts["on contexts that start with BOS, these start without it"] = "BOS=always"
        else:
            doubts["on contexts that start without BOS, these start with it"] = "BOS=never"
    if text.get("without_special") is True and keep == "none":
        doubts["without special tokens, KEEP = none gives them to it"] = "KEEP=special"
    if text.get("without_special") is False and keep == "special":
        doubts["on special tokens too, KEEP = special keeps them from it"] = "KEEP=none"
    if keep_then not in (None, keep):
        doubts[f"with KEEP = {keep_then}, here KEEP = {keep}"] = f"KEEP={keep_then}"
    if context_then not in (None, context):
        doubts[f"on contexts of {context_then} tokens, CONTEXT = {context}"] = (
            f"CONTEXT={context_then}"
        )
    for what, fix in doubts.items():
        print(f"warning: the SAE was trained {what}; to match that, set {fix}")
