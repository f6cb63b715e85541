"""Load the parts of a checkpoint one at a time, each only while it is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ..checkpoint import FLOATS, Checkpoint, ModelFolder
from ..errors import UsageError
from ..models import DecoderInputs, check_finite, empty_model, expected_tensors, layer_prefix, materialized
from ..utils import CPU, Prefetcher, trim_heap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

class Layers:
    """The parts of a Llama or pruned Llama checkpoint, each in memory only while it is used; a context manager.

    Attributes:
        folder: of the checkpoint.
        config: of the model.
        checkpoint: reader of the tensors on disk.
        dtype: of the loaded weights.
        stored_itemsize: bytes of a weight on disk, of the widest.
        device: where they are used.
    """

    def __init__(self, folder: ModelFolder, device: torch.device = CPU, dtype: torch.dtype | None = None) -> None:
        """Check that `folder` holds the tensors its config asks for; only headers are read.

        Args:
            dtype: to compute in; None as the weights are stored, see `ModelFolder.dtype`.

        Raises:
            UsageError: quantized weights, no whole safetensors checkpoint, tensors that are missing or of other shapes.
        """
        config: Any = folder.config
        folder.check_unquantized()
        self.folder, self.config, self.device = folder, config, device
        self.checkpoint = folder.tensors
        self._model = empty_model(config)
        _check_tensors(folder, self.checkpoint, self._model)
        floats = [stored for stored in self.checkpoint.tensors.values() if stored.dtype in FLOATS]
        self.stored_itemsize = max(stored.dtype.itemsize for stored in floats)
        self.dtype = dtype or folder.dtype
        self._stack = ExitStack()

    def __enter__(self) -> Layers:
        self._stack.enter_context(self.checkpoint)
        self._weights = Prefetcher(self.device, self._read, dict[str, torch.Tensor].values)
        self._stack.callback(self._weights.close)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def tensor(self, name: str) -> torch.Tensor:
        """Load a weight to the device."""
        return self.checkpoint.read(name, pinned=self.device.type == "cuda").to(self.device).to(self.dtype)

    def embedded(self, batches: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the embeddings `(windows, seq_len, hidden)` of each batch of ids."""
        weight = self._outer("model.embed_tokens.weight")
        yield from (F.embedding(ids.to(self.device), weight) for ids in batches)

    @contextmanager
    def layer(self, index: int, following: int | None = None) -> Iterator[Any]:
        """Yield the decoder layer `index` with its weights, in eval mode and without gradients.

        On a GPU the next one, `following`, is prefetched.
        """
        layers: Any = self._model.get_decoder().layers
        # the layer before would leave the heap a little larger
        trim_heap()
        there = following is not None and 0 <= following < len(layers)
        with materialized(layers[index], self._weights.take(index, following if there else None)):
            yield layers[index]

    def _read(self, index: int) -> dict[str, torch.Tensor]:
        """Load a layer to the device, `{name within it: tensor}`."""
        layer: Any = self._model.get_decoder().layers[index]
        # old checkpoints hold more, such as the frequencies of the position embeddings
        return {name: self.tensor(layer_prefix(index) + name) for name in layer.state_dict()}

    def head(self) -> tuple[nn.Module, torch.Tensor]:
        """Load the final norm, and the weight `(vocabulary, hidden)` of the head."""
        norm: Any = self._model.get_decoder().norm
        norm.load_state_dict({"weight": self._outer("model.norm.weight")}, assign=True)
        tied = self.config.tie_word_embeddings
        return norm.requires_grad_(False), self._outer("model.embed_tokens.weight" if tied else "lm_head.weight")

    def _outer(self, name: str) -> torch.Tensor:
        """Load a weight outside the layers; raises [`WorkError`] if it is not finite."""
        weight = self.tensor(name)
        check_finite(name, weight)
        return weight

    def decoder_inputs(self, seq_len: int) -> DecoderInputs:
        """Build the inputs of a layer other than hidden states."""
        rotary: Any = self._model.get_decoder().rotary_emb
        return DecoderInputs(self.config, type(rotary)(config=rotary.config).to(self.device), seq_len, self.dtype)


def _check_tensors(folder: ModelFolder, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Raise [`UsageError`] unless the checkpoint holds the tensors of its config."""
    for name, tensor in expected_tensors(model).items():
        stored = checkpoint.tensors.get(name)
        if stored is None:
            raise UsageError(f"{folder}: config.json asks for {name}, which no shard holds")
        folder.check_shape(name, tuple(tensor.shape))
        if stored.dtype not in FLOATS:
            raise UsageError(f"{stored.file}: {name} is {stored.dtype}: give the checkpoint with the plain weights")
