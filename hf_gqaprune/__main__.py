"""`python -m hf_gqaprune`, which is what `accelerate launch -m hf_gqaprune` starts in every process."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
