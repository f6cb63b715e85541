"""Run a checked recovery request and write the merged checkpoint."""

from __future__ import annotations

import functools
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors import SafetensorError

from ..checkpoint import IDENTITY_FILE, LOG_FILE, ModelFolder, fingerprint, resolve_model, write_checkpoint
from ..configuration import RecoveryConfig
from ..errors import UsageError, WorkError
from ..utils import (
    distributed,
    exclusive_lock,
    memory_limit,
    new_folder,
    remove_working_folder,
    write_json,
    write_text,
)
from . import checkpoints
from .best_weights import KeepBest, kept
from .blockwise import EPOCHS, fit_blocks
from .data import TrainingData, load_data
from .distill import Teacher
from .log import CURVE_FILE, plot_curve, training_log
from .merging import ADAPTER, merged, write_adapter_identity
from .models import autocast_bf16, computable_dtype, lora_config, quantization, recompute_activations, training_dtype
from .request import REQUEST_FILE, Request, check_output
from .sft import RecoveryTrainer
from .silence import silenced_libraries
from .steps import Steps, plan_steps
from .teacher_cache import TeacherCache, is_cached, write_cache

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel
    from trl import SFTConfig

#: number of points of the loss curve
_LOG_POINTS = 50
#: folder of the weights with the lowest held-out loss, in the folder of the unfinished training
_BEST = "best"


def train(request: Request) -> Path:
    """Run `request` in this process, or in each process of `accelerate launch`, and return `request.output`."""
    with silenced_libraries(), _limited_threads(request.config.threads), ExitStack() as stack:
        return _train(request, stack)


@contextmanager
def _limited_threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` threads on the CPU (None: as many as before) until the block ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(request: Request, stack: ExitStack) -> Path:
    """Train; locks that must be released at the end are put on `stack`."""
    state = distributed.process_state()
    model = resolve_model(request.model)
    data = load_data(
        model.tokenizer, request.config, vocabulary=model.config.vocab_size, seed=request.seed, evaluation=request.evaluation
    )
    steps = plan_steps(request, len(data.train), state.num_processes)
    base = fingerprint(model) if state.is_main_process else ""
    if state.is_main_process:
        _open_work_folder(request, base, stack)
    state.wait_for_everyone()
    last = checkpoints.latest(request.work)
    state.wait_for_everyone()
    if state.is_main_process:
        checkpoints.remove_incomplete(request.work)

    def finish(checkpoint: Path) -> None:
        if request.config.method == "lora":
            write_adapter_identity(checkpoint, request.model, model.path, base)

    with memory_limit(state.device, _memory_hint(request)):
        trainer = _make_trainer(request, model, data, steps, finish, last is not None)
        started = time.monotonic()
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        seconds = time.monotonic() - started
        if trainer.eval_dataset is not None and not _evaluated_last(trainer):
            trainer.evaluate()
    trained = request.work / (_BEST if trainer.eval_dataset is not None else "trained")
    try:
        if trainer.eval_dataset is None:
            trainer.save_model(str(trained))
        state.wait_for_everyone()
        if state.is_main_process:
            finish(trained)
            log = training_log(request, data, trainer, steps, seconds, kept(trained))
            _write_output(request, model, trained, log)
    except (OSError, SafetensorError) as error:
        raise WorkError(
            f"{request.output} could not be written ({error}; {checkpoints.free_space(request.work)}); the training is kept "
            f"in {request.work}: pass --resume to continue"
        ) from error
    state.wait_for_everyone()
    return Path(request.output)


def _memory_hint(request: Request) -> str:
    """Name the settings that take less of a GPU's memory."""
    config = request.config
    ways = [f"lower device_tokens ({config.device_tokens}) or seq_len ({config.seq_len})"]
    if config.teacher is not None and config.distillation and not config.teacher_cache:
        ways.append("set teacher_cache=true")
    if config.method == "full":
        ways.append("set method=lora")
    elif config.quantize is None:
        ways.append("set quantize=4bit")
    return f"{', or '.join(ways)}, and start again"


def _make_trainer(
    request: Request,
    base: ModelFolder,
    data: TrainingData,
    steps: Steps,
    finish: Callable[[Path], None],
    resumed: bool,
) -> RecoveryTrainer:
    from transformers import PrinterCallback, set_seed

    config = request.config
    # before the adapter is initialized
    set_seed(request.seed)
    model: Any = base.load(training_dtype(base, config), **_quantized_loading(request))
    recompute = recompute_activations(model, config)
    adapter = lora_config(model, config) if config.method == "lora" else None
    dense = None
    if config.teacher is not None and config.blockwise_tokens and not resumed:
        dense = _dense_model(config.teacher)
        model, adapter = _fit_blocks(model, adapter, dense, data, request, steps), None
    tokenizer = base.tokenizer
    if tokenizer.pad_token_id >= base.config.vocab_size:
        # padding added to the tokenizer alone; padded tokens are masked, so that any id will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    trainer = RecoveryTrainer(
        model=model,
        args=_arguments(request, data, steps, recompute),
        train_dataset=data.train.select(range(steps.per_epoch * steps.rows_per_step)),
        eval_dataset=data.held_out,
        processing_class=tokenizer,
        peft_config=adapter,
        weight=config.distillation,
        finish=finish,
    )
    if config.teacher is not None and config.distillation:
        make_dense = functools.partial(_dense_model, config.teacher) if dense is None else lambda: dense
        trainer.teacher = _teacher(trainer, make_dense, request, steps)
    if data.held_out is not None:
        trainer.add_callback(KeepBest(trainer, request.work / _BEST, config.patience))
    # without a terminal it replaces the progress bar and prints every log entry
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(request: Request, data: TrainingData, steps: Steps, recompute: bool) -> SFTConfig:
    from trl import SFTConfig

    config = request.config
    held_out = data.held_out is not None
    eval_steps = math.ceil(steps.total / config.evaluations)
    # the name used by transformers < 5.20 warns in later versions
    names = [field.name for field in fields(SFTConfig)]
    checkpointing = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names)
    return SFTConfig(
        output_dir=str(request.work),
        per_device_train_batch_size=steps.rows,
        # rows of a packed batch arrive as one and could not be told apart
        per_device_eval_batch_size=1 if data.packed else steps.rows,
        gradient_accumulation_steps=steps.accumulation,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=round(config.warmup * steps.total),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=request.seed,
        data_seed=request.seed,
        bf16=autocast_bf16(),
        fp16=False,
        use_cpu=not torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
        # rows are already tokenized, cut and packed
        max_length=None,
        padding_free=data.packed,
        include_num_input_tokens_seen="non_padding",
        logging_steps=max(1, steps.total // _LOG_POINTS),
        logging_nan_inf_filter=False,
        eval_strategy="steps" if held_out else "no",
        eval_steps=eval_steps,
        eval_on_start=held_out,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=math.ceil(steps.total / config.checkpoints),
        save_total_limit=2,
        report_to=list(config.report_to) or "none",
        disable_tqdm=not sys.stderr.isatty(),
        **{checkpointing: recompute},
    )


def _quantized_loading(request: Request) -> dict[str, Any]:
    """Return options of `from_pretrained` for a quantized base, which is read directly to its device."""
    config = quantization(request.config)
    return {} if config is None else {"quantization_config": config, "device_map": {"": distributed.process_state().device}}


def _dense_model(teacher: str) -> PreTrainedModel:
    dense = resolve_model(teacher)
    dtype = torch.bfloat16 if autocast_bf16() else computable_dtype(dense)
    return dense.load(dtype, distributed.process_state().device)


def _teacher(
    trainer: RecoveryTrainer, dense: Callable[[], PreTrainedModel], request: Request, steps: Steps
) -> Teacher | TeacherCache:
    """Return the dense model, or its predictions of every training row, which all processes write to disk together."""
    config = request.config
    if not config.teacher_cache:
        return Teacher(dense(), config.top_k, config.temperature)
    state, cache = distributed.process_state(), request.work / "teacher"
    own = cache / f"{state.process_index}-of-{state.num_processes}"
    if not is_cached(own):
        rows = trainer.train_dataset
        mine = range(state.process_index * steps.rows, len(rows), state.num_processes * steps.rows)
        batches = (trainer.data_collator([rows[i] for i in range(at, min(at + steps.rows, len(rows)))]) for at in mine)
        with _moved_to_host(trainer.model, config):
            write_cache(Teacher(dense(), config.top_k, config.temperature), batches, own, state.device)
    state.wait_for_everyone()
    return TeacherCache(cache, config.temperature)


@contextmanager
def _moved_to_host(model: Any, config: RecoveryConfig) -> Iterator[None]:
    """Move a model to the host's memory, so that the GPU need not hold two; a 4-bit model is small and stays."""
    device = model.device
    moved = device.type == "cuda" and config.quantize is None
    if moved:
        model.to("cpu")
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        if moved:
            torch.cuda.empty_cache()
            model.to(device)


def _fit_blocks(
    model: Any, adapter: LoraConfig | None, dense: PreTrainedModel, data: TrainingData, request: Request, steps: Steps
) -> Any:
    """Return `model`, with its adapter, after block-wise fitting, which is the same in every process."""
    from peft import get_peft_model

    config = request.config
    if adapter is not None:
        model = get_peft_model(model, adapter)
    full = [ids for ids in data.train["input_ids"] if len(ids) == config.seq_len]
    wanted = max(1, config.blockwise_tokens // (EPOCHS * (config.seq_len or 1)))
    if not full:
        raise UsageError(f"blockwise_tokens needs rows of {config.seq_len} tokens: give text, or leave it out")
    model.to(distributed.process_state().device)
    fit_blocks(model, dense, torch.tensor(full[:wanted]), rows=min(steps.rows_per_step, len(full)), seed=request.seed)
    return model


def _open_work_folder(request: Request, base: str, stack: ExitStack) -> None:
    """Create the working folder, or check an existing one, and lock it until `stack` is closed."""
    check_output(request)
    stack.enter_context(exclusive_lock(request.work))
    record = request.work / REQUEST_FILE
    if not (request.resume and record.exists()):
        remove_working_folder(request.work)
    request.work.mkdir(exist_ok=True)
    if not record.exists():
        write_text(record, yaml.safe_dump({**request.to_dict(), "base_fingerprint": base}, sort_keys=False))
    elif yaml.safe_load(record.read_text(encoding="utf-8")).get("base_fingerprint") != base:
        raise UsageError(
            f"the weights in {request.model} are not those that {request.work} was started with: start again with "
            "--overwrite and without --resume"
        )


def _evaluated_last(trainer: RecoveryTrainer) -> bool:
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return bool(steps) and steps[-1] == trainer.state.global_step


def _write_output(request: Request, base: ModelFolder, trained: Path, log: dict[str, Any]) -> None:
    """Write `request.output` in one step, then remove the working folder."""
    adapter = request.config.method == "lora"
    # the trainer's pickled arguments contain local paths
    (trained / "training_args.bin").unlink(missing_ok=True)
    if adapter:
        model = merged(trained, base)
    else:
        model = ModelFolder(trained).load(base.dtype)
    with new_folder(request.output, request.overwrite) as scratch:
        write_checkpoint(model, base.path, scratch)
        write_json(scratch / LOG_FILE, log)
        plot_curve(log, scratch / CURVE_FILE)
        # logs of tensorboard
        if (request.work / "runs").is_dir():
            shutil.copytree(request.work / "runs", scratch / "runs")
        if adapter:
            keep = ("adapter_*", IDENTITY_FILE, "local_base.json")
            (scratch / ADAPTER).mkdir()
            for path in (path for pattern in keep for path in trained.glob(pattern)):
                shutil.copyfile(path, scratch / ADAPTER / path.name)
    remove_working_folder(request.work)
