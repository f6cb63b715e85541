"""Measure and prune a checkpoint layer by layer, within a bound on memory."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
