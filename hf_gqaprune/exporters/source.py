"""Open the checkpoint that is exported, and record what was written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import ModelFolder, resolve_model
from ..errors import UsageError
from ..models import ModelShape, empty_model, expected_tensors
from ..streaming import Layers


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        path: the new file or folder.
        added_parameters: parameters beyond those of the checkpoint, which change no output.
        notes: one line for each decision that a user should know of.
    """

    path: Path
    added_parameters: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A Llama or pruned Llama checkpoint on disk, checked against its config; no weight is read.

    Attributes:
        shape: sizes of every layer.
        tensors: names and shapes of all stored weights, on the meta device.
    """

    folder: ModelFolder
    shape: ModelShape
    tensors: Mapping[str, torch.Tensor]

    @staticmethod
    def open(model: str | os.PathLike[str]) -> Source:
        """Check the checkpoint in a folder or of a Hub id.

        Raises:
            UsageError: no whole safetensors checkpoint, another architecture than Llama, or an activation other than SiLU.
        """
        folder = resolve_model(model)
        config: Any = folder.config
        shape = ModelShape.from_config(config)
        if config.hidden_act != "silu":
            raise UsageError(
                f"{folder}: only hidden_act='silu' can be exported, not {config.hidden_act!r}: serve it by transformers"
            )
        # compares every stored tensor with the config
        Layers(folder)
        return Source(folder, shape, expected_tensors(empty_model(config)))
