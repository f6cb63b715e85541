"""Open a model folder: its config, tokenizer and weights, each once and only when asked for."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE as INDEX

from ..data import demo_model_path
from ..errors import UsageError, first_line, on_one_line
from ..models import empty_model, expected_tensors
from ..utils import AUTO, CPU, select_device, sha256
from .identity import IDENTITY_FILE
from .reader import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: dtypes that a weight can be computed with
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class ModelFolder:
    """A checkpoint folder whose parts are opened once; get one from [`resolve_model`].

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config, untied if the checkpoint stores a head that differs from its embeddings.

        Fine-tuning and merging leave such heads behind under `tie_word_embeddings=true`. Raises [`UsageError`] if the config
        is unreadable.
        """
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            reason = on_one_line(error)[:200]
            raise UsageError(f"the config of {self} is not readable: {reason}") from error
        if config.tie_word_embeddings and any(self.path.glob("*.safetensors")) and _heads_differ(self._checkpoint):
            config.tie_word_embeddings = False
        return config

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, with a padding token; raises [`UsageError`] if the folder has none."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            model = self.path / "tokenizer.model"
            if model.is_file() and model.read_bytes()[:1] == b"\n" and find_spec("sentencepiece") is None:
                # transformers takes it for a tiktoken file
                raise UsageError(f"{model} needs sentencepiece, which is not installed: pip install sentencepiece") from error
            raise UsageError(f"{self} holds no tokenizer: {on_one_line(error)[:200]}") from error
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
        return tokenizer

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self.path)

    @cached_property
    def tensors(self) -> Checkpoint:
        """Reader of the safetensors weights; only headers are read. Raises [`UsageError`] as [`Checkpoint`] does.

        Tied embeddings are found under the name of the embeddings, also if they are stored under that of the head.
        """
        tensors = self._checkpoint.tensors
        if self.config.tie_word_embeddings and _HEAD in tensors and _EMBEDDINGS not in tensors:
            tensors[_EMBEDDINGS] = tensors.pop(_HEAD)
        return self._checkpoint

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that `from_pretrained(dtype="auto")` loads: the config's, else that of the first floating weight."""
        dtype: torch.dtype | None = self.config.dtype
        if dtype is not None:
            return dtype
        floats = [stored for stored in self.tensors.tensors.values() if stored.dtype in FLOATS]
        if not floats:
            raise UsageError(f"{self} holds no floating-point weights: give the checkpoint with the plain weights")
        return min(floats, key=lambda stored: (stored.file, stored.name)).dtype

    @property
    def stat_hash(self) -> str:
        """Hash of the config, the tensor layout, and the sizes and modification times of the weight files."""
        # times instead of contents: reading all weights once more would cost as much as the work
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self.tensors.files]
        layout = [(t.name, t.file.name, str(t.dtype), t.shape, t.start) for t in self.tensors.tensors.values()]
        return sha256((stats, layout, (self.path / "config.json").read_bytes()))

    def check_weights(self) -> None:
        """Raise [`UsageError`] if weights are absent, quantized, damaged, or of other shapes than the config says."""
        self.check_unquantized()
        if any(self.path.glob("*.safetensors")):
            for name, tensor in expected_tensors(empty_model(self.config)).items():
                self.check_shape(name, tuple(tensor.shape))
        elif not any(self.path.glob("*.bin")):
            raise UsageError(f"{self} holds no weights (*.safetensors): give the folder of a whole checkpoint")

    def check_unquantized(self) -> None:
        """Raise [`UsageError`] if the config declares quantized weights."""
        if getattr(self.config, "quantization_config", None) is not None:
            raise UsageError(
                f"{self} is quantized, and pruning, evaluation and recovery need the plain weights: give the checkpoint it "
                "was made from, or remove a left-over quantization_config from config.json"
            )

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise [`UsageError`] if the tensor `name` is stored with another shape."""
        stored = self.tensors.tensors.get(name)
        if stored is not None and stored.shape != shape:
            raise UsageError(f"{stored.file}: {name} is {stored.shape}, config.json makes it {shape}")

    def load(
        self, dtype: torch.dtype | str = "auto", device: torch.device | str | None = CPU, **options: Any
    ) -> PreTrainedModel:
        """Load the causal LM.

        Args:
            dtype: of the weights; `auto` for [`dtype`].
            device: a device or its name; None or `auto` for all GPUs, with what they cannot hold on the CPU.
            options: passed to `from_pretrained`.

        Raises:
            UsageError: a weight is missing, or there is no such device.
        """
        from transformers import AutoModelForCausalLM

        place = device if isinstance(device, torch.device) else select_device(device)
        if place != CPU:
            # directly to the device, without a full copy on the CPU
            options.setdefault("device_map", "auto" if device in (None, AUTO) else {"": place})
        options |= {"config": self.config, "dtype": dtype, "output_loading_info": True}
        with _with_metadata(self.path) as path:
            model, info = AutoModelForCausalLM.from_pretrained(path, **options)
        model.name_or_path = model.config.name_or_path = os.fspath(self.path)
        # transformers initializes missing weights at random
        if missing := sorted(info["missing_keys"]):
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UsageError(
                f"{self}: config.json asks for {missing[0]}{more}, which is not there: fetch the whole checkpoint"
            )
        return model


def resolve_model(model: str | os.PathLike[str] | ModelFolder) -> ModelFolder:
    """Resolve a folder, the embedded `demo`, or a Hub id (whose safetensors are downloaded); a [`ModelFolder`] stays itself.

    Raises:
        UsageError: neither a checkpoint folder nor a Hub id that can be reached.
    """
    if isinstance(model, ModelFolder):
        return model
    path = Path(model)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            merge = f"gqaprune merge {path} -o {path}-merged"
            if not (path / IDENTITY_FILE).is_file():
                merge = (
                    f'python -c "from peft import AutoPeftModelForCausalLM as M; '
                    f"M.from_pretrained('{path}').merge_and_unload().save_pretrained('{path}-merged')\""
                )
            raise UsageError(f"{path} holds a LoRA adapter: merge it first: {merge}")
        if not (path / "config.json").is_file():
            raise UsageError(f"{path} holds no config.json: give the folder of a checkpoint")
        return ModelFolder(path)
    if str(model) == "demo":
        return ModelFolder(demo_model_path())
    if path.is_absolute() or str(model).count("/") > 1 or str(model).startswith("."):
        raise UsageError(f"no such model folder: {model}")
    return ModelFolder(_download(str(model)))


@contextmanager
def _with_metadata(folder: Path) -> Iterator[Path]:
    """Yield `folder`, or links to its files with an index that has the `metadata` which transformers does not do without."""
    index = folder / INDEX
    data = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    if "metadata" in data or "weight_map" not in data:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        for path in folder.iterdir():
            if path != index:
                Path(scratch, path.name).symlink_to(path.absolute())
        Path(scratch, INDEX).write_text(json.dumps({"metadata": {}, **data}), encoding="utf-8")
        yield Path(scratch)


def _heads_differ(checkpoint: Checkpoint) -> bool:
    """Return whether embeddings and head are both stored, with different values."""
    stored = [checkpoint.tensors.get(name) for name in (_EMBEDDINGS, _HEAD)]
    if None in stored:
        return False
    if len({(tensor.dtype, tensor.shape) for tensor in stored if tensor is not None}) > 1:
        return True
    with checkpoint:
        pairs = zip(checkpoint.chunks(_EMBEDDINGS), checkpoint.chunks(_HEAD), strict=True)
        return any(not torch.equal(embeddings, head) for embeddings, head in pairs)


def _download(model: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        # with a partly filled cache, the gate is only the cause of the error raised
        if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError):
            raise UsageError(
                f"{model} is gated: accept its terms at {constants.ENDPOINT}/{model}, and log in (hf auth login, HF_TOKEN)"
            ) from error
        reason = first_line(error)
        raise UsageError(f"no model folder {model}, and the Hub has none that can be reached: {reason}") from error
