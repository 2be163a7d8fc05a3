"""Brings an SAE that SAELens can load into a folder that SAE= reads: `make saelens RELEASE= ID=`.

python -m klsplice.formats.from_saelens RELEASE ID [FOLDER]   with requirements/formats.txt

RELEASE and ID as SAELens lists them, or a repository and a folder in it. FOLDER: saes/RELEASE/ID.
"""

import os
import sys

from klsplice.errors import UserError
from klsplice.formats import read


def main(argv: list[str]) -> int:
    if len(argv) not in (2, 3) or not all(argv):
        print(__doc__, file=sys.stderr)
        return 2
    from sae_lens import SAE

    folder = os.path.join("saes", *argv[:2]) if len(argv) == 2 else argv[2]
    SAE.from_pretrained(*argv[:2]).save_model(folder)  # what it refuses it says itself
    try:
        source = read.open_sae(folder, "")
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    at = f" of layer {source.site.layer}" if source.site.layer is not None else ""
    print(f"a {source.architecture} SAE of {source.d_sae:,} latents{at}, {source.lm_name}")
    print(f"SAE={folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
