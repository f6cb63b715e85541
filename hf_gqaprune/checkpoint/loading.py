"""TODO."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data import demo_model_path
from ..errors import UsageError
from ..utils import AUTO, CPU, choose
from .reader import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def local_folder(model: str | Path) -> Path:
    """The folder of a checkpoint: `model` itself, the embedded `demo`, or a Hub id's files (safetensors only).

    Raises:
        UsageError: neither a checkpoint folder nor a Hub id that can be reached.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{path} holds no config.json: give the folder of a checkpoint")
        return path
    if str(model) == "demo":
        return demo_model_path()
    if path.is_absolute() or str(model).count("/") > 1 or str(model).startswith("."):
        raise UsageError(f"no such model folder: {model}")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        # where some files are in the cache it is only the cause
        if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError):
            raise UsageError(
                f"{model} is gated: accept its terms at {constants.ENDPOINT}/{model}, and log in (hf auth login, HF_TOKEN)"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"no model folder {model}, and the Hub has none that can be reached: {reason}") from error


def load_config(folder: Path) -> PreTrainedConfig:
    """The config in `folder`. Raises [`UsageError`] where it cannot be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"the config of {folder} is not readable: {' '.join(str(error).split())[:200]}") from error


def check_weight_files(folder: Path) -> None:
    """Raise [`UsageError`] where `folder` holds no weights that transformers loads, or a damaged file of them."""
    if any(folder.glob("*.safetensors")):
        Checkpoint(folder)
    elif not any(folder.glob("*.bin")):
        raise UsageError(f"{folder} holds no weights (*.safetensors): give the folder of a whole checkpoint")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, with a padding token. Raises [`UsageError`] where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} holds no tokenizer: {' '.join(str(error).split())[:200]}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    return tokenizer


def load_model(
    folder: Path, dtype: torch.dtype | str = "auto", device: torch.device = CPU, **options: Any
) -> PreTrainedModel:
    """The causal LM in `folder`, weights as `dtype` on `device`.

    Raises [`UsageError`] for a weight that is missing.
    """
    from transformers import AutoModelForCausalLM

    if device != CPU:
        # straight to where it goes, without a copy of everything on the CPU
        options["device_map"] = {"": device}
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    # transformers makes up what it does not find
    if lost := sorted(found["missing_keys"]):
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise UsageError(f"{folder}: config.json asks for {lost[0]}{more}, which is not there: fetch the whole checkpoint")
    return model


def load_to_run(folder: Path, device: str | None) -> PreTrainedModel:
    """The causal LM in `folder` on the device called so; None, `auto`: over all GPUs, and on the CPU what they do not hold."""
    place = choose(device)
    over_all = device in (None, AUTO) and place != CPU
    return load_model(folder, device_map="auto") if over_all else load_model(folder, device=place)


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype of the weights on disk."""
    return config.dtype or torch.float32
