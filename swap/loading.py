"""``optimizer.load_state_dict`` without loss where states are more exact than their parameters.

[Note: types of loaded states] torch gives each state that it loads its parameter's type: of float32
states of a bfloat16 parameter half of the bits would be gone, and the lower half of a master, an
integer, would become nonsense. Where that has happened, the loaded state itself takes the place of
its copy; what the store keeps of it is decided when it is absorbed (``states``).
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch.optim import Optimizer


class ExactLoading:
    """Watches what is loaded into ``optimizer``; ``remove`` takes the hooks off.

    Args:
        exact: whether the states of a parameter are to be what was loaded.
    """

    def __init__(self, optimizer: Optimizer, exact: Callable[[torch.Tensor], bool]) -> None:
        self._exact = exact
        self._loading: Mapping[str, Any] | None = None
        self._hooks = (
            optimizer.register_load_state_dict_pre_hook(self._begin),
            # The user's own hooks see what torch made, and then what is right.
            optimizer.register_load_state_dict_post_hook(self._end, prepend=True),
        )

    def _begin(self, _optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
        self._loading = state_dict

    def _end(self, optimizer: Optimizer) -> None:
        loading, self._loading = self._loading, None
        assert loading is not None
        for parameter, states in _by_parameter(optimizer, loading):
            if not self._exact(parameter):
                continue
            shown = optimizer.state[parameter]
            for name, loaded in states.items():
                cast = shown.get(name)
                if not isinstance(loaded, torch.Tensor) or not isinstance(cast, torch.Tensor):
                    continue
                if cast.dtype != loaded.dtype and name != "step":
                    shown[name] = loaded.to(cast.device)

    def remove(self) -> None:
        """Load as torch does."""
        for hook in self._hooks:
            hook.remove()


def _by_parameter(
    optimizer: Optimizer, loading: Mapping[str, Any]
) -> Iterator[tuple[torch.Tensor, Mapping[str, Any]]]:
    numbers = chain.from_iterable(group["params"] for group in loading["param_groups"])
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for number, parameter in zip(numbers, parameters, strict=True):
        states = loading["state"].get(number)
        if states:
            yield parameter, states
