"""A second device in the memory of the CPU, as strict as a GPU: what lies on it and what does not cannot be mixed.

Run as a script it prunes the embedded model on that device, in memory and layer by layer, and compares with the CPU. It
runs in a process of its own, because a registered backend stays until a process ends. `simulated_device.py FOLDER cuda` does
the same on a real GPU, which the test suite does without.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

# beside a real GPU it would take that one's place
REAL = sys.argv[2:] == ["cuda"]
if not REAL:
    _setup_privateuseone_for_python_backend("sim")
CPU, SIM = torch.device("cpu"), torch.device("cuda" if REAL else "sim", 0)
_ATEN = torch.ops.aten
#: what may take an index, a mask or a source from the CPU, as on CUDA
_MIXING = {_ATEN.copy_, _ATEN.index, _ATEN.index_put_, _ATEN.index_put, _ATEN._index_put_impl_}


class SimTensor(torch.Tensor):
    """A tensor of the device; `data_` holds its values."""

    data_: torch.Tensor

    @staticmethod
    def wrap(data: torch.Tensor) -> SimTensor:
        made: SimTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            SimTensor, data.size(), data.stride(), data.storage_offset(), dtype=data.dtype, device=SIM
        )
        made.data_ = data
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Simulated(TorchDispatchMode):
    """While it is on, tensors can be made on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the values; its results are on the device if its inputs are or if it is told so."""
    if func is _ATEN._fused_sdp_choice.default:
        return 0  # the composite one
    given: list[torch.Tensor] = []
    wrapped: dict[int, SimTensor] = {}

    def values(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            given.append(x)
        if isinstance(x, SimTensor):
            wrapped[id(x.data_)] = x
            return x.data_
        return x

    plain_args, plain = tree_map(values, (args, dict(kwargs)))
    here = [x for x in given if isinstance(x, SimTensor)]
    elsewhere = [x for x in given if not isinstance(x, SimTensor) and x.ndim]
    if here and elsewhere and func.overloadpacket not in _MIXING:
        raise RuntimeError(f"{func} was given tensors on sim:0 and on {elsewhere[0].device}")
    wanted = plain.get("device")
    if wanted is not None:
        on_device = torch.device(wanted).type == "sim"
        plain["device"] = torch.device("cpu") if on_device else wanted
    else:
        # what is written to says where, else any input
        on_device = isinstance(given[0], SimTensor) if func.overloadpacket in _MIXING else bool(here)
    found = func(*plain_args, **plain)

    def placed(x: Any) -> Any:
        if not on_device or not isinstance(x, torch.Tensor):
            return x
        return wrapped[id(x)] if id(x) in wrapped else SimTensor.wrap(x)

    return tree_map(placed, found)


def _empty_strided(size: Any, stride: Any, **options: Any) -> torch.Tensor:
    return SimTensor.wrap(torch.empty_strided(size, stride, dtype=options.get("dtype"), device="cpu"))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    values = [x.data_ if isinstance(x, SimTensor) else x for x in (target, source)]
    values[0].copy_(values[1])
    return target


# where C++ makes a tensor of a list that indexes, no mode is asked
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")


# a backend written in Python has no random numbers of its own
class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return super().__new__(cls, "cpu")


if not REAL:
    torch.Generator = _Generator  # type: ignore[misc]


def compare(folder: Path) -> None:
    """Measure and prune the embedded model on the device and on the CPU, in memory and from the disk; say what is close."""
    import hf_gqaprune as gp
    from hf_gqaprune.checkpoint import resolve_model
    from hf_gqaprune.linalg import obs as curvature
    from hf_gqaprune.linalg import symmetric as factors
    from hf_gqaprune.selection.layer_importance import measure_layers as measure
    from hf_gqaprune.statistics.criteria import CRITERIA

    factors._BLOCK = factors._GPU_BLOCK = curvature._STRIP  # so that matrices have several blocks
    factors._STRIP = factors._GPU_STRIP = 128
    tokenizer = resolve_model("demo").tokenizer
    windows = gp.Calibration.from_text(tokenizer, "demo", samples=16, seq_len=64)
    dense = folder / "dense"

    def everything(device: torch.device) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        model = resolve_model(dense).load().to(device)
        found = {criterion: gp.collect_statistics(model, windows, criterion=criterion) for criterion in CRITERIA}
        yield from ((criterion, measured(statistics)) for criterion, statistics in found.items())
        yield "layer importance", {"scores": torch.tensor(measure(model, windows))}
        statistics = found["curvature"]
        gp.make_plan(statistics, backbone_ratio=0.3, allocation="query_heads", model=model)
        for compensation in ("bias", "least_squares", "natural_gradient"):
            pruned = gp.prune(model, with_biases if compensation == "bias" else plan, statistics, compensation=compensation)
            assert {parameter.device for parameter in pruned.parameters()} == {device}
            yield compensation, weights(pruned)
        result = gp.evaluate_perplexity(pruned, tokenizer, "demo", seq_len=64, max_chars=2000)
        yield "perplexity", {"value": torch.tensor(result.value)}
        streamed = gp.stream_statistics(dense, windows, folder / f"{device.type}-statistics", device=device)
        yield "streamed statistics", measured(streamed)
        target = folder / device.type
        gp.prune_checkpoint(dense, plan, target, streamed, compensation="least_squares", device=device)
        yield "streamed", weights(resolve_model(target).load())
        yield "resumed", measured(resumed(dense, windows, folder / f"{device.type}-resumed", device))
        for where, found in spilled(folder / "spilled", device):
            yield f"spilled to {where}", found

    # the CPU has an attention of its own, which rounds differently
    with nullcontext() if REAL else Simulated(), sdpa_kernel(SDPBackend.MATH):
        model = resolve_model("demo").load(torch.float32)
        model.save_pretrained(dense)
        known = gp.collect_statistics(model, windows)
        plan, with_biases = (gp.make_plan(known, backbone_ratio=0.3, compensation=how) for how in ("none", "bias"))
        for (name, found), (_, wanted) in zip(everything(SIM), everything(CPU), strict=True):
            close(name, found, wanted)
        for name, found, wanted in over_two_devices(dense, windows, plan):
            close(f"{name} over two devices", found, wanted)


def resumed(dense: Path, windows: Any, target: Path, device: torch.device) -> Any:
    """Streamed statistics of a call that was gone on with after each of four that failed, activations on the disk."""
    import hf_gqaprune as gp
    from hf_gqaprune.errors import WorkError
    from hf_gqaprune.streaming import activations
    from hf_gqaprune.streaming import statistics as streamed_statistics

    write, calls = streamed_statistics.write_block, 0

    def failing(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        # a layer's activations are there by now, and its second block will not be
        if calls in (2, 5, 8, 9):
            raise WorkError("the disk is gone")
        write(*arguments)

    memory, activations.host_memory, streamed_statistics.write_block = activations.host_memory, lambda: (1, 0), failing
    try:
        for _ in range(4):
            try:
                gp.stream_statistics(dense, windows, target, device=device, resume=True)
                raise AssertionError("it did not fail")
            except WorkError as error:
                assert "the disk is gone; what was finished is in" in str(error)
        return gp.stream_statistics(dense, windows, target, device=device, resume=True)
    finally:
        activations.host_memory, streamed_statistics.write_block = memory, write


def spilled(folder: Path, device: torch.device) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """What an activation store reads back from the device's memory, the host's and the disk, none with room for all."""
    from hf_gqaprune.streaming import activations as module

    place = folder / device.type
    place.mkdir(parents=True)
    wanted = [torch.full((8,), float(index)) for index in range(1, 7)]
    store = module.ActivationStore(place, device, room=2 * 32)
    arrived: list[Future[torch.Tensor]] = []

    class Copier:
        def submit(self, work: Any, tensor: torch.Tensor) -> Future[torch.Tensor]:
            arrived.append(Future())
            arrived[-1].set_result(work(tensor))
            return arrived[-1]

    if device != CPU:
        store._copier = Copier()  # type: ignore[assignment]
    real, module.host_memory = module.host_memory, lambda: (100, 100 - 32 * len(arrived))  # a quarter stays free
    try:
        sequence = store.keep(tensor.to(device) for tensor in wanted)
        assert len(list(place.rglob("00*"))) == (6 if device == CPU else 2)
        again = store.keep(iter(sequence))
        store.drop_all_but((again.name,))
        for tensors in (again, store.keep(iter(again))):
            assert all(tensor.device == device for tensor in tensors)
            yield "three places", {str(index): tensor.cpu() for index, tensor in enumerate(tensors)}
    finally:
        module.host_memory = real


def over_two_devices(dense: Path, windows: Any, plan: Any) -> Iterator[tuple[str, Any, Any]]:
    """What is measured and pruned of a model whose last layers lie on the device, and of one on the CPU."""
    import hf_gqaprune as gp
    from hf_gqaprune.checkpoint import resolve_model
    from hf_gqaprune.utils.device import dispatch

    whole, parted = resolve_model(dense).load(), resolve_model(dense).load()
    layers = [f"model.layers.{index}" for index in range(len(parted.model.layers))]
    first = ["model.embed_tokens", "model.rotary_emb", *layers[: len(layers) // 2]]
    last = [*layers[len(layers) // 2 :], "model.norm", "lm_head"]
    for name in last:
        parted.get_submodule(name).to(SIM)
    # as `device_map` does it
    dispatch(parted, {**dict.fromkeys(first, "cpu"), **dict.fromkeys(last, str(SIM))})
    for criterion in ("curvature", "taylor"):
        measurements = [gp.collect_statistics(model, windows, criterion=criterion) for model in (parted, whole)]
        yield criterion, measured(measurements[0]), measured(measurements[1])
    statistics = gp.collect_statistics(whole, windows)
    for compensation in ("least_squares", "natural_gradient"):
        pruned = [gp.prune(model, plan, statistics, compensation=compensation) for model in (parted, whole)]
        yield compensation, weights(pruned[0]), weights(pruned[1])
    places = {name: parameter.device for name, parameter in parted.named_parameters()}
    assert {name: parameter.device for name, parameter in pruned[0].named_parameters()} == places
    ids = windows.ids[:2]
    yield "logits", {"logits": pruned[0](ids).logits.detach()}, {"logits": pruned[1](ids).logits.detach()}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def measured(statistics: Any) -> dict[str, torch.Tensor]:
    """The moments and the whole cost of each block; units whose costs are nearly the same may change places."""
    found = {}
    for key, block in statistics.blocks.items():
        found[f"{key} cost"] = block.curve.cost[-1]
        found |= {f"{key} {name}": value for name, value in vars(block.moments).items() if isinstance(value, torch.Tensor)}
    return found


def close(name: str, found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Print `name` if the relative distance of every tensor is that of other orders of summation."""
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        assert type(tensor) is torch.Tensor
        distance, size = float((tensor - wanted[key]).norm()), float(wanted[key].norm())
        assert distance <= 1e-3 * size, (name, key, distance, size)
    print(name)


if __name__ == "__main__":
    compare(Path(sys.argv[1]))
