"""How long a model is attached: until ``detach``, the end of a ``with``, or the interpreter's.

A process that is forked meanwhile ends nothing: store, files and threads are its parent's.
"""

import atexit
import os
import sys
import weakref
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self

from torch import nn

attached_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Attachment(ABC):
    """A context manager that ends once, whatever ends it.

    Attributes:
        model: what is attached.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._attached = False

    def _hold(self) -> None:
        """Everything stands: from now on there is something to end."""
        self._attached = True
        self._process = os.getpid()
        attached_models.add(self.model)
        self._at_exit = weakref.WeakMethod(self._exit)
        atexit.register(_call, self._at_exit)

    @abstractmethod
    def _end(self, status: str) -> None:
        """Leave the model to itself; called once.

        Args:
            status: ``done``, or why the run ends: ``failed``, ``interrupted``, ``stopped``,
                ``ended``. Whoever is not done does not use the model any more.
        """

    def detach(self) -> None:
        """Take the hooks off and give the store back; safe to call twice.

        Weights and optimizer states (float32 again if they are rounded in the store) become
        ordinary tensors where the budget has room for them. Where it has not, they stay mapped
        from the store, whose lock is kept until the process ends. Of a step that was interrupted
        nothing is given back: start the process again.
        """
        self._detach("done")

    def _detach(self, status: str) -> None:
        if self._attached:
            self._attached = False
            if self._process != os.getpid():
                return
            attached_models.discard(self.model)
            self._end(status)

    def _exit(self) -> None:
        """The interpreter ends: there is no one left to use the model."""
        self._detach("failed" if hasattr(sys, "last_value") else "ended")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, SystemExit):
            self._detach("done")
        else:
            self._detach("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")


def _call(method: weakref.WeakMethod[Any]) -> None:
    bound = method()
    if bound is not None:
        bound()
