"""``offload run``: an unmodified script under Offload.

[Note: how a script is met] Parameters get their homes in the store as the script builds its
modules (the registration hook of ``offload.init``). The script's optimizer is met when it is
made, and the engine attaches at the first forward of the outermost module that owns its
parameters, through PyTorch's global module hooks. The script itself is run by ``runpy`` with the
arguments, path and ``__main__`` that Python would give it.

[Note: a script that is stopped] With ``stop_after`` the process ends right behind that step: the
record is closed, the store keeps its last commit, output is flushed, and ``os._exit`` follows. An
exception would pass through the script's own ``finally`` and ``with``, and code that catches
everything; what a script does at its end, such as writing its results, must not happen after a part
of its steps.
"""

import contextlib
import os
import runpy
import signal
import sys
import weakref
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from offload.allocator.errors import ConfigError, UnsupportedError
from offload.allocator.units import format_nbytes, format_seconds
from offload.attaching import attach_in
from offload.building import Building
from offload.config import OffloadConfig, make_config
from offload.runtime import Runtime
from offload.swap.buckets import form_of
from offload.swap.uncompiled import plain_module

if TYPE_CHECKING:
    from offload.engine import Engine


class _Session:
    """Waits for the script's model and optimizer, and attaches to them.

    Args:
        stop_after: end the process behind so many steps ([Note: a script that is stopped]).
    """

    def __init__(self, config: OffloadConfig, stop_after: int | None = None) -> None:
        self.config = config
        self._stop_after = stop_after
        self.runtime = Runtime(config)
        self.engine: Engine | None = None
        self._building = Building(self.runtime)
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._attaching = False
        self._plain_init = Optimizer.__init__

    def __enter__(self) -> Self:
        self._building.__enter__()
        session = self

        def remember(self: Optimizer, *args: Any, **kwargs: Any) -> None:
            session._plain_init(self, *args, **kwargs)
            session._optimizers.add(self)

        Optimizer.__init__ = remember  # type: ignore[method-assign]
        self._hooks = [
            register_module_forward_pre_hook(self._on_forward),
            register_module_forward_pre_hook(self._move_inputs),
            register_optimizer_step_pre_hook(self._on_step),
            register_optimizer_step_post_hook(self._behind_step),
        ]
        return self

    def _on_forward(self, module: nn.Module, args: Any) -> None:
        if self.engine is not None or self._attaching or not torch.is_grad_enabled():
            return
        optimizer = self._optimizer_of(module)
        if optimizer is None:
            return
        self._attaching = True
        try:
            self._building._hook.remove()
            # Its weights may be copies of those that were built (``model.bfloat16()``).
            self.engine = attach_in(
                self.runtime, plain_module(module), optimizer, make_config(self.config)
            )
        finally:
            self._attaching = False
        # This forward has begun before the engine's own hooks stood: the pass begins here.
        self.engine._hooks.join_pass(module, args)
        # Global hooks are not given keywords, but the next one may be: torch looks it up here.
        module._forward_pre_hooks_with_kwargs[self._hooks[1].id] = True

    def _move_inputs(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        """What the first forward was called with follows the model to its device."""
        if kwargs is None:
            return None  # not the first one
        del module._forward_pre_hooks_with_kwargs[self._hooks[1].id]
        assert self.engine is not None
        self.engine._replanner.tell_form(form_of((args, kwargs), trains=True))
        computing = self.engine.computing
        return computing and computing.enter(module, args, kwargs, outermost=True)

    def _optimizer_of(self, module: nn.Module) -> Optimizer | None:
        """The optimizer all of whose parameters belong to ``module``."""
        owned = set(module.parameters())
        for optimizer in self._optimizers:
            parameters = {p for group in optimizer.param_groups for p in group["params"]}
            if parameters and parameters <= owned:
                return optimizer
        return None

    def _on_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if self.engine is None or optimizer is self.engine.optimizer:
            return
        owned = {p for group in optimizer.param_groups for p in group["params"]}
        if owned & set(self.engine.model.parameters()):
            raise UnsupportedError(
                "a second optimizer steps parameters of the same model: offload run handles one "
                "optimizer a model; put its parameters into groups of one optimizer"
            )

    def _behind_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        """Global hooks run behind the optimizer's own: the step is in the store."""
        engine = self.engine
        if engine is None or optimizer is not engine.optimizer:
            return
        if self._stop_after is not None and engine.stats.steps >= self._stop_after:
            engine._detach("stopped")
            sys.stderr.write(f"offload: stopped behind step {engine.step}, as asked\n")
            self.tell_lost_record()
            _end_process()

    def summary(self) -> str:
        """The plan against what was measured, as a line; empty where nothing was trained."""
        if self.engine is None or not (stats := self.engine.stats).steps:
            return ""
        plan = self.engine.plan
        return (
            f"plan against measured: at most {format_nbytes(plan.budget_nbytes)}, peak "
            f"{format_nbytes(stats.peak_nbytes)} ({stats.peak_nbytes / plan.budget_nbytes:.0%}); "
            f"{stats.steps} steps of {format_seconds(stats.step_s)}, of which stall "
            f"{format_seconds(stats.stall_s)}"
        )

    def tell_lost_record(self) -> None:
        """Say so where not all is in the record, and why."""
        if (failure := self.runtime.journal.recorder.failure) is not None:
            sys.stderr.write(
                f"offload: the record in {self.runtime.config.record} ends early "
                f"({failure.strerror}), the run went on: free some of that disk, or name another "
                "directory with --record\n"
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        Optimizer.__init__ = self._plain_init  # type: ignore[method-assign]
        for hook in self._hooks:
            hook.remove()
        if self.engine is None:
            self._building.__exit__(kind, error, trace)
            if error is None:
                self.runtime.close()
            return
        self.engine.__exit__(kind, error, trace)


def launch(
    config: OffloadConfig,
    target: str,
    argv: list[str],
    *,
    is_module: bool,
    stop_after: int | None = None,
) -> int:
    """Run a script or module under Offload; returns its exit code.

    Args:
        target: path of the script, or name of the module.
        argv: the script's own arguments.
        stop_after: end the process with exit code 0 right behind so many steps; nothing that the
            script would do after them happens ([Note: a script that is stopped]).

    Raises:
        OffloadError: Offload itself can't go on; the script's own errors pass through.
    """
    if is_module and not target:
        raise ConfigError("-m needs the name of a module")
    previous = signal.signal(signal.SIGTERM, _terminate)
    saved_argv, saved_path = sys.argv, list(sys.path)
    sys.argv = [target, *argv]
    sys.path[0] = str(Path.cwd()) if is_module else str(Path(target).resolve().parent)
    session = _Session(config, stop_after)
    try:
        with session:
            if is_module:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(target, run_name="__main__")
    except SystemExit as exit_request:
        if code := _exit_code(exit_request):
            return code
    finally:
        signal.signal(signal.SIGTERM, previous)
        sys.argv, sys.path[:] = saved_argv, saved_path
        session.tell_lost_record()
    if summary := session.summary():
        sys.stderr.write(f"offload: {summary}\n")
    return 0


def _end_process() -> None:
    """End without anything that Python, or the script, would do at the end."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    os._exit(0)


def _terminate(number: int, _frame: FrameType | None) -> None:
    """SIGTERM ends the script as an exception would: what is not committed is discarded."""
    raise SystemExit(128 + number)


def _exit_code(request: SystemExit) -> int:
    if request.code is None:
        return 0
    if isinstance(request.code, int):
        return request.code
    sys.stderr.write(f"{request.code}\n")
    return 1
