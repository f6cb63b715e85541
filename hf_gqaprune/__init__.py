"""Structured pruning of Llama-family checkpoints by whole KV groups and FFN channels.

Importing the package imports neither torch nor transformers, and yet the Auto classes of transformers know the pruned Llama,
whichever of both is imported first.
"""

from pathlib import Path

import lazy_loader

from .models import register
from .version import __version__ as __version__

if (_root := Path(__file__).parents[1]).joinpath("pyproject.toml").is_file():
    # a source tree, which Python prefers where it is started in one, keeps trainer/ and others beside this package
    __path__.append(str(_root))

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register()
