"""A checkpoint folder goes in; its decoder layers come out one at a time, ready to run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from .calibration import split_batches
from .devices import CPU, ReadAhead, trim
from .errors import UsageError
from .measurement import check_finite
from .shards import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Layers:
    """The parts of a Llama or pruned Llama checkpoint, each in memory only while it is used; a context manager.

    Attributes:
        checkpoint: the tensors on disk.
        config: of the model.
        dtype: what weights are loaded as, the same as `from_pretrained(dtype="auto")`.
        stored_itemsize: bytes of a weight on disk, of the widest.
        device: where they are used.
    """

    def __init__(self, folder: Path, config: Any, device: torch.device = CPU) -> None:
        """Check that `folder` holds what `config` asks for; no weight is read.

        Raises:
            UsageError: quantized weights, no whole safetensors checkpoint, tensors that are missing or of other shapes.
        """
        if getattr(config, "quantization_config", None) is not None:
            raise UsageError(
                f"{folder} is quantized, and cutting needs the plain weights: give the checkpoint it was made from"
            )
        self.config, self.device = config, device
        self.checkpoint = Checkpoint(folder)
        self._skeleton = skeleton(config)
        _check_tensors(folder, self.checkpoint, self._skeleton)
        floats = [stored for stored in self.checkpoint.tensors.values() if stored.dtype in FLOATS]
        self.stored_itemsize = max(stored.dtype.itemsize for stored in floats)
        # what the config says, else what the first by file and name is
        self.dtype: torch.dtype = config.dtype or min(floats, key=lambda stored: (stored.file, stored.name)).dtype
        self._stack = ExitStack()

    def __enter__(self) -> Layers:
        self._stack.enter_context(self.checkpoint)
        self._weights = ReadAhead(self.device, self._read, dict[str, torch.Tensor].values)
        self._stack.callback(self._weights.close)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def tensor(self, name: str) -> torch.Tensor:
        """A weight on the device."""
        return self.checkpoint.read(name, pinned=self.device.type == "cuda").to(self.device).to(self.dtype)

    def embedded(self, batches: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The hidden states `(windows, seq_len, hidden)` of each batch of ids before the first layer."""
        weight = self._outer("model.embed_tokens.weight")
        yield from (F.embedding(ids.to(self.device), weight) for ids in batches)

    @contextmanager
    def layer(self, index: int, following: int | None = None) -> Iterator[Any]:
        """The decoder layer `index` with its weights, in eval mode, no parameter with a gradient.

        On a GPU the one that is asked for next, `following`, is read in the meantime.
        """
        layers: Any = self._skeleton.get_decoder().layers
        # the layer before would leave the heap a little larger
        trim()
        there = following is not None and 0 <= following < len(layers)
        with placed(layers[index], self._weights.take(index, following if there else None)):
            yield layers[index]

    def _read(self, index: int) -> dict[str, torch.Tensor]:
        """Of a layer, on the device, by the names within it."""
        layer: Any = self._skeleton.get_decoder().layers[index]
        # old checkpoints hold more, such as the frequencies of the position embeddings
        return {name: self.tensor(layer_prefix(index) + name) for name in layer.state_dict()}

    def head(self) -> tuple[nn.Module, torch.Tensor]:
        """The last norm, and the weight `(vocabulary, hidden)` of the head."""
        norm: Any = self._skeleton.get_decoder().norm
        norm.load_state_dict({"weight": self._outer("model.norm.weight")}, assign=True)
        tied = self.config.tie_word_embeddings
        return norm.requires_grad_(False), self._outer("model.embed_tokens.weight" if tied else "lm_head.weight")

    def _outer(self, name: str) -> torch.Tensor:
        """A weight that is of no layer; [`WorkError`] where it is not finite."""
        weight = self.tensor(name)
        check_finite(name, weight)
        return weight

    def surroundings(self, seq_len: int) -> Surroundings:
        """What a layer needs beside hidden states."""
        rotary: Any = self._skeleton.get_decoder().rotary_emb
        return Surroundings(self.config, type(rotary)(config=rotary.config).to(self.device), seq_len, self.dtype)


class Surroundings:
    """Position embeddings and masks for windows of one length, none of them padded."""

    def __init__(self, config: Any, rotary: nn.Module, seq_len: int, dtype: torch.dtype) -> None:
        device = next(rotary.buffers()).device
        self.config = config
        self.positions = torch.arange(seq_len, device=device)[None]
        self.rope = rotary(torch.empty(0, dtype=dtype, device=device), self.positions)
        self._masks: dict[tuple[object, ...], torch.Tensor | None] = {}

    def to(self, device: torch.device) -> Surroundings:
        """The same on another device."""
        moved = copy.copy(self)
        moved.positions = self.positions.to(device)
        moved.rope = tuple(part.to(device) for part in self.rope)
        moved._masks = {}
        return moved

    def mask(self, hidden: torch.Tensor, config: Any = None) -> torch.Tensor | None:
        """The causal mask for `hidden`, or None where attention needs none."""
        from transformers.masking_utils import create_causal_mask

        config = config or self.config
        key = (config._attn_implementation, hidden.shape[0], hidden.dtype)
        if key not in self._masks:
            # no attention mask and no cache, whose name differs between versions of transformers
            self._masks[key] = create_causal_mask(config, hidden, None, None, position_ids=self.positions)
        return self._masks[key]

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """A decoder layer's output, `(windows, seq_len, hidden)`."""
        output: torch.Tensor = layer(
            hidden,
            attention_mask=self.mask(hidden),
            position_embeddings=self.rope,
            position_ids=self.positions,
            use_cache=False,
        )
        return output


def layer_batches(ids: torch.Tensor, vocabulary: int, device: torch.device) -> list[torch.Tensor]:
    """Windows, int64 `(samples, seq_len)`, as layers take them one after the other.

    Whole logits are made nowhere there. On a GPU, which a small batch leaves idle, they limit nothing; on the CPU the batches
    are those of a pass through the whole model.
    """
    return list(split_batches(ids, vocabulary if device == CPU else 1))


def batches_of(
    fitted: torch.Tensor, held_out: torch.Tensor, vocabulary: int, device: torch.device
) -> tuple[list[torch.Tensor], list[bool]]:
    """Fitted and then held-out batches, and which are held out, as re-fitting takes them."""
    first, second = (layer_batches(ids, vocabulary, device) for ids in (fitted, held_out))
    return first + second, [False] * len(first) + [True] * len(second)


@contextmanager
def placed(layer: nn.Module, state: dict[str, torch.Tensor]) -> Iterator[None]:
    """Give a layer without weights these, in eval mode and without gradients, and take them away again."""
    layer.load_state_dict(state, assign=True)
    layer.eval().requires_grad_(False)
    try:
        yield
    finally:
        layer.to("meta")


def skeleton(config: Any) -> PreTrainedModel:
    """The model of `config` without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def expected_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Tensors that a checkpoint of `model` holds, in their order: all but tied ones."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def layer_prefix(index: int) -> str:
    """What the names of a decoder layer's tensors begin with."""
    return f"model.layers.{index}."


def _check_tensors(folder: Path, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Raise [`UsageError`] unless the checkpoint holds what its config asks for."""
    for name, tensor in expected_tensors(model).items():
        stored = checkpoint.tensors.get(name)
        if stored is None:
            raise UsageError(f"{folder}: config.json asks for {name}, which no shard holds")
        if stored.shape != tuple(tensor.shape):
            raise UsageError(f"{stored.file}: {name} is {stored.shape}, config.json makes it {tuple(tensor.shape)}")
        if stored.dtype not in FLOATS:
            raise UsageError(f"{stored.file}: {name} is {stored.dtype}: give the checkpoint with the plain weights")
