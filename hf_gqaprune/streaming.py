"""A checkpoint on disk and a plan go in; the pruned checkpoint comes out, one decoder layer in memory at a time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import identity
from .errors import UsageError, WorkError
from .files import new_folder, refuse_existing, write_json, write_text
from .plan import PruningPlan
from .shards import INDEX, Checkpoint, ShardWriter, fingerprint
from .surgery import check_compensation, prune_layer, pruned_config
from .torch_pruning import UnitSlices, trace_units

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .modeling_pruned_llama import PrunedLlamaForCausalLM

PROGRESS = "progress.json"
VERSION = 1
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def prune_checkpoint(
    model: str | os.PathLike[str],
    plan: PruningPlan,
    output: str | os.PathLike[str],
    *,
    compensation: str = "none",
    max_shard_size: int | str = "50GB",
    overwrite: bool = False,
    resume: bool = False,
) -> Path:
    """Prune a checkpoint without loading it: the files that `prune` and `save_pretrained` would write, byte for byte.

    Beside the weights go config, model files, plan, tokenizer, generation config, chat template, licence files and
    `gqaprune.json`. Of a layer its pruned weights and one dense weight are in memory; embeddings and head pass in
    pieces of 64 MiB. The work is done in a hidden folder beside `output`, `.NAME.unfinished`, whose content takes the
    name `output` in one step when complete.

    Args:
        model: folder or Hub id of a Llama or pruned Llama checkpoint in safetensors; its files are only read.
        plan: which units stay.
        output: the new folder.
        compensation: `none`. `least_squares` ends with a step on all layers at once, which needs both models in memory:
            see `prune`.
        max_shard_size: of the written shards, as in `save_pretrained`: bytes, or a text such as `"5GB"`.
        overwrite: replace `output`, and without `resume` drop what an interrupted call left.
        resume: go on after the last layer that an interrupted call with the same arguments finished; begin where there
            was none. What it wrote is hashed again, and written again where it differs.

    Returns:
        `output`.

    Raises:
        UsageError: before anything is written, for a plan of another model, weights that are no whole safetensors
            checkpoint or contradict `config.json`, an `output` that exists, too little room on the disk, and a
            `resume` with another plan or model.
        WorkError: reading or writing failed; what was finished is kept for `resume`.
    """
    from .trainer.models import load_config, local_folder

    if compensation == "least_squares":
        raise UsageError(
            "compensation least_squares needs both models in memory: load the model and use prune, or pass compensation='none'"
        )
    check_compensation(compensation, plan, None)
    target = refuse_existing(output, overwrite)
    folder = local_folder(os.fspath(model))
    if target.resolve() == folder.resolve():
        raise UsageError(f"{target} is the model itself, which stays as it is: choose another output")
    config = load_config(folder)
    plan.check_model(config)
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(f"{folder} is quantized, and cutting needs the plain weights: give the checkpoint it was made from")
    checkpoint = Checkpoint(folder)
    dense = _expected(_skeleton(config))
    _check_tensors(folder, checkpoint, dense)
    dtype = _dtype(config, checkpoint)
    pruned = _pruned_skeleton(folder, config, plan, dtype)
    working = target.parent / f".{target.name}.unfinished"
    writer = ShardWriter(working, _expected(pruned), max_shard_size, pruned.num_parameters())
    begun = _begun(working, resume, overwrite, _inputs(folder, checkpoint, plan, writer))
    _check_room(working, writer)
    try:
        working.mkdir(parents=True, exist_ok=True)
        write_json(working / PROGRESS, begun)
        with checkpoint, writer:
            _resume(checkpoint, writer, begun)
            _stream(_Surgery(checkpoint, writer, plan, dtype, _steps(plan, checkpoint, writer)), working / PROGRESS, begun)
            writer.sync()
        with new_folder(target, overwrite) as scratch:
            _write_around(pruned, folder, scratch, checkpoint, writer)
            # last: until then an error leaves them where resume finds them
            for name in writer.files:
                os.rename(working / name, scratch / name)
        shutil.rmtree(working)
    except (OSError, WorkError) as error:
        reason = " ".join(str(error).split())
        raise WorkError(f"{reason}; what was finished is in {working}: pass --resume to go on, or delete it") from error
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

    def pending(self) -> list[_Step]:
        """Steps that are not done yet."""
        read, written = self.checkpoint.digests.keys(), self.writer.digests.keys()
        return [step for step in self.steps if not (read >= set(step.reads) and written >= set(step.writes))]

    def take(self, step: _Step, slices: tuple[UnitSlices, ...]) -> None:
        """Read, cut and write what `step` is about."""
        for name in step.reads:
            # noted by a call that was interrupted in between
            self.checkpoint.digests.pop(name, None)
        if step.layer is not None:
            prefix = _prefix(step.layer)
            layer = _DenseLayer(self.checkpoint, prefix, step.reads, self.dtype)
            new = prune_layer(layer, self.plan.layers[step.layer], slices[step.layer], {}, clone=False)
            for name, tensor in new.items():
                self.writer.write(prefix + name, [tensor])
        for name in step.reads:
            if name in self.checkpoint.digests:
                continue  # the layer was cut from it
            pieces = self.checkpoint.chunks(name)
            if name in step.writes:
                self.writer.write(name, (piece.to(self.dtype) for piece in pieces))
            else:
                # not part of the result, but of the fingerprint of the model that it was made from
                for _ in pieces:
                    pass


class _DenseLayer(Mapping[str, torch.Tensor]):
    """`{"self_attn.q_proj.weight": tensor, ...}` of one layer, each read when it is asked for and not kept."""

    def __init__(self, checkpoint: Checkpoint, prefix: str, names: tuple[str, ...], dtype: torch.dtype) -> None:
        self._checkpoint, self._prefix, self._dtype = checkpoint, prefix, dtype
        self._names = {name.removeprefix(prefix) for name in names}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._checkpoint.read(self._prefix + name).to(self._dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def _stream(surgery: _Surgery, progress: Path, begun: dict[str, Any]) -> None:
    """Take every step that is not done yet, and note each when it is."""
    from tqdm.auto import tqdm

    slices = trace_units(surgery.plan.source.layers)
    pending = surgery.pending()
    for step, following in zip(
        tqdm(pending, desc="pruning", unit="step", disable=None, leave=False), [*pending[1:], None], strict=True
    ):
        if following is not None:
            surgery.checkpoint.announce(following.reads)
        surgery.take(step, slices)
        write_json(progress, {**begun, "read": surgery.checkpoint.digests, "written": surgery.writer.digests})


def _steps(plan: PruningPlan, checkpoint: Checkpoint, writer: ShardWriter) -> tuple[_Step, ...]:
    """Everything that there is to read and write, layers whole and the rest one by one, in the order of the files."""
    steps = []
    for index in range(len(plan.layers)):
        prefix = _prefix(index)
        reads = tuple(name for name in checkpoint.tensors if name.startswith(prefix))
        if reads:
            steps.append(_Step(reads, tuple(name for name in writer.tensors if name.startswith(prefix)), index))
    inside = {name for step in steps for name in step.reads}
    steps += [_Step((name,), (name,) if name in writer.tensors else ()) for name in checkpoint.tensors if name not in inside]
    place = {name: number for number, name in enumerate(checkpoint.tensors)}
    return tuple(sorted(steps, key=lambda step: place[step.reads[0]]))


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def _begun(working: Path, resume: bool, overwrite: bool, inputs: dict[str, str]) -> dict[str, Any]:
    """What an interrupted call noted, empty where there was none; [`UsageError`] where this one cannot go on with it."""
    path = working / PROGRESS
    fresh: dict[str, Any] = {"version": VERSION, "inputs": inputs, "read": {}, "written": {}}
    if not path.exists():
        return fresh
    if not resume:
        if not overwrite:
            raise UsageError(f"{working} is of an interrupted call: pass --resume to go on with it, or delete it")
        shutil.rmtree(working)
        return fresh
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        made_from = noted["inputs"] if noted["version"] == VERSION else {}
        noted["read"].items(), noted["written"].items()
        differing = [name for name, value in inputs.items() if made_from.get(name) != value]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not readable, so nothing can be resumed: delete {working}") from error
    if differing:
        raise UsageError(f"{working} was begun with another {differing[0]}: give the same one, or delete it to begin anew")
    return noted


def _inputs(folder: Path, checkpoint: Checkpoint, plan: PruningPlan, writer: ShardWriter) -> dict[str, str]:
    """What a call that goes on must agree in with the one that began."""
    # times instead of contents: reading all weights once more would cost as much as the work
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
    layout = [(t.name, t.file.name, str(t.dtype), t.shape, t.start) for t in checkpoint.tensors.values()]
    model = repr((states, layout, (folder / "config.json").read_bytes()))
    return {
        "plan": plan.hash(),
        "model": hashlib.sha256(model.encode()).hexdigest(),
        "max_shard_size": hashlib.sha256(repr(sorted(writer.files.items())).encode()).hexdigest(),
    }


def _resume(checkpoint: Checkpoint, writer: ShardWriter, begun: dict[str, Any]) -> None:
    """Take over what was read, and what was written as far as it is on the disk as it should be."""
    checkpoint.digests |= begun["read"]
    for name, digest in begun["written"].items():
        if name in writer.tensors:
            writer.holds(name, digest)


def _check_room(working: Path, writer: ShardWriter) -> None:
    """Raise [`UsageError`] unless the disk has room for what is still to be written."""
    there = [working / name for name in writer.files if (working / name).exists()]
    missing = sum(writer.files.values()) - sum(path.stat().st_blocks * 512 for path in there)
    place = next(path for path in working.absolute().parents if path.exists())
    free = shutil.disk_usage(place).free
    if missing > free:
        raise UsageError(
            f"the pruned weights need {missing / 1e9:.2f} GB more, and {place} has {free / 1e9:.2f} GB left: "
            "make room, or choose another output"
        )


def _check_tensors(folder: Path, checkpoint: Checkpoint, expected: Mapping[str, torch.Tensor]) -> None:
    """Raise [`UsageError`] unless the checkpoint holds what its config asks for."""
    for name, tensor in expected.items():
        stored = checkpoint.tensors.get(name)
        if stored is None:
            raise UsageError(f"{folder}: config.json asks for {name}, which no shard holds")
        if stored.shape != tuple(tensor.shape):
            raise UsageError(f"{stored.file}: {name} is {stored.shape}, config.json makes it {tuple(tensor.shape)}")
        if stored.dtype not in _FLOATS:
            raise UsageError(f"{stored.file}: {name} is {stored.dtype}: give the checkpoint with the plain weights")


def _dtype(config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """What `from_pretrained` loads weights as: what the config says, else what the first by file and name is."""
    floats = (stored for stored in checkpoint.tensors.values() if stored.dtype in _FLOATS)
    return config.dtype or min(floats, key=lambda stored: (stored.file, stored.name)).dtype


def _skeleton(config: Any) -> PreTrainedModel:
    """The model of `config` without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _pruned_skeleton(folder: Path, config: Any, plan: PruningPlan, dtype: torch.dtype) -> PrunedLlamaForCausalLM:
    """The pruned model without weights, with what `prune` would give it of `folder`."""
    from transformers import GenerationConfig

    from .modeling_pruned_llama import PLAN_FILE, PrunedLlamaForCausalLM

    with torch.device("meta"):
        pruned = PrunedLlamaForCausalLM(pruned_config(config, plan)).to(dtype)
    pruned.tie_weights()
    path = folder / PLAN_FILE
    whole = plan
    if config.model_type == pruned.config.model_type and path.exists():
        whole = PruningPlan.load(path).compose(plan)
    pruned.prune_plan = whole.to_dict()
    try:
        pruned.generation_config = GenerationConfig.from_pretrained(folder)
    except OSError:
        # from_pretrained of a model without that file does the same
        pruned.generation_config = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )
    return pruned


def _expected(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Tensors that a checkpoint of `model` holds, in their order: all but tied ones."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def _write_around(
    pruned: PrunedLlamaForCausalLM, folder: Path, output: Path, checkpoint: Checkpoint, writer: ShardWriter
) -> None:
    """Everything but the weights."""
    from .trainer.merge import _CARRIED

    pruned.save_pretrained(output, state_dict={})
    if writer.index is not None:
        write_text(output / INDEX, json.dumps(writer.index, indent=2, sort_keys=True) + "\n")
    for pattern in _CARRIED:
        for path in folder.glob(pattern):
            copy = output / path.relative_to(folder)
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
    # a file of weights that no index names was not read
    alone = set(folder.glob("*.safetensors")) == set(checkpoint.files)
    known = {name: value for name, value in (identity.read(folder) or {}).items() if name != "version"}
    known |= {
        "plan_hash": PruningPlan.from_dict(pruned.prune_plan).hash(),
        "base_fingerprint": fingerprint(checkpoint.digests) if alone else identity.fingerprint(folder),
        "fingerprint": fingerprint(writer.digests),
    }
    identity.write(output, **known)
