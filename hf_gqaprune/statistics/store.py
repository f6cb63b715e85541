"""Save and load the statistics of a calibration pass, one file per block."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..checkpoint import digest
from ..data import Calibration, Source
from ..errors import UsageError, on_one_line
from ..linalg import mirror_
from ..models import KINDS, OUTPUT_PROJECTION, LayerShape, ModelShape
from ..utils import CPU, new_folder, save_tensors, to_host, write_json
from .moments import Curve, Moments

VERSION = 4
#: rows per strip of a stored symmetric matrix; a strip ends at its last diagonal element
_STRIP = 256


@dataclass(frozen=True)
class BlockStatistics:
    """Measurements of one block.

    Attributes:
        stored: the moments, or the file that holds them; None if they were not kept.
        weight: `weight_digest` of its output projection; None if the model had no weights.
    """

    layer: int
    kind: str
    curve: Curve
    stored: Moments | Path | None = field(default=None, repr=False)
    weight: str | None = field(default=None, repr=False)

    @staticmethod
    def open(folder: Path, layer: int, kind: str) -> BlockStatistics:
        """Open a block of a saved folder; raises [`UsageError`] if it is missing."""
        from safetensors import safe_open

        path = block_file(folder, layer, kind)
        if not path.exists():
            raise UsageError(f"statistics are incomplete: {path} is missing")
        with _damage_told(path), safe_open(path, framework="pt") as file:
            curve = Curve(file.get_tensor("order"), file.get_tensor("cost"))
            stored = path if "inputs" in file.keys() else None  # noqa: SIM118
            return BlockStatistics(layer, kind, curve, stored, (file.metadata() or {}).get("weight"))

    @property
    def moments(self) -> Moments | None:
        """Return the moments, or None if they were not kept; saved ones are read from the file at each access."""
        return _read_moments(self.stored, CPU) if isinstance(self.stored, Path) else self.stored

    def moments_on(self, device: torch.device) -> Moments | None:
        """Return `moments` on `device`."""
        if isinstance(self.stored, Path):
            return _read_moments(self.stored, device)
        return self.stored and self.stored.to(device)

    @property
    def has_moments(self) -> bool:
        """Return whether the block has moments, without reading them."""
        return self.stored is not None


@dataclass
class Statistics:
    """Everything one calibration pass measured.

    Attributes:
        source: sizes of the measured model.
        criterion: name of the criterion that computed the curves.
        blocks: `{(layer, kind): BlockStatistics}` for every block of the model.
        calibration: the windows, None if the criterion needed none.
        seed: of random criteria.
    """

    source: ModelShape
    criterion: str
    blocks: dict[tuple[int, str], BlockStatistics] = field(repr=False)
    calibration: Calibration | None = field(default=None, repr=False)
    seed: int = 0

    @property
    def folder(self) -> Path | None:
        """Return the folder that moments are read from, None if they are in memory."""
        return next((b.stored.parent for b in self.blocks.values() if isinstance(b.stored, Path)), None)

    def read(self, layer: int, device: torch.device) -> dict[str, Moments]:
        """Return `{kind: Moments}` of a layer's blocks on `device`; blocks without moments are left out."""
        blocks = {kind: self.blocks[layer, kind] for kind in KINDS if (layer, kind) in self.blocks}
        loaded = {kind: block.moments_on(device) for kind, block in blocks.items()}
        return {kind: moments for kind, moments in loaded.items() if moments is not None}

    def check_weights(self, layer: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Raise [`UsageError`] if a layer's moments were not measured on `weights`, `{"self_attn.o_proj.weight": ...}`."""
        for kind, name in OUTPUT_PROJECTION.items():
            block = self.blocks.get((layer, kind))
            if block and block.has_moments and block.weight not in (None, weight_digest(weights[f"{name}.weight"])):
                raise UsageError(
                    f"the statistics were collected on other weights than the model's, first in layer {layer}, {name}: "
                    "collect them again"
                )

    def identity(self) -> tuple[object, ...]:
        """Return a value that is equal for equal measurements, compared without their moments."""
        ends = [(key, *block.curve.order.tolist(), float(block.curve.cost[-1])) for key, block in self.blocks.items()]
        return self.criterion, self.seed, ends, self.calibration and self.calibration.ids.tolist()

    def save(self, folder: str | os.PathLike[str], *, moments: bool = True, overwrite: bool = False) -> None:
        """Write `statistics.json` and one safetensors file per block, with the lower half of symmetric moments."""
        with new_folder(folder, overwrite) as scratch:
            for block in self.blocks.values():
                save_block(block, scratch, moments=moments)
            self.save_head(scratch)

    def save_head(self, folder: Path) -> None:
        """Write `statistics.json` and the calibration windows: everything but the blocks."""
        calibration = self.calibration
        if calibration is not None:
            save_tensors({"ids": calibration.ids.contiguous()}, folder / "calibration.safetensors")
        write_json(
            folder / "statistics.json",
            {
                "version": VERSION,
                "criterion": self.criterion,
                "seed": self.seed,
                "source": asdict(self.source),
                "calibration": calibration and {"seed": calibration.seed, "sources": calibration.record()},
                "blocks": [list(key) for key in self.blocks],
            },
        )

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Statistics:
        """Open a saved folder, which must not be moved while in use; raises [`UsageError`] naming a missing file."""
        from safetensors.torch import load_file

        root = Path(folder)
        try:
            head = json.loads((root / "statistics.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{root} holds no readable statistics.json: {error}") from error
        with _damage_told(root / "statistics.json"):
            if head.get("version") != VERSION:
                raise UsageError(f"{root}: statistics of version {head.get('version')!r}, this release reads {VERSION}")
            source = dict(head["source"])
            source["layers"] = tuple(LayerShape(**layer) for layer in source["layers"])
            shape, criterion, seed = ModelShape(**source), str(head["criterion"]), int(head["seed"])
            keys = [(int(layer), str(kind)) for layer, kind in head["blocks"]]
            if set(keys) != set(shape.blocks):
                raise ValueError("its blocks are not those of its model")
            calibration = None
            if head["calibration"] is not None:
                sources = tuple(Source(**entry) for entry in head["calibration"]["sources"])
                with _damage_told(root / "calibration.safetensors"):
                    ids = load_file(root / "calibration.safetensors")["ids"]
                calibration = Calibration(ids, sources, int(head["calibration"]["seed"]))
        blocks = {(layer, kind): BlockStatistics.open(root, layer, kind) for layer, kind in keys}
        return Statistics(shape, criterion, blocks, calibration, seed)


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Raise [`UsageError`] naming `path` for whatever reading a damaged file of statistics raises."""
    from safetensors import SafetensorError

    try:
        yield
    except UsageError:
        raise
    except (OSError, SafetensorError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = on_one_line(error) or type(error).__name__
        raise UsageError(f"the statistics are damaged, {path}: {reason}: collect them again") from error


def weight_digest(weight: torch.Tensor) -> str | None:
    """Hash the values and the shape of a weight, alike in every dtype that holds them: 32 hex digits; None on meta."""
    if weight.is_meta:
        return None
    wide = to_host(weight.detach()).to(torch.promote_types(weight.dtype, torch.float32))
    return digest(wide.dtype, tuple(wide.shape), [wide])


def block_file(folder: Path, layer: int, kind: str) -> Path:
    """Return the file of a block in a folder of statistics."""
    return folder / f"layer-{layer:03d}.{kind}.safetensors"


def save_block(block: BlockStatistics, folder: Path, *, moments: bool = True) -> None:
    """Write one block's file atomically; raises [`WorkError`] if it cannot be written."""
    write_block(packed_block(block, moments=moments), block, folder)


def packed_block(block: BlockStatistics, *, moments: bool = True) -> dict[str, torch.Tensor]:
    """Return the tensors of a block's file, with half of each symmetric moment."""
    tensors = {"order": block.curve.order, "cost": block.curve.cost}
    m = block.moments if moments else None
    if m is not None:
        tensors |= {"tokens": torch.tensor(m.tokens), "inputs": _half(m.inputs), "input_mean": m.input_mean}
        if m.gradients is not None:
            tensors["gradients"] = _half(m.gradients)
    return tensors


def write_block(tensors: Mapping[str, torch.Tensor], block: BlockStatistics, folder: Path) -> None:
    """Write the tensors that `packed_block` returned for `block`."""
    path = block_file(folder, block.layer, block.kind)
    part = path.with_suffix(".part")
    metadata = {"weight": block.weight} if block.weight else None
    save_tensors({name: to_host(tensor) for name, tensor in tensors.items()}, part, metadata)
    os.rename(part, path)


def _read_moments(path: Path, device: torch.device) -> Moments:
    from safetensors import safe_open

    with _damage_told(path), safe_open(path, framework="pt") as file:
        gradients = _square(file.get_tensor("gradients").to(device)) if "gradients" in file.keys() else None  # noqa: SIM118
        inputs = _square(file.get_tensor("inputs").to(device))
        return Moments(int(file.get_tensor("tokens")), inputs, file.get_tensor("input_mean").to(device), gradients)


def _half(matrix: torch.Tensor) -> torch.Tensor:
    """Flatten the lower triangle of a symmetric `(n, n)`, and a little more, strip by strip of its rows."""
    firsts = range(0, len(matrix), _STRIP)
    return torch.cat([matrix[first : first + _STRIP, : first + _STRIP].flatten() for first in firsts])


def half_size(n: int) -> int:
    """Return how many numbers `_half` of an `(n, n)` matrix has."""
    return sum(min(_STRIP, n - first) * min(first + _STRIP, n) for first in range(0, n, _STRIP))


def _square(half: torch.Tensor) -> torch.Tensor:
    """Rebuild the matrix that `_half` flattened."""
    strips, n = [], 0
    while len(half):
        # the last strip may have fewer rows: rows * (n + rows) numbers are left
        rows = min(_STRIP, (math.isqrt(n * n + 4 * len(half)) - n) // 2)
        strips.append((n, half[: rows * (n + rows)].view(rows, n + rows)))
        half = half[rows * (n + rows) :]
        n += rows
    matrix = half.new_empty(n, n)
    for first, strip in strips:
        matrix[first : first + len(strip), : strip.shape[1]] = strip
    return mirror_(matrix)
