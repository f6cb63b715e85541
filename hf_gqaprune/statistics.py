"""One calibration pass over a model in; per-block statistics out, as a folder with one file per block.

Curves are always kept; moments, which compensation needs, can be left out of the folder.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from . import ranks
from .calibration import Calibration, split_batches
from .errors import UsageError, WorkError, unknown
from .files import new_folder, write_json
from .importance import CRITERIA, Block, Curve
from .plan import LayerShape, ModelShape
from .torch_pruning import OUTPUT_PROJECTION, UnitSlices, trace_units

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

VERSION = 1
KINDS = ("attention", "mlp")
#: ridge of the optimal-brain-surgeon solve, relative to the mean diagonal of H (Frantar & Alistarh 2022)
RIDGE = 0.01
#: fewer calibration tokens than this per FFN channel are warned of
_TOKENS_PER_CHANNEL = 4


@dataclass(frozen=True)
class Moments:
    """Second moments at the output projection of one block (`o_proj` or `down_proj`), averaged over tokens.

    Attributes:
        tokens: how many tokens were averaged.
        inputs: H, float32 `(n, n)`, mean of x x^T over the projection's inputs.
        input_mean: float32 `(n,)`, mean of x.
        gradients: G, float32 `(d, d)`, mean of g g^T over the loss gradient at its outputs; None if not measured.
    """

    tokens: int
    inputs: torch.Tensor
    input_mean: torch.Tensor
    gradients: torch.Tensor | None = None

    def ridged(self, ridge: float = RIDGE) -> torch.Tensor:
        """H + ridge * mean(diag H) * I in float64; inputs that were always zero get a ridge that costs nothing."""
        h = self.inputs.double()
        scale = float(h.diagonal().mean())
        h.diagonal().add_(ridge * scale if scale > 0 else 1e-12)
        return h


@dataclass(frozen=True)
class BlockStatistics:
    """What was measured of one block."""

    layer: int
    kind: str
    curve: Curve
    stored: Moments | Path | None = field(default=None, repr=False)

    @property
    def moments(self) -> Moments | None:
        """What re-fitting needs, None where it was not kept; of saved statistics read each time it is asked for."""
        return _read_moments(self.stored) if isinstance(self.stored, Path) else self.stored

    @property
    def has_moments(self) -> bool:
        """Whether `moments` is there, without reading it."""
        return self.stored is not None


@dataclass
class Statistics:
    """Everything one calibration pass measured.

    Attributes:
        source: sizes of the measured model.
        criterion: name of the criterion that made the curves.
        blocks: `{(layer, kind): BlockStatistics}` for every block that is present.
        calibration: the windows, `None` where the criterion needed none.
        seed: for criteria that draw.
    """

    source: ModelShape
    criterion: str
    blocks: dict[tuple[int, str], BlockStatistics] = field(repr=False)
    calibration: Calibration | None = field(default=None, repr=False)
    seed: int = 0

    def save(self, folder: str | os.PathLike[str], *, moments: bool = True, overwrite: bool = False) -> None:
        """Write `statistics.json` and one safetensors file per block; symmetric moments are stored as triangles."""
        from safetensors.torch import save_file

        with new_folder(folder, overwrite) as scratch:
            for (layer, kind), block in self.blocks.items():
                save_file(_pack(block, moments), scratch / _file(layer, kind))
            if self.calibration is not None:
                save_file({"ids": self.calibration.ids.contiguous()}, scratch / "calibration.safetensors")
            source = asdict(self.source)
            write_json(
                scratch / "statistics.json",
                {
                    "version": VERSION,
                    "criterion": self.criterion,
                    "seed": self.seed,
                    "source": source,
                    "calibration": self.calibration and {
                        "seed": self.calibration.seed, "sources": self.calibration.record()
                    },
                    "blocks": [list(key) for key in self.blocks],
                },
            )

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Statistics:
        """Open a saved folder, which has to stay where it is; raises [`UsageError`] naming what is missing."""
        from safetensors.torch import load_file

        from .calibration import Source

        root = Path(folder)
        try:
            head = json.loads((root / "statistics.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise UsageError(f"{root} holds no readable statistics.json: {error}") from error
        if head.get("version") != VERSION:
            raise UsageError(f"{root}: statistics of version {head.get('version')!r}, this release reads {VERSION}")
        blocks = {}
        for layer, kind in head["blocks"]:
            path = root / _file(layer, kind)
            if not path.exists():
                raise UsageError(f"statistics are incomplete: {path} is missing")
            blocks[layer, kind] = _open_block(layer, kind, path)
        calibration = None
        if head["calibration"] is not None:
            ids = load_file(root / "calibration.safetensors")["ids"]
            sources = tuple(Source(**source) for source in head["calibration"]["sources"])
            calibration = Calibration(ids, sources, head["calibration"]["seed"])
        source = dict(head["source"])
        source["layers"] = tuple(LayerShape(**layer) for layer in source["layers"])
        return Statistics(ModelShape(**source), head["criterion"], blocks, calibration, head["seed"])


def collect_statistics(
    model: PreTrainedModel,
    calibration: Calibration | None = None,
    *,
    criterion: str = "curvature",
    moments: bool = True,
    seed: int = 0,
) -> Statistics:
    """Measure every block of `model` on `calibration` in one pass and turn it into removal curves.

    Under `accelerate launch` every process measures its share of the windows and all get the same statistics.

    The model is left as it was: no copy is made, no weight changes, `requires_grad` flags and mode are restored.

    Args:
        model: a Llama or pruned Llama causal LM, any float dtype; moments are kept in float32.
        calibration: the windows; may be None for criteria that need none when `moments` is false.
        criterion: a key of `importance.CRITERIA`.
        moments: also keep the second moments of the output projections' inputs, which re-fitting needs.
        seed: for the criterion `random`.

    Raises:
        UsageError: unknown criterion, a model of another architecture, calibration missing.
        WorkError: a weight, activation or gradient that is not finite, named.
    """
    if criterion not in CRITERIA:
        raise unknown("criterion", criterion, CRITERIA)
    rule = CRITERIA[criterion]
    source = ModelShape.from_config(model.config)
    if calibration is None and rule.calibrated:
        raise UsageError(f"criterion {criterion} needs calibration text: pass --calibration NAME_OR_FILE")
    slices = trace_units(source.layers)
    layers: Any = model.get_decoder().layers
    check_weights(dict(enumerate(layers)))
    taps: dict[tuple[int, str], Tap] = {}
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for index, shape in enumerate(source.layers):
            for kind in KINDS:
                if kind not in shape.skip:
                    taps[index, kind] = Tap(index, kind, layers[index], slices[index])
        if calibration is not None and (rule.calibrated or moments):
            _check_tokens(calibration, source)
            for tap in taps.values():
                tap.attach(stack, rule.moments or moments, rule.output_gradients, rule.weight_gradients)
            backward = rule.output_gradients or rule.weight_gradients
            _run(model, calibration, backward)
            for tap in taps.values():
                tap.add_up()
    blocks = {}
    for key, tap in taps.items():
        block = tap.block(seed)
        curve = rule.curve(block)
        if not bool(torch.isfinite(curve.cost).all()):
            raise WorkError(f"layer {key[0]} {key[1]}: criterion {criterion} gives costs that are not finite")
        blocks[key] = BlockStatistics(*key, curve, block.moments if moments else None)
        tap.release()
    return Statistics(source, criterion, blocks, calibration, seed)


def _check_tokens(calibration: Calibration, source: ModelShape) -> None:
    """Say so where the tokens are too few for what is estimated from them."""
    tokens, wanted = calibration.ids.numel(), _TOKENS_PER_CHANNEL * max(shape.ffn for shape in source.layers)
    if tokens < wanted:
        logger.warning(
            "%d calibration tokens are few for an FFN of %d channels: take at least %d (more samples or longer windows)",
            tokens, wanted // _TOKENS_PER_CHANNEL, wanted,
        )  # fmt: skip


class Tap:
    """Sums what one block shows while calibration batches pass through it."""

    def __init__(self, layer: int, kind: str, module: nn.Module, slices: UnitSlices) -> None:
        self.layer, self.kind = layer, kind
        self.units = slices.units(kind)
        self.linears: dict[str, nn.Linear] = {name: module.get_submodule(name) for name in self.units}  # type: ignore[misc]
        self.tokens = 0
        self.inputs: torch.Tensor | None = None
        self.input_sum: torch.Tensor | None = None
        self.gradients: torch.Tensor | None = None
        self.weight_gradients: dict[str, torch.Tensor] = {}

    def attach(self, stack: ExitStack, moments: bool, output_gradients: bool, weight_gradients: bool) -> None:
        output = self.linears[OUTPUT_PROJECTION[self.kind]]
        rows, columns = output.weight.shape
        zeros = functools.partial(torch.zeros, device=output.weight.device)
        if moments:
            self.inputs, self.input_sum = zeros(columns, columns), zeros(columns)
            stack.callback(output.register_forward_pre_hook(self._take_input).remove)
        if output_gradients:
            self.gradients = zeros(rows, rows)
            stack.callback(output.register_forward_hook(self._watch_output).remove)
        if weight_gradients:
            for name, linear in self.linears.items():
                stack.enter_context(_trainable(linear.weight))
                self.weight_gradients[name] = torch.zeros_like(linear.weight, dtype=torch.float32)
                hook = linear.weight.register_post_accumulate_grad_hook(self._take_weight_gradient(name))
                stack.callback(hook.remove)

    def add_up(self) -> None:
        """Sum over processes."""
        sums = [self.inputs, self.input_sum, self.gradients, *self.weight_gradients.values()]
        ranks.add_up(tensor for tensor in sums if tensor is not None)
        self.tokens = int(ranks.added_up(self.tokens, next(iter(self.linears.values())).weight))

    def block(self, seed: int) -> Block:
        moments = None
        if self.inputs is not None and self.input_sum is not None:
            gradients = self.gradients
            moments = Moments(
                self.tokens,
                _mirrored(self.inputs / self.tokens),
                (self.input_sum / self.tokens).cpu(),
                None if gradients is None else _mirrored(gradients / self.tokens),
            )
            _check_moments(self.layer, self.kind, moments)
        weights = {name: linear.weight.detach() for name, linear in self.linears.items()}
        return Block(self.layer, self.kind, weights, self.units, moments, self.weight_gradients, seed)

    def release(self) -> None:
        self.inputs = self.gradients = None
        self.weight_gradients = {}

    def _take_input(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()  # (tokens, n)
        self.inputs.addmm_(x.T, x)  # type: ignore[union-attr]
        self.input_sum += x.sum(0)  # type: ignore[operator]
        self.tokens += len(x)

    def _watch_output(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        output.register_hook(self._take_gradient)

    def _take_gradient(self, gradient: torch.Tensor) -> None:
        g = gradient.flatten(0, -2).float()  # (tokens, d)
        self.gradients.addmm_(g.T, g)  # type: ignore[union-attr]

    def _take_weight_gradient(self, name: str) -> Any:
        def take(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                self.weight_gradients[name] += parameter.grad.float()
                parameter.grad = None

        return take


def _run(model: PreTrainedModel, calibration: Calibration, backward: bool) -> None:
    """Send every batch through the model, and the summed next-token loss back where gradients are wanted."""
    from tqdm.auto import tqdm

    device = next(model.parameters()).device
    batches = list(split_batches(ranks.share(calibration.ids), model.config.vocab_size))
    with torch.set_grad_enabled(backward):
        for batch in tqdm(batches, desc="calibration", unit="batch", disable=None, leave=False):
            ids = batch.to(device)
            # gradients start at the embeddings' output, so that no weight needs one
            embeds = model.get_input_embeddings()(ids).detach().requires_grad_(backward)
            logits = model(inputs_embeds=embeds, use_cache=False).logits
            if not backward:
                continue
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
            if not bool(torch.isfinite(loss.detach())):
                raise WorkError(f"the loss on calibration text is {float(loss.detach())}: the model's activations overflow")
            loss.backward()


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode and no parameter with a gradient; both restored."""
    was_training = model.training
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        model.train(was_training)
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _trainable(parameter: torch.Tensor) -> Iterator[None]:
    flag, gradient = parameter.requires_grad, parameter.grad
    parameter.requires_grad_(True)
    parameter.grad = None
    try:
        yield
    finally:
        parameter.requires_grad_(flag)
        parameter.grad = gradient


def check_weights(layers: Mapping[int, nn.Module]) -> None:
    """Raise [`WorkError`] for a weight of `{index: layer}` that is not finite."""
    for index, layer in layers.items():
        for name, parameter in layer.named_parameters():
            if parameter.device.type != "meta" and not bool(torch.isfinite(parameter).all()):
                raise WorkError(f"layer {index}: {name} holds values that are not finite; repair the checkpoint first")


def _check_moments(layer: int, kind: str, moments: Moments) -> None:
    for name, value in (("inputs", moments.inputs), ("output gradients", moments.gradients)):
        if value is not None and not bool(torch.isfinite(value).all()):
            raise WorkError(f"layer {layer} {kind}: {name} of {OUTPUT_PROJECTION[kind]} are not finite")


def _file(layer: int, kind: str) -> str:
    return f"layer-{layer:03d}.{kind}.safetensors"


def _pack(block: BlockStatistics, with_moments: bool) -> dict[str, torch.Tensor]:
    tensors = {"order": block.curve.order, "cost": block.curve.cost}
    m = block.moments if with_moments else None
    if m is not None:
        tensors |= {"tokens": torch.tensor(m.tokens), "inputs": _triangle(m.inputs), "input_mean": m.input_mean}
        if m.gradients is not None:
            tensors["gradients"] = _triangle(m.gradients)
    return tensors


def _open_block(layer: int, kind: str, path: Path) -> BlockStatistics:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        curve = Curve(file.get_tensor("order"), file.get_tensor("cost"))
        return BlockStatistics(layer, kind, curve, path if "inputs" in file.keys() else None)  # noqa: SIM118


def _read_moments(path: Path) -> Moments:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        gradients = _square(file.get_tensor("gradients")) if "gradients" in file.keys() else None  # noqa: SIM118
        inputs = _square(file.get_tensor("inputs"))
        return Moments(int(file.get_tensor("tokens")), inputs, file.get_tensor("input_mean"), gradients)


def _mirrored(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix` on the CPU, exactly symmetric as it is stored; products are symmetric up to rounding."""
    lower = matrix.cpu().tril_()
    return lower.add_(lower.tril(-1).T)


def _triangle(matrix: torch.Tensor) -> torch.Tensor:
    """Lower triangle of a symmetric `(n, n)`, flat `(n (n + 1) / 2,)`."""
    # row by row: an index of the triangle would be four times its size
    return torch.cat([row[: i + 1] for i, row in enumerate(matrix)])


def _square(triangle: torch.Tensor) -> torch.Tensor:
    """Inverse of `_triangle`."""
    n = int(((8 * len(triangle) + 1) ** 0.5 - 1) / 2)
    matrix = triangle.new_empty(n, n)
    start = 0
    for i in range(n):
        row = triangle[start : start + i + 1]
        matrix[i, : i + 1] = row
        matrix[: i + 1, i] = row
        start += i + 1
    return matrix
