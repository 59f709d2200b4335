"""A training script runs until its first backward, with a model that has no bytes.

[Note: a model without bytes] Each parameter becomes a fake tensor as its module registers it, so
that at most one is in memory. The script's optimizer is met when it is made, its model at the first
forward of a module that owns the optimizer's parameters; from there on everything is fake until
backward has ended, and the process with it: by ``os._exit``, so that nothing of what the script
does at its end happens, behind a ``finally`` neither. What Offload itself would do for the script
is left out.

Run as ``python -m offload.planner.trace_script OUT STATES MASTERS REBUILD script.py args…``, with
the settings of ``Precision`` and the smallest storage to rebuild (or ``off``); writes OUT, a JSON
file.
"""

import contextlib
import dataclasses
import json
import os
import runpy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_pre_hook,
    register_module_parameter_registration_hook,
)
from torch.optim import Optimizer

import offload
import offload.attaching  # a run has it: what it imports is no memory of the script
from offload.allocator.errors import ConfigError, OffloadError
from offload.planner.script_memory import Held, ScriptMemory
from offload.swap.planning.program import Program
from offload.swap.planning.tracing import ON_VALUES, Tracer, fake_mode, trace_step
from offload.swap.state_precision import EXACT, Precision
from offload.swap.uncompiled import plain_module


class _Tracer(Tracer):
    """Ends the process where values are asked for: the script is not to handle that either."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except ON_VALUES as error:
            _end(self.needs_values(error))


class _NoEngine:
    """What a script that calls ``offload.attach`` gets meanwhile."""

    step = 0
    resumed = False

    def __init__(self) -> None:
        self.extra: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        pass


class Session:
    """Waits for the script's model and optimizer, and traces their first step.

    Args:
        finish: takes the program of the step, and what the script holds; does not come back.
        memory: measures that.
        precision: of what the optimizer keeps.
        rebuild_nbytes: as of ``Tracer``.
    """

    def __init__(
        self,
        finish: Callable[[Program, Held], NoReturn],
        memory: ScriptMemory,
        precision: Precision = EXACT,
        rebuild_nbytes: int | None = None,
    ) -> None:
        self._finish = finish
        self._memory = memory
        self._precision = precision
        self._rebuild_nbytes = rebuild_nbytes
        self._mode = fake_mode()
        self._stack = ExitStack()
        self._optimizers: list[Optimizer] = []
        self._tracer: _Tracer | None = None

    def __enter__(self) -> Self:
        session, plain_init = self, Optimizer.__init__
        plain_backward, plain_function = torch.Tensor.backward, torch.autograd.backward

        def remember(self: Optimizer, *args: Any, **kwargs: Any) -> None:
            plain_init(self, *args, **kwargs)
            session._optimizers.append(self)

        def backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            run: Any = plain_backward
            session._backward(lambda: run(self, *args, **kwargs))

        def function(*args: Any, **kwargs: Any) -> None:
            session._backward(lambda: plain_function(*args, **kwargs))

        self._replace(Optimizer, "__init__", remember)
        self._replace(torch.Tensor, "backward", backward)
        self._replace(torch.autograd, "backward", function)
        self._replace(offload, "attach", lambda *_args, **_kwargs: _NoEngine())
        self._replace(offload, "init", lambda **_kwargs: nullcontext())
        self._replace(offload, "load_pretrained", _build)
        hooks = (
            register_module_parameter_registration_hook(self._on_register),
            register_module_forward_pre_hook(self._on_forward),
        )
        for hook in hooks:
            self._stack.callback(hook.remove)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def _on_register(self, _module: nn.Module, _name: str, parameter: Any) -> Any:
        if parameter is None or hasattr(parameter, "fake_mode") or parameter.is_meta:
            return None
        return self._mode.from_tensor(parameter)

    def _on_forward(self, module: nn.Module, arguments: Any) -> None:
        optimizer = None if self._tracer else self._optimizer_of(module)
        if optimizer is None or not torch.is_grad_enabled():
            return
        self._held = self._memory.measure()
        model = plain_module(module)
        for child in model.modules():
            for name, buffer in child._buffers.items():
                if buffer is not None and not hasattr(buffer, "fake_mode"):
                    child._buffers[name] = self._mode.from_tensor(buffer)
        self._optimizer, self._tokens = optimizer, _tokens_of(arguments)
        self._stack.enter_context(self._mode)
        self._tracer = _Tracer(model, rebuild_nbytes=self._rebuild_nbytes)
        self._stack.enter_context(self._tracer.running())
        self._tracer.join_forward()

    def _optimizer_of(self, module: nn.Module) -> Optimizer | None:
        owned = set(module.parameters())
        for optimizer in self._optimizers:
            stepped = {each for group in optimizer.param_groups for each in group["params"]}
            if stepped and stepped <= owned:
                return optimizer
        return None

    def _backward(self, run: Any) -> None:
        if self._tracer is None:
            run()
            return
        self._tracer.backward(run)
        program = self._tracer.program(self._tokens, self._optimizer, self._precision)
        self._finish(program, self._held)


def _build(path: str | Path, *, dtype: torch.dtype | None = None, **_kwargs: object) -> nn.Module:
    """The model of ``offload.load_pretrained``, without its weights."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    built: nn.Module = model.eval()
    return built


def _tokens_of(arguments: Any) -> int:
    tensors = [one for one in arguments if isinstance(one, torch.Tensor)]
    return max((one.numel() for one in tensors if not one.is_floating_point()), default=1)


def trace_script(
    script: Path,
    finish: Callable[[Program, Held], NoReturn],
    precision: Precision = EXACT,
    rebuild_nbytes: int | None = None,
) -> NoReturn:
    """Run ``script`` until its first backward.

    Raises:
        ConfigError: it ended without one.
        UnsupportedError: what it computes needs values.
    """
    sys.path[0] = str(script.resolve().parent)
    _trace_something()
    memory = ScriptMemory()
    session = Session(finish, memory, precision, rebuild_nbytes)
    with contextlib.suppress(SystemExit), memory, session:
        runpy.run_path(str(script), run_name="__main__")
    raise ConfigError(
        f"{script} ended without a backward of a model whose parameters an optimizer steps"
    )


def _trace_something() -> None:
    """Have all in memory that tracing takes, before it is measured what the script takes."""
    with fake_mode():
        model = nn.Linear(1, 1)
        trace_step(
            model,
            lambda model: model(torch.zeros(1, 1)).sum(),
            tokens=1,
            optimizer=torch.optim.AdamW(model.parameters()),
        )


def main() -> NoReturn:
    """Trace, and write what was found."""
    out, states, masters, rebuild, script, *arguments = sys.argv[1:]
    settings: Any = {"states": states, "masters": masters}
    sys.argv = [script, *arguments]

    def finish(program: Program, held: Held) -> NoReturn:
        content = {"program": program.to_json(), "held": dataclasses.asdict(held)}
        Path(out).write_text(json.dumps(content), encoding="utf-8")
        _end(None)

    output: AbstractContextManager[Any] = contextlib.redirect_stdout(sys.stderr)
    try:
        with output:
            trace_script(
                Path(script),
                finish,
                Precision(**settings),
                None if rebuild == "off" else int(rebuild),
            )
    except OffloadError as error:
        _end(error)


def _end(error: OffloadError | None) -> NoReturn:
    """End the process; an error is its last word."""
    if error is not None:
        sys.stderr.write(f"\n{error}\n")
    sys.stderr.flush()
    os._exit(0 if error is None else error.exit_code)


if __name__ == "__main__":
    main()
