"""Prune a checkpoint on disk as a plan says, with one decoder layer in memory at a time."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE as INDEX

from ..checkpoint import (
    FLOATS,
    Checkpoint,
    ModelFolder,
    ShardWriter,
    copy_carried_files,
    fingerprint,
    fingerprint_of_digests,
    read_identity,
    resolve_model,
    write_identity,
)
from ..compensation import ridge_record
from ..dependency_graph import UnitSlices, trace_units
from ..errors import UsageError
from ..models import PLAN_FILE, PrunedLlamaForCausalLM, check_finite, expected_tensors, layer_prefix
from ..plan import LayerPlan, PruningPlan
from ..statistics import Statistics
from ..surgery import check_compensation, pruned_config
from ..utils import (
    CPU,
    PROGRESS,
    assembly_folder,
    check_disk_space,
    refuse_existing,
    refuse_overwriting_inputs,
    remove_working_folder,
    replace_folder,
    resumable,
    resume_or_start,
    sha256,
    to_host,
    track,
    working_folder,
    write_json,
    write_text,
)
from .activations import memory_capacity
from .layers import Layers
from .refit import Refit, streams_disk_bytes


def prune_checkpoint(
    model: str | os.PathLike[str] | ModelFolder,
    plan: PruningPlan,
    output: str | os.PathLike[str],
    statistics: Statistics | None = None,
    *,
    compensation: str | None = None,
    max_shard_size: int | str = "50GB",
    overwrite: bool = False,
    resume: bool = False,
    device: torch.device = CPU,
    dtype: torch.dtype | None = None,
    spare: int = 0,
    known: Mapping[str, Any] | None = None,
) -> Path:
    """Prune a checkpoint without loading it: the files that `prune` and `save_pretrained` would write, byte for byte.

    Beside the weights go config, model files, plan, tokenizer, generation config, chat template, licence files and
    `gqaprune.json`. Weights pass in pieces of 4 MiB; a layer that is refitted is in memory, and with it the sums of
    one least-squares problem. The work is done in a hidden folder beside `output`, `.NAME.unfinished`, whose content takes
    the name `output` in one step when complete.

    Args:
        model: folder or Hub id of a Llama or pruned Llama checkpoint in safetensors; its files are only read.
        plan: which units stay.
        output: the new folder.
        statistics: of `model`, from `stream_statistics` or saved before; needed unless `compensation` is `none`.
        compensation: `none` or `least_squares`, as in `prune`; by default the latter if there are `statistics`. The steps
            of `natural_gradient` move all layers at once and need both models in memory.
        max_shard_size: of the written shards, as in `save_pretrained`: bytes, or a text such as `"5GB"`.
        overwrite: replace `output`, and without `resume` drop what an interrupted call left.
        resume: go on after the last layer that an interrupted call with the same arguments finished, or from the first where
            its activations were in memory; begin where there was none. What it wrote is hashed again, and written again
            where it differs.
        device: where weights are refitted; without compensation nothing is computed.
        dtype: to compute in; None as the weights are stored, which the result is in any case.
        spare: as in `stream_statistics`.
        known: for `gqaprune.json`, over what that of `model` says.

    Returns:
        `output`.

    Raises:
        UsageError: before anything is written, for a plan of another model, weights that are no whole safetensors
            checkpoint or contradict `config.json`, an `output` that exists, too little room on the disk, and a
            `resume` with another plan or model.
        WorkError: reading or writing failed; what was finished is kept for `resume`.
    """
    compensation = compensation or ("least_squares" if statistics else "none")
    if compensation == "natural_gradient":
        raise UsageError(
            "compensation natural_gradient needs both models in memory: use prune, or compensation least_squares or none"
        )
    if compensation == "bias":
        raise UsageError("compensation bias needs the model in memory: use prune, or compensation least_squares or none")
    check_compensation(compensation, plan, statistics)
    target = refuse_existing(output, overwrite)
    folder = resolve_model(model)
    refuse_overwriting_inputs(target, [folder, *([statistics.folder] if statistics and statistics.folder else [])])
    plan = plan.for_model(folder.config)
    layers = Layers(folder, device, dtype)
    checkpoint = layers.checkpoint
    pruned = _pruned_model(folder, plan)
    working = working_folder(target)
    writer = ShardWriter(working, expected_tensors(pruned), max_shard_size, pruned.num_parameters())
    refitted = statistics if compensation == "least_squares" else None
    inputs = {
        "plan": plan.hash(),
        "model": folder.stat_hash,
        "max_shard_size": sha256(sorted(writer.files.items())),
        "compensation": compensation,
        "statistics": sha256(refitted and refitted.identity()),
        "device": sha256(refitted and (device.type, str(layers.dtype))),
    }
    walked = refitted.calibration if refitted else None
    streams = 0
    if walked is not None:
        held = memory_capacity(device, spare)
        streams = streams_disk_bytes(walked.tokens, plan.source.hidden_size, layers.dtype, held)
    with resume_or_start(working, resume, overwrite, inputs, ("read", "written")) as noted, resumable(working):
        check_disk_space(working, sum(writer.files.values()) + streams, "the pruned weights")
        write_json(working / PROGRESS, noted)
        whole = assembly_folder(working)
        with layers, writer, ExitStack() as stack:
            _resume(checkpoint, writer, noted)
            refit = stack.enter_context(Refit(layers, pruned, refitted, working, spare)) if refitted else None
            steps = _steps(plan, checkpoint, writer)
            _stream(_Surgery(checkpoint, writer, plan, folder.dtype, steps, refit), working / PROGRESS, noted)
            writer.sync()
        record = {"ridges": ridge_record(refit.ridges)} if refit and walked is not None else {}
        _write_around(pruned, folder.path, whole, checkpoint, writer, {**(known or {}), **record})
        for name in writer.files:
            os.rename(working / name, whole / name)
        # another may have come by now
        refuse_existing(target, overwrite)
        replace_folder(whole, target)
        remove_working_folder(working)
    return target


@dataclass(frozen=True)
class _Step:
    """What is finished together: the tensors read and written, and the layer that they are of, if any."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    layer: int | None = None


@dataclass(frozen=True)
class _Surgery:
    checkpoint: Checkpoint
    writer: ShardWriter
    plan: PruningPlan
    dtype: torch.dtype
    steps: tuple[_Step, ...]
    refit: Refit | None

    def pending(self) -> list[_Step]:
        """Steps that are not done yet."""
        read, written = self.checkpoint.digests.keys(), self.writer.digests.keys()
        left = [step for step in self.steps if not (read >= set(step.reads) and written >= set(step.writes))]
        layers = [step.layer for step in left if step.layer is not None]
        if self.refit is None or not layers:
            return left
        # layers come in order, from the first that the streams of both models lead to
        start = self.refit.begin(min(layers))
        rest = [step for step in left if step.layer is None]
        return sorted((s for s in self.steps if s.layer is not None and s.layer >= start), key=_layer_of) + rest

    def take(self, step: _Step, slices: tuple[UnitSlices, ...]) -> None:
        """Read, cut and write what `step` is about."""
        cuts = {}
        if step.layer is not None:
            prefix, kept, units = layer_prefix(step.layer), self.plan.layers[step.layer], slices[step.layer]
            if self.refit is None:
                cuts = _cuts(prefix, kept, units)
            else:
                for name, tensor in self.refit.layer(step.layer, kept, units).items():
                    self.writer.write(prefix + name, [to_host(tensor.to(self.dtype))])
        for name in step.reads:
            if name in self.checkpoint.digests:
                continue  # the layer was refitted from it
            pieces = _finite(name, self.checkpoint.chunks(name))
            if name in step.writes:
                self.writer.write(name, _cut((piece.to(self.dtype) for piece in pieces), cuts.get(name)))
            else:
                # not part of the result, but of the fingerprint of the model that it was made from
                for _ in pieces:
                    pass


def _finite(name: str, pieces: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield `pieces` of a tensor; raise [`WorkError`] for a weight that is not finite, as `prune` does."""
    for piece in pieces:
        if piece.dtype in FLOATS:
            check_finite(name, piece)
        yield piece


def _cuts(prefix: str, kept: LayerPlan, units: UnitSlices) -> dict[str, tuple[int, torch.Tensor]]:
    """Return `{tensor: (dim, kept indices)}` of a layer; a bias loses rows only."""
    found = {}
    for name, (dim, index) in units.kept(kept.kv_groups, kept.query_heads, kept.ffn_channels).items():
        found[f"{prefix}{name}.weight"] = dim, index
        if dim == 0:
            found[f"{prefix}{name}.bias"] = dim, index
    return found


def _cut(pieces: Iterable[torch.Tensor], cut: tuple[int, torch.Tensor] | None) -> Iterator[torch.Tensor]:
    """Pieces of whole rows without the rows (dim 0) or columns (dim 1) that go; `cut` has sorted indices."""
    if cut is None:
        yield from pieces
        return
    dim, index = cut
    first = 0
    for piece in pieces:
        if dim == 0:
            begin, end = torch.searchsorted(index, torch.tensor([first, first + len(piece)])).tolist()
            yield piece if end - begin == len(piece) else piece.index_select(0, index[begin:end] - first)
        else:
            yield piece if len(index) == piece.shape[1] else _columns(piece, index)
        first += len(piece)


def _columns(piece: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Columns of a piece; numpy takes them several times as fast as torch, of whole numbers of the same width."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[piece.element_size()]
    return torch.from_numpy(piece.view(whole).numpy().take(index.numpy(), 1)).view(piece.dtype)


def _stream(surgery: _Surgery, progress: Path, noted: dict[str, Any]) -> None:
    """Take every step that is not done yet, and note each when it is."""
    slices = trace_units(surgery.plan.source.layers)
    pending = surgery.pending()
    for name in itertools.chain.from_iterable(step.reads for step in pending):
        # noted by a call that was interrupted in between
        surgery.checkpoint.digests.pop(name, None)
    bar = track(pending, "pruning", "step")
    for step, following in itertools.zip_longest(bar, pending[1:]):
        if following is not None:
            surgery.checkpoint.announce(following.reads)
        surgery.take(step, slices)
        # the next layer may be read already
        read = dict(surgery.checkpoint.digests)
        write_json(progress, {**noted, "read": read, "written": surgery.writer.digests})
        if surgery.refit is not None and step.layer is not None:
            surgery.writer.wait()
            surgery.refit.finished(step.layer)


def _layer_of(step: _Step) -> int:
    return -1 if step.layer is None else step.layer


def _steps(plan: PruningPlan, checkpoint: Checkpoint, writer: ShardWriter) -> tuple[_Step, ...]:
    """List all reads and writes, whole layers and single other tensors, in the order of the files."""
    steps = []
    for index in range(len(plan.layers)):
        prefix = layer_prefix(index)
        reads = tuple(name for name in checkpoint.tensors if name.startswith(prefix))
        if reads:
            steps.append(_Step(reads, tuple(name for name in writer.tensors if name.startswith(prefix)), index))
    inside = {name for step in steps for name in step.reads}
    steps += [_Step((name,), (name,) if name in writer.tensors else ()) for name in checkpoint.tensors if name not in inside]
    place = {name: number for number, name in enumerate(checkpoint.tensors)}
    return tuple(sorted(steps, key=lambda step: place[step.reads[0]]))


def _resume(checkpoint: Checkpoint, writer: ShardWriter, noted: dict[str, Any]) -> None:
    """Take over what was read, and what was written as far as it is on the disk as it should be."""
    checkpoint.digests |= noted["read"]
    for name, digest in noted["written"].items():
        if name in writer.tensors:
            writer.verify(name, digest)


def _pruned_model(folder: ModelFolder, plan: PruningPlan) -> PrunedLlamaForCausalLM:
    """Build the pruned model on the meta device, with the plan and generation config that `prune` would give it."""
    from transformers import GenerationConfig

    with torch.device("meta"):
        pruned: PrunedLlamaForCausalLM = PrunedLlamaForCausalLM(pruned_config(folder.config, plan)).to(folder.dtype)
    pruned.tie_weights()
    path = folder.path / PLAN_FILE
    whole = plan
    if folder.config.model_type == pruned.config.model_type and path.exists():
        whole = PruningPlan.load(path).compose(plan)
    pruned.prune_plan = whole.to_dict()
    try:
        pruned.generation_config = GenerationConfig.from_pretrained(folder.path)
    except OSError:
        # from_pretrained of a model without that file does the same
        pruned.generation_config = GenerationConfig.from_pretrained(
            folder.path, config_file_name="config.json", _from_model_config=True
        )
    return pruned


def _write_around(
    pruned: PrunedLlamaForCausalLM,
    folder: Path,
    output: Path,
    checkpoint: Checkpoint,
    writer: ShardWriter,
    known: Mapping[str, Any],
) -> None:
    """Write everything but the weights."""
    pruned.save_pretrained(output, state_dict={})
    if writer.index is not None:
        write_text(output / INDEX, json.dumps(writer.index, indent=2, sort_keys=True) + "\n")
    copy_carried_files(folder, output)
    # a file of weights that no index names was not read
    alone = set(folder.glob("*.safetensors")) == set(checkpoint.files)
    alone &= all(name == stored.name for name, stored in checkpoint.tensors.items())
    own = {
        "plan_hash": PruningPlan.from_dict(pruned.prune_plan).hash(),
        "base_fingerprint": fingerprint_of_digests(checkpoint.digests) if alone else fingerprint(folder),
        **known,
        "fingerprint": fingerprint_of_digests(writer.digests),
    }
    write_identity(output, **{**(read_identity(folder) or {}), **own})
