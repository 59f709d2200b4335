"""Taking a model's weights over: from memory, from where they were built, or from a commit."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from offload.allocator.errors import ConfigError, StoreMismatchError, UnsupportedError
from offload.building import built_weight, claim
from offload.runtime import Runtime
from offload.swap.census import named_weights, unmovable_reason
from offload.swap.gradients import gradient_nbytes
from offload.swap.optim_kinds import state_nbytes
from offload.swap.state_precision import EXACT, Precision
from offload.swap.weights import Weight, WeightSwapper
from offload.tiers.mapped import MappedTensor


def signature_of(
    model: nn.Module, optimizer: Optimizer | None, precision: Precision = EXACT
) -> dict[str, Any]:
    """What must agree for a store to be continued: weights, kind of optimizer, its states'."""
    return {
        **({} if precision.states == "exact" else {"state_precision": precision.states}),
        **({} if precision.masters == "none" else {"master_weights": precision.masters}),
        "weights": {
            name: [str(parameters[0].dtype).removeprefix("torch."), list(parameters[0].shape)]
            for name, parameters in named_weights(model)
        },
        "optimizer": type(optimizer).__name__ if optimizer is not None else None,
    }


def check_resume(runtime: Runtime, signature: dict[str, Any]) -> bool:
    """Whether to continue the store's last commit, as the settings ask.

    Raises:
        ConfigError: ``resume="must"`` and there is nothing to continue.
        StoreMismatchError: the commit is of another model or optimizer.
    """
    store, resume = runtime.store, runtime.config.resume
    if store.committed is None:
        if resume == "must":
            raise ConfigError(
                f"resume='must', but {store.directory} holds no commit: "
                "check nvme=, or pass resume='auto'"
            )
        return False
    if resume == "never":
        store.forget()
        return False
    found = store.committed.signature
    if found == signature:
        return True
    raise StoreMismatchError(
        f"the store {store.directory} belongs to another run: {_difference(found, signature)}; "
        "pass another directory with nvme=, or resume='never' to discard it"
    )


def _difference(found: Any, expected: dict[str, Any]) -> str:
    if found["optimizer"] != expected["optimizer"]:
        return f"its optimizer is {found['optimizer']}, this one is {expected['optimizer']}"
    stored, present = found["weights"], expected["weights"]
    for setting, default in (("state_precision", "exact"), ("master_weights", "none")):
        there, here = (one.get(setting, default) for one in (found, expected))
        if there != here:
            return f"its {setting} is {there}, this one's is {here} (set it to {there!r})"
    for name in sorted({*stored, *present}):
        if stored.get(name) != present.get(name):
            return f"{name} is {stored.get(name)} there, {present.get(name)} here"
    return "its weights come in another order"


def adopt_weights(
    model: nn.Module, runtime: Runtime, weights: WeightSwapper, *, resuming: bool
) -> dict[nn.Parameter, Weight]:
    """Give every weight its home in the store and its stable address; by parameter.

    Weights in memory move one by one, so their memory goes as the store grows.

    Call ``reserve_room`` before: nothing here may fail for want of room.
    """
    by_parameter: dict[nn.Parameter, Weight] = {}
    for name, parameters in named_weights(model):
        if parameters[0].numel() == 0:
            continue
        weight = _adopt(name, parameters, runtime, resuming=resuming)
        weights.add(weight)
        for parameter in parameters:
            _give_memory(parameter, weight)
            by_parameter[parameter] = weight
    return by_parameter


def _give_memory(parameter: nn.Parameter, weight: Weight) -> None:
    """``parameter`` is at the stable address of ``weight``, its gradient beside it."""
    gradient = parameter.grad
    if gradient is not None and not parameter.is_cpu:
        parameter.grad = None
        parameter.data = weight.mapped.tensor
        parameter.grad = gradient.cpu()
    else:
        parameter.data = weight.mapped.tensor


def check_unchanged(model: nn.Module, adopted: Mapping[nn.Parameter, Weight]) -> None:
    """Raise unless the model has the parameters that were adopted, where they were.

    Raises:
        UnsupportedError: naming those that are new, gone or elsewhere, and what to do.
    """
    present = {one: name for name, one in model.named_parameters() if one.numel()}
    problems = [
        f"{name} {tuple(one.shape)} ({one.nbytes} bytes) is new"
        for one, name in present.items()
        if one not in adopted
    ]
    for one, weight in adopted.items():
        if one not in present:
            problems.append(f"{weight.name} is gone")
        elif one.data_ptr() != weight.mapped.address:
            problems.append(f"the .data of {weight.name} was replaced (copy into it instead)")
    if problems:
        raise UnsupportedError(
            "the model's parameters changed after attach, so no step was taken: "
            + "; ".join(problems[:5])
            + ". Call engine.detach(), make the changes, then attach with another nvme= directory"
        )


def refuse_unmovable(model: nn.Module, *, on_device: bool = False) -> None:
    """Raise unless every weight can be given a home.

    Args:
        on_device: weights may be on the device that the model computes on.

    Raises:
        UnsupportedError: naming the weights that can't, and why.
    """
    problems = [
        f"{name} {reason}"
        for name, parameter in model.named_parameters()
        if (reason := unmovable_reason(parameter, on_device=on_device)) is not None
    ]
    if problems:
        raise UnsupportedError("weights that can't be moved exactly: " + "; ".join(problems[:5]))


def reserve_room(model: nn.Module, optimizer: Optimizer | None, runtime: Runtime) -> None:
    """Meet a full disk now, before anything moves, rather than in the middle of a step.

    Two slots for what is trained and for its states (one if nothing is ever committed), one for
    what is frozen, and scratch for the gradients that move. A resumed store has its first slots
    already.

    Raises:
        CapacityError: the disk has not enough room.
    """
    absent = trained = gradients = 0
    extent_nbytes = runtime.store.tier.extent_nbytes
    for _, (source, *others) in named_weights(model):
        nbytes = extent_nbytes(source.nbytes)
        if built_weight(source) is None:
            absent += nbytes
        if any(parameter.requires_grad for parameter in (source, *others)):
            trained += nbytes
            if moved := gradient_nbytes(source):
                gradients += extent_nbytes(moved)
    states = 0
    if optimizer is not None:
        states = state_nbytes(optimizer, extent_nbytes, precision=runtime.precision)
    if runtime.store.committed is not None:
        needed = trained + states
    elif runtime.config.commit == "never":
        needed = absent + states
    else:
        needed = absent + trained + 2 * states
    runtime.store.tier.reserve_room(needed)
    runtime.gradient_scratch.reserve_room(gradients)


def _adopt(
    name: str, parameters: list[nn.Parameter], runtime: Runtime, *, resuming: bool
) -> Weight:
    store, source = runtime.store, parameters[0]
    built = built_weight(source)
    if built is not None and not resuming:
        claim(built)
        built.seal()
        store.rename(built.stored, name)
        return Weight(name, parameters, built.stored, built.mapped)
    chunk_nbytes = runtime.chunk_numel * source.dtype.itemsize
    stored = store.add(name, source.dtype, tuple(source.shape), chunk_nbytes)
    if resuming:
        store.restore(stored)
    else:
        store.write(stored, source.data.cpu())
    mapped = MappedTensor(store.tier.file, source.dtype, source.shape)
    assert stored.current is not None
    mapped.file_as(stored.current)
    runtime.governor.watch(mapped)
    return Weight(name, parameters, stored, mapped)
