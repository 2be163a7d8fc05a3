"""Brings an SAE that SAELens can load into a folder that SAE= reads: `make saelens RELEASE= ID=`.

python -m klsplice.formats.from_saelens RELEASE ID [FOLDER]   with requirements/formats.txt

RELEASE and ID as SAELens lists them, or a repository and a folder in it. FOLDER: saes/RELEASE/ID.
"""

import os
import sys

from klsplice.errors import UserError, whole
from klsplice.formats import read


def bring(release: str, name: str, folder: str) -> None:
    """Raises UserError where SAELens cannot load it, or what it loads cannot be read here."""
    from sae_lens import SAE

    try:
        sae = SAE.from_pretrained(release, name)
    except Exception as e:  # of the library, the Hub, the network
        what = f"SAELens could not load {name!r} of {release!r}:{whole(e)}"
        raise UserError(what, "its page of pretrained SAEs lists releases and ids") from None
    sae.save_model(folder)
    source = read.open_sae(folder, "")
    at = f" of layer {source.site.layer}" if source.site.layer is not None else ""
    print(f"a {source.architecture} SAE of {source.d_sae:,} latents{at}, {source.lm_name}")
    print(f"SAE={folder}")


def main(argv: list[str]) -> int:
    if len(argv) not in (2, 3) or not all(argv):
        print(__doc__, file=sys.stderr)
        return 2
    release, name, *folder = argv
    try:
        bring(release, name, *(folder or [os.path.join("saes", release, name)]))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
