"""Layers of a checkpoint on disk go in, one after the other; their pruned weights, re-fitted in closed form, come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .files import write_json
from .layerwise import Layers, Spill, Spilled, batches_of, placed
from .plan import LayerPlan
from .reconstruction import Walk
from .statistics import Statistics
from .surgery import moments_of, prune_layer
from .torch_pruning import UnitSlices


class Refit:
    """`least_squares` of `prune`, layer by layer and bit for bit; the residual streams of both models lie on disk."""

    def __init__(self, layers: Layers, pruned: Any, statistics: Statistics, working: Path) -> None:
        """Prepare; nothing is read.

        Args:
            layers: the dense checkpoint.
            pruned: the pruned model without weights.
            statistics: moments, and windows to walk along; without windows each block is re-fitted by itself.
            working: a folder for the streams, which `begin` may find there.
        """
        self.layers, self.pruned, self.statistics = layers, pruned, statistics
        self.spill = Spill(working / "streams", layers.device)
        self.walk: Walk | None = None
        self.differs = False

    def begin(self, first: int) -> int:
        """Stand before the layer `first`, or before an earlier one where its streams are not there: which one it is."""
        calibration = self.statistics.calibration
        if calibration is None:
            return first
        self.spill.folder.mkdir(parents=True, exist_ok=True)
        ids, held_out = batches_of(calibration.fitted, calibration.held_out, self.layers.config.vocab_size)
        found = next((index for index in range(first, -1, -1) if self._note(index).exists()), 0)
        if self._note(found).exists():
            state = json.loads(self._note(found).read_text(encoding="utf-8"))
            dense, pruned = (Spilled(self.spill, state[name]) for name in ("dense", "pruned"))
            self.differs = state["differs"]
        else:
            dense = pruned = self.spill.keep(self.layers.embedded(ids))
        surroundings = self.layers.surroundings(calibration.ids.shape[1])
        self.walk = Walk(dense, pruned, held_out, surroundings, self.pruned.config, self.spill.keep)
        return found

    def layer(self, index: int, kept: LayerPlan, slices: UnitSlices) -> dict[str, torch.Tensor]:
        """The weights of a pruned layer on the device, by the names within it; layers come in order."""
        with self.layers.layer(index) as dense:
            new = prune_layer(dict(dense.state_dict()), kept, slices, moments_of(self.statistics, index))
            if self.walk is None:
                return new
            layer = self.pruned.get_decoder().layers[index]
            with placed(layer, new):
                for kind in ("attention", "mlp"):
                    self.differs = self.walk.block(index, kind, dense, layer, self.differs)
                new = dict(layer.state_dict())
            streams = {"dense": self.walk.dense, "pruned": self.walk.pruned}
            names = {key: stream.name for key, stream in streams.items() if isinstance(stream, Spilled)}
            write_json(self._note(index + 1), {**names, "differs": self.differs})
        return new

    def finished(self, index: int) -> None:
        """The layer's weights are safe: what came before it may go."""
        if self.walk is not None:
            state = json.loads(self._note(index + 1).read_text(encoding="utf-8"))
            self._note(index).unlink(missing_ok=True)
            self.spill.drop_all_but((state["dense"], state["pruned"]))

    def _note(self, index: int) -> Path:
        """Which streams there are before a layer."""
        return self.spill.folder / f"before-{index}.json"
