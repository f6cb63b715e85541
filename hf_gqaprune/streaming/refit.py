"""Refit the pruned layers of a checkpoint on disk in closed form, one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..compensation import ChosenRidge, ResidualStreams
from ..data import refit_batches
from ..dependency_graph import UnitSlices
from ..models import materialized
from ..plan import LayerPlan
from ..statistics import Moments, Statistics
from ..surgery import prune_layer
from ..utils import Prefetcher, write_json
from .activations import ActivationStore, StoredSequence
from .layers import Layers


def streams_disk_bytes(tokens: int, hidden: int, dtype: torch.dtype, held: int = 0) -> int:
    """Return the peak size on disk of both models' streams: before a layer, within it and after it.

    `held` bytes of them stay in memory.
    """
    return max(0, 6 * tokens * hidden * dtype.itemsize - held)


class Refit:
    """Compute `least_squares` of `prune` layer by layer, bit for bit, with the residual streams of both models in a store.

    A context manager, which closes what was opened.
    """

    def __init__(self, layers: Layers, pruned: Any, statistics: Statistics, working: Path, spare: int = 0) -> None:
        """Prepare; nothing is read.

        Args:
            layers: the dense checkpoint.
            pruned: the pruned model without weights.
            statistics: moments, and windows to walk along; without windows each block is refitted by itself.
            working: a folder for the streams, which `begin` may find there.
            spare: bytes of a GPU's memory for them.
        """
        self.layers, self.pruned, self.statistics = layers, pruned, statistics
        self.store = ActivationStore(working / "streams", layers.device, spare)
        self.streams: ResidualStreams | None = None
        self._moments = Prefetcher(layers.device, self._read, _tensors)

    def __enter__(self) -> Refit:
        return self

    def __exit__(self, *error: Any) -> None:
        self._moments.close()
        self.store.close()

    @property
    def ridges(self) -> list[ChosenRidge]:
        """The ridges chosen so far, also by an interrupted call that finished every layer."""
        if self.streams is not None:
            return self.streams.ridges
        last = len(self.statistics.source.layers)
        return [ChosenRidge(*ridge) for ridge in self._state(last)["ridges"]] if self._note(last).exists() else []

    def begin(self, first: int) -> int:
        """Stand before the layer `first`, or before an earlier one where its streams are not there: which one it is."""
        calibration = self.statistics.calibration
        if calibration is None:
            return first
        self.store.folder.mkdir(parents=True, exist_ok=True)
        ids, held_out = refit_batches(
            calibration.fitted, calibration.held_out, self.layers.config.vocab_size, self.layers.device
        )
        found = next((index for index in range(first, -1, -1) if self._whole(index)), 0)
        for path in self.store.folder.glob("before-*.json"):
            # of streams that are gone, or will be made anew
            if path != self._note(found):
                path.unlink()
        if self._whole(found):
            state = self._state(found)
            dense, pruned = (StoredSequence(self.store, state[name]) for name in ("dense", "pruned"))
            differs = state["differs"]
        else:
            differs = False
            dense = pruned = self.store.keep(self.layers.embedded(ids))
        inputs = self.layers.decoder_inputs(calibration.ids.shape[1])
        self.streams = ResidualStreams(dense, pruned, held_out, inputs, self.pruned.config, self.store.keep, differs)
        if differs:
            self.streams.ridges = [ChosenRidge(*ridge) for ridge in state["ridges"]]
        return found

    def layer(self, index: int, kept: LayerPlan, slices: UnitSlices) -> dict[str, torch.Tensor]:
        """Return the weights of a pruned layer on the device, by their names in it; layers are asked for in order."""
        with self.layers.layer(index, index + 1) as dense:
            weights = dict(dense.state_dict())
            self.statistics.check_weights(index, weights)
            following = index + 1 if index + 1 < len(self.statistics.source.layers) else None
            new = prune_layer(weights, kept, slices, self._moments.take(index, following))
            if self.streams is None:
                return new
            layer = self.pruned.get_decoder().layers[index]
            with materialized(layer, new):
                for kind in ("attention", "mlp"):
                    self.streams.refit_block(index, kind, dense, layer)
                new = dict(layer.state_dict())
            streams = {"dense": self.streams.dense, "pruned": self.streams.pruned}
            names = {key: stream.name for key, stream in streams.items() if isinstance(stream, StoredSequence)}
            write_json(self._note(index + 1), {**names, "differs": self.streams.differs, "ridges": self.streams.ridges})
        return new

    def _read(self, index: int) -> dict[str, Moments]:
        return self.statistics.read(index, self.layers.device)

    def finished(self, index: int) -> None:
        """Drop what precedes a layer whose weights are on disk."""
        if self.streams is not None:
            state = self._state(index + 1)
            self._note(index).unlink(missing_ok=True)
            self.store.drop_all_but((state["dense"], state["pruned"]))

    def _state(self, index: int) -> dict[str, Any]:
        """Read the names of the streams before a layer, and whether they differ."""
        state: dict[str, Any] = json.loads(self._note(index).read_text(encoding="utf-8"))
        return state

    def _whole(self, index: int) -> bool:
        """Tell whether the streams before a layer are complete."""
        if not self._note(index).exists():
            return False
        state = self._state(index)
        return all(self.store.has(state[name]) for name in ("dense", "pruned"))

    def _note(self, index: int) -> Path:
        """Return the file that names the streams before a layer."""
        return self.store.folder / f"before-{index}.json"


def _tensors(layer: dict[str, Moments]) -> Iterator[torch.Tensor]:
    for moments in layer.values():
        yield from moments.tensors()
