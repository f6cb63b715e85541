"""Define the pruned Llama and the parts of a decoder that everything else works on."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
