"""Code that ``torch.compile`` runs as it is, instead of tracing it.

[Note: not traced] Our hooks move bytes and look at what lies where. The compiler would trace them
like the model's own code: run parts of them on stand-ins, guard on the number of saved tensors,
compile again and again, and fail where a transfer has ended meanwhile. A function that is marked
here breaks the graph instead, and neither it nor what it calls is looked at. That is what
``torch.compiler.disable`` does, whose wrapper takes as long as ``pack`` itself.
"""

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import nn
from torch._C._dynamo import eval_frame

_Function = TypeVar("_Function", bound=Callable[..., Any])
_REASON = (
    "Offload fetches weights and takes saved tensors between the modules, which no compiled graph "
    "can do: compile without fullgraph=True, or compile functions of your model that call none of "
    "its modules"
)


def uncompiled(function: _Function) -> _Function:
    """Mark ``function``, so that the compiler runs it, and what it calls, as it is."""
    assert isinstance(function, FunctionType)
    if hasattr(eval_frame, "set_code_exec_strategy"):  # private: may go
        skip = eval_frame._FrameAction.SKIP
        strategy = eval_frame._FrameExecStrategy(skip, skip)
        eval_frame.set_code_exec_strategy(function.__code__, strategy)
    marked: Any = function
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = _REASON
    return function


def forget_compiled() -> None:
    """Have everything compiled again: compiled code doesn't see that hooks have come or gone."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return
    # Private, may go. To reset for nothing takes long: with CUDA it imports the whole compiler.
    if getattr(dynamo.convert_frame, "FRAME_COMPILE_COUNTER", True):
        torch.compiler.reset()


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether ``module`` is what ``torch.compile`` made of another one."""
    return type(module).__name__ == "OptimizedModule"


def plain_module(module: nn.Module) -> nn.Module:
    """``module``, or what was compiled as it: the names of its weights have no prefix."""
    return module.get_submodule("_orig_mod") if is_compiled_wrapper(module) else module


def is_compiled(model: nn.Module) -> bool:
    """Whether calling ``model``, or a module of it, runs code that ``torch.compile`` made."""
    return any(
        is_compiled_wrapper(module) or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
