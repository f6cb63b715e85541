"""Collect the statistics of a checkpoint on disk, with one decoder layer in memory at a time.

The windows go forward through the layers, each layer's inputs are kept on disk, and the loss gradient comes back
through the layers in turn, each run again from its inputs: per layer the operations of the pass over the whole model.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ..checkpoint import ModelFolder, resolve_model
from ..data import Calibration, layer_batches
from ..dependency_graph import trace_units
from ..errors import UsageError, WorkError, unknown
from ..models import KINDS, ModelShape, check_weights, loss_gradient
from ..statistics import (
    CRITERIA,
    BlockStatistics,
    Criterion,
    MomentHooks,
    Statistics,
    block_file,
    check_tokens,
    packed_block,
    weight_digest,
    write_block,
)
from ..utils import (
    CPU,
    PROGRESS,
    BackgroundWorker,
    assembly_folder,
    check_disk_space,
    refuse_existing,
    refuse_overwriting_inputs,
    remove_working_folder,
    replace_folder,
    resumable,
    resume_or_start,
    sha256,
    track,
    working_folder,
    write_json,
)
from .activations import ActivationStore, memory_capacity
from .layers import Layers
from .memory_bound import moments_disk_bytes

#: blocks and sequences that wait to be written or removed
_AHEAD = 5


def stream_statistics(
    model: str | os.PathLike[str] | ModelFolder,
    calibration: Calibration | None,
    output: str | os.PathLike[str],
    *,
    criterion: str = "curvature",
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = False,
    device: torch.device = CPU,
    dtype: torch.dtype | None = None,
    spare: int = 0,
) -> Statistics:
    """Compute `collect_statistics(model, calibration, criterion=criterion)` without loading the model, bit for bit on a CPU.

    At its most, memory holds one decoder layer, what it keeps of one batch for the backward pass, and the moments of its
    blocks; the embeddings or the head once. Inputs and gradients of one layer after the other are on disk, `tokens x
    hidden` values each: all layers' inputs at the turn of the two passes. They lie in a hidden folder beside `output`; what
    a GPU gives lies there only where the host's memory has no room for it, and a GPU takes more windows at once.

    Args:
        model: folder or Hub id of a Llama or pruned Llama checkpoint in safetensors; its files are only read.
        calibration: the windows; None for criteria that need none, and then no moments are kept.
        output: the new statistics folder.
        criterion: a key of `statistics.CRITERIA`.
        seed: for the criterion `random`.
        overwrite: replace `output`, and without `resume` drop what an interrupted call left.
        resume: go on after the last layer that an interrupted call with the same arguments finished, or from the first where
            its activations were in memory.
        device: where each layer is while it is measured; two devices round differently.
        dtype: to compute in; None as the weights are stored.
        spare: bytes of a GPU's memory that activations may take beside the rest.

    Returns:
        The statistics in `output`, whose moments are read when they are asked for.

    Raises:
        UsageError: as `prune_checkpoint`, for an unknown criterion, and for one that needs calibration without any.
        WorkError: a weight, activation or gradient that is not finite, named, or reading or writing failed; what was
            finished is kept for `resume`.
    """
    if criterion not in CRITERIA:
        raise unknown("criterion", criterion, CRITERIA)
    target = refuse_existing(output, overwrite)
    folder = resolve_model(model)
    refuse_overwriting_inputs(target, [folder])
    config = folder.config
    source = ModelShape.from_config(config)
    if calibration is None and CRITERIA[criterion].calibrated:
        raise UsageError(f"criterion {criterion} needs calibration windows")
    if calibration is not None and calibration.ids.shape[1] > config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise UsageError(f"windows of {calibration.ids.shape[1]} tokens are longer than the {limit} positions of {folder}")
    layers = Layers(folder, device, dtype)
    if calibration is not None:
        check_tokens(calibration, source)
    working = working_folder(target)
    made = statistics_inputs(folder, calibration, criterion, seed, device, dtype)
    needed = statistics_disk_bytes(source, layers.dtype, calibration, CRITERIA[criterion], memory_capacity(device, spare))
    with resume_or_start(working, resume, overwrite, made) as noted, resumable(working):
        check_disk_space(working, needed, "the statistics and activations")
        write_json(working / PROGRESS, noted)
        whole = assembly_folder(working)
        with layers:
            _Pass(layers, source, calibration, criterion, seed, working, spare).run()
        blocks = {
            (index, kind): BlockStatistics.open(working, index, kind)
            for index, shape in enumerate(source.layers)
            for kind in KINDS
            if kind not in shape.skip
        }
        Statistics(source, criterion, blocks, calibration, seed).save_head(whole)
        for layer, kind in blocks:
            path = block_file(working, layer, kind)
            os.rename(path, whole / path.name)
        # another may have come by now
        refuse_existing(target, overwrite)
        replace_folder(whole, target)
        remove_working_folder(working)
    return Statistics.load(target)


def statistics_disk_bytes(
    source: ModelShape, dtype: torch.dtype, calibration: Calibration | None, rule: Criterion, held: int = 0
) -> int:
    """Return the peak size on disk: of activations between the two passes, or of moments at the end.

    `held` bytes of activations stay in memory.
    """
    if calibration is None:
        return 0
    stream = calibration.tokens * source.hidden_size * dtype.itemsize
    backward = rule.output_gradients or rule.weight_gradients
    moments = moments_disk_bytes(source, rule)
    # going back, every layer's moments take the place of its activations
    most = max(0, stream * (len(source.layers) + 2) - held) + max(moments) if backward else 0
    return max(most, sum(moments) + max(0, (3 if backward else 2) * stream - held))


def statistics_inputs(
    folder: ModelFolder,
    calibration: Calibration | None,
    criterion: str,
    seed: int,
    device: torch.device,
    dtype: torch.dtype | None,
) -> dict[str, str]:
    """List what the statistics of a model depend on, for `resume_or_start` to compare."""
    return {
        "model": folder.stat_hash,
        "calibration": sha256(calibration and calibration.ids.tolist()),
        "criterion": f"{criterion} {seed}",
        "device": f"{device.type} {dtype or folder.dtype}",
    }


class _Pass:
    """Forward through the layers, and back where the criterion looks at gradients."""

    def __init__(
        self,
        layers: Layers,
        source: ModelShape,
        calibration: Calibration | None,
        criterion: str,
        seed: int,
        working: Path,
        spare: int,
    ) -> None:
        self.layers, self.source, self.working, self.seed = layers, source, working, seed
        self.rule = CRITERIA[criterion]
        self.backward = self.rule.output_gradients or self.rule.weight_gradients
        self.ids = None if calibration is None else calibration.ids
        self.slices = trace_units(source.layers)
        self.store = ActivationStore(working, layers.device, spare)
        # what a GPU has measured is written while it goes on
        self.writer = None if layers.device == CPU else BackgroundWorker(layers.device, _AHEAD)

    def run(self) -> None:
        try:
            self._run()
            if self.writer is not None:
                self.writer.wait()
        finally:
            if self.writer is not None:
                self.writer.close()
            self.store.close()

    def _run(self) -> None:
        count = len(self.source.layers)
        if self.ids is None:
            for index in track(range(count), "weights", "layer"):
                self._weigh(index)
            return
        store = self.store
        self.batches = layer_batches(self.ids, self.layers.config.vocab_size, self.layers.device)
        self.decoder_inputs = self.layers.decoder_inputs(self.ids.shape[1])
        # a layer's activations may be there before its statistics are
        measured = [self._measured(index) for index in range(count)]
        there = [store.has(f"input-{i}") for i in range(count + 1)]
        # the way back needs the inputs of all layers that are left, some of which may have been in memory
        back = next((i for i in range(count + 1) if store.has(f"gradient-{i}") and all(measured[i:] + there[:i])), None)
        if back is None:
            done = [i for i in range(count + 1) if there[i] and all(there[:i] if self.backward else measured[:i])]
            if not done:
                store.write("input-0", self.layers.embedded(self.batches))
                store.commit("input-0")
            for index in track(range(max(done, default=0), count), "forward", "layer"):
                self._forward(index)
            if not self.backward:
                return
            store.write(f"gradient-{count}", self._loss_gradients(count))
            store.commit(f"gradient-{count}")
            store.drop(f"input-{count}")
            back = count
        for index in track(range(back - 1, -1, -1), "backward", "layer"):
            self._back(index)

    def _kinds(self, index: int) -> list[str]:
        return [kind for kind in KINDS if kind not in self.source.layers[index].skip]

    def _measured(self, index: int) -> bool:
        """Tell whether the statistics of a layer exist."""
        return all(block_file(self.working, index, kind).exists() for kind in self._kinds(index))

    def _weigh(self, index: int) -> None:
        """Compute the curves of a layer from its weights alone, unless they exist."""
        if self._measured(index):
            return
        with self.layers.layer(index, index + 1) as layer:
            check_weights({index: layer})
            self._save([MomentHooks(index, kind, layer, self.slices[index]) for kind in self._kinds(index)])

    def _forward(self, index: int) -> None:
        """Compute the inputs of the next layer, and without a backward pass the statistics of this one."""
        store = self.store
        with self.layers.layer(index, index + 1) as layer, ExitStack() as stack:
            check_weights({index: layer})
            hooks = [] if self.backward else self._hooks(index, layer, stack)
            with torch.no_grad():
                store.write(f"input-{index + 1}", self._outputs(index, layer))
            self._save(hooks)
        store.commit(f"input-{index + 1}")
        if not self.backward:
            self._later(store.drop, f"input-{index}")

    def _outputs(self, index: int, layer: Any) -> Iterator[torch.Tensor]:
        finite = torch.ones((), dtype=torch.bool, device=self.layers.device)
        for hidden in self.store.read(f"input-{index}"):
            output = self.decoder_inputs.run(layer, hidden)
            finite &= torch.isfinite(output).all()
            yield output
        # looked at once, so that a GPU need not wait after each batch
        if not bool(finite):
            raise WorkError(f"layer {index}: what it puts out on calibration text is not finite: activations overflow")

    def _loss_gradients(self, count: int) -> Iterator[torch.Tensor]:
        """Yield the gradients of the summed next-token loss with respect to the last layer's outputs."""
        norm, head = self.layers.head()
        for ids, hidden in zip(self.batches, self.store.read(f"input-{count}"), strict=True):
            normed = norm(hidden.requires_grad_(True))
            normed.backward(loss_gradient(normed, functools.partial(F.linear, weight=head), ids, len(head)))
            yield _gradient(hidden)

    def _back(self, index: int) -> None:
        """Compute the statistics of a layer and the gradient with respect to its inputs."""
        store = self.store

        def gradients() -> Iterator[torch.Tensor]:
            outer = store.read(f"gradient-{index + 1}")
            for hidden, gradient in zip(store.read(f"input-{index}"), outer, strict=True):
                hidden.requires_grad_(True)
                self.decoder_inputs.run(layer, hidden).backward(gradient)
                yield _gradient(hidden)

        with self.layers.layer(index, index - 1) as layer, ExitStack() as stack:
            hooks = self._hooks(index, layer, stack)
            store.write(f"gradient-{index}", gradients())
            self._save(hooks)
        store.commit(f"gradient-{index}")
        for name in (f"gradient-{index + 1}", f"input-{index}"):
            self._later(store.drop, name)

    def _hooks(self, index: int, layer: Any, stack: ExitStack) -> list[MomentHooks]:
        hooks = [MomentHooks(index, kind, layer, self.slices[index]) for kind in self._kinds(index)]
        for hook in hooks:
            hook.attach(stack, True, self.rule.output_gradients, self.rule.weight_gradients)
        return hooks

    def _save(self, hooks: list[MomentHooks]) -> None:
        for hook in hooks:
            block = hook.statistics(self.rule, self.seed)
            hook.release()
            packed, known = packed_block(block), replace(block, stored=None)
            del block
            self._later(self._write, packed, known, hook.weight.detach())

    def _write(self, packed: dict[str, torch.Tensor], block: BlockStatistics, weight: torch.Tensor) -> None:
        write_block(packed, replace(block, weight=weight_digest(weight)), self.working)

    def _later(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do `work` after what was to be done before; on a GPU while it goes on with the next block."""
        if self.writer is None:
            work(*arguments)
        else:
            self.writer.later(work, *arguments)


def _gradient(hidden: torch.Tensor) -> torch.Tensor:
    if hidden.grad is None:
        raise WorkError("no gradient reaches the hidden states")
    return hidden.grad
