"""What the GPU checks that train through ``offload.attach`` have in common."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gpu_decoder import Shape
from gpu_report import Outcome
from gpu_training import UnderTest
from offload.tiers.accelerator import Accelerator
from offload.tiers.cuda import CudaAccelerator
from offload.tiers.events import ListRecorder, Move
from offload.tiers.simulated.deferred import Deferred

if TYPE_CHECKING:
    from offload.engine import Engine


def place_of(device: UnderTest) -> torch.device:
    """Where its tensors are, to torch."""
    return torch.device("cpu" if device.name == "simulated" else "cuda")


def open_device(device: UnderTest) -> Accelerator:
    """The device as users have it: nothing is poisoned."""
    return device.open() if device.name == "simulated" else CudaAccelerator()


def forget() -> None:
    """Give back what earlier runs left to the allocator, and count from now on."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()  # a budget counts them, too
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(1.0)  # whatever a failed check left


@contextmanager
def attached(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    shape: Shape,
    accelerator: Accelerator,
    config: dict[str, Any] | None = None,
) -> Iterator["Engine"]:
    """An engine that writes down what it moves; inside, the device computes."""
    import offload

    with TemporaryDirectory(dir=".") as folder:
        engine: Engine = offload.attach(
            model,
            optimizer,
            budget=f"host=16GiB,device={shape.budget_nbytes}",
            nvme=Path(folder),
            commit="never",
            accelerator=accelerator,
            config=config,
        )
        engine._journal.recorder = ListRecorder()
        simulated: AbstractContextManager[object] = nullcontext()
        if accelerator.torch_device.type == "cpu":
            simulated = Deferred(accelerator, beside_host=True)
        with engine, simulated:
            yield engine


def moves_there(engine: "Engine", role: str, accelerator: Accelerator) -> int:
    """Pieces of a role's tensors that travelled to the device."""
    recorder = engine._journal.recorder
    assert isinstance(recorder, ListRecorder)
    moves = [event for event in recorder.events if isinstance(event, Move)]
    return sum(move.role == role and move.dst == accelerator.name for move in moves)


def differences(got: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> int:
    """Tensors that are not the same, bit for bit."""
    pairs = zip(got, right, strict=True)
    return sum(not torch.equal(one.cpu(), other.cpu()) for one, other in pairs)


def no_race(
    train: Callable[[Accelerator], Sequence[torch.Tensor]],
    right: Sequence[torch.Tensor],
    device: UnderTest,
    seeds: Sequence[int],
    limit_s: float,
) -> Outcome:
    """The same bits however the streams are held up; no seed begins after ``limit_s``."""
    began_s, ran = time.monotonic(), 0
    for seed in seeds:
        if time.monotonic() - began_s > limit_s:
            break
        forget()
        if wrong := differences(train(device.open_delayed(seed)), right):
            return Outcome(f"{wrong} tensors differ under seed {seed}", holds=False, value=seed)
        ran += 1
    return Outcome(f"the same bits under {ran} seeds", holds=ran > 0, value=ran)
