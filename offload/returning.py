"""Giving weights and states back to ordinary memory when a run is over."""

from offload.swap.states import StateKeeper
from offload.swap.weights import WeightSwapper
from offload.tiers import hostmem


def take_back(weights: WeightSwapper, keeper: StateKeeper | None, budget_nbytes: int) -> bool:
    """Copy what is filed into ordinary memory; False if the budget has no room for all of it.

    Raises:
        TierIOError: the read of a weight that was on its way failed.
    """
    weights.settle()
    filed = [weight for weight in weights.weights.values() if not weight.mapped.held]
    nbytes = sum(weight.nbytes for weight in filed)
    nbytes += keeper.materialised_nbytes() if keeper is not None else 0
    if hostmem.resident_nbytes()[0] + nbytes > budget_nbytes:
        return False
    for weight in filed:
        data = weight.mapped.tensor.clone()
        for parameter in weight.parameters:
            parameter.data = data
    if keeper is not None:
        keeper.materialise()
    return True
