"""``python -m train --tasks seg,parts,sal,normals,edge``; ``--help`` explains the rest."""

import sys

from train.cli import main

if __name__ == "__main__":
    sys.exit(main())
