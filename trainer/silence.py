"""Silence third-party progress bars and warnings."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silenced_libraries() -> Iterator[None]:
    """Hide progress bars if stderr is no terminal, and warnings about calls the user did not make; restore both."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    hidden = []
    if not sys.stderr.isatty():
        if logging.is_progress_bar_enabled():
            logging.disable_progress_bar()
            hidden.append(logging.enable_progress_bar)
        if not are_progress_bars_disabled():
            disable_progress_bars()
            hidden.append(enable_progress_bars)
    try:
        with warnings.catch_warnings():
            # peft calls transformers by a deprecated name
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            yield
    finally:
        for show in hidden:
            show()
