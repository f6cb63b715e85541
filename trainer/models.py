"""A folder or Hub id goes in; the model, its tokenizer and what of it LoRA adapts come out."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..devices import AUTO, CPU, choose
from ..errors import UsageError, unknown
from ..shards import Checkpoint
from .presets import Settings

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedConfig, PreTrainedModel

#: above so many parameters activations are recomputed instead of kept
_LARGE = 1_000_000_000


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
        from .. import demo

        return demo.model_path()
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


def check_weights(folder: Path) -> None:
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


def training_dtype(config: PreTrainedConfig, settings: Settings) -> torch.dtype:
    """What the weights are held in while they train.

    All weights need float32: an update is smaller than a half-precision weight can show. A frozen base stays as it
    is, but for float16, whose activations overflow without loss scaling.
    """
    return torch.float32 if settings.method == "full" else computable_dtype(config)


def computable_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype on disk, float32 for float16."""
    stored = stored_dtype(config)
    return torch.float32 if stored == torch.float16 else stored


def autocast_bf16() -> bool:
    """Whether the accelerator in use computes in bfloat16; the CPU is left in float32, where that is faster."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def quantization(settings: Settings) -> Any:
    """`BitsAndBytesConfig` for `quantize`, None without. Raises [`UsageError`] where bitsandbytes is missing."""
    if settings.quantize is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("quantize=4bit needs bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def check_trackers(settings: Settings) -> None:
    """Raise [`UsageError`] for a tracker in `report_to` that transformers does not know or that is not installed."""
    if not settings.report_to:
        return
    from transformers.integrations import integration_utils

    for name in settings.report_to:
        if name not in integration_utils.INTEGRATION_TO_CALLBACK:
            raise unknown("tracker in report_to:", name, integration_utils.INTEGRATION_TO_CALLBACK)
        if name not in integration_utils.get_available_reporting_integrations():
            raise UsageError(f"report_to={name} needs {name}: pip install {name}")


def lora_targets(model: PreTrainedModel) -> list[str]:
    """Names, within their layer, of all linear modules that the decoder layers hold: `["mlp.down_proj", ...]`, sorted.

    Raises:
        UsageError: there is none.
    """
    layers = model.get_decoder().layers
    names = {name for layer in layers for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    if not names:
        raise UsageError(f"{type(model).__name__} has no linear module in its decoder layers for LoRA to adapt")
    return sorted(names)


def lora_config(model: PreTrainedModel, settings: Settings) -> LoraConfig:
    """peft's configuration for `model`."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        target_modules=lora_targets(model),
    )


def recompute_activations(model: PreTrainedModel, settings: Settings) -> bool:
    """Whether to trade time for memory."""
    if settings.activation_checkpointing is not None:
        return settings.activation_checkpointing
    return model.num_parameters() >= _LARGE
