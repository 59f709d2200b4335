"""Finds a model's blocks: the modules that repeat in a list, without naming any class."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from offload.allocator.errors import ConfigError

_FEW = 4  # a list of this many equal modules is taken as it is; a shorter one may hold a longer


def find_blocks(model: nn.Module, names: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The blocks by name.

    Args:
        model: any module.
        names: blocks, or lists of blocks, by name; without any, each list (children named by
            numbers) in which modules of equal structure repeat gives the ones that repeat.
            A list inside a block is a part of the block; of a short list and a longer one
            inside it (two towers of twelve layers) the longer one is taken.

    Raises:
        ConfigError: a name that the model has not.
    """
    if not names:
        return dict(_search("", model))
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name in names:
        module = modules.get(name)
        if module is None:
            raise ConfigError(
                f"blocks: the model has no module {name!r}; its lists are: "
                f"{', '.join(key for key, one in modules.items() if _is_list(one)) or 'none'}"
            )
        if _is_list(module):
            found |= {f"{name}.{key}": child for key, child in module.named_children()}
        else:
            found[name] = module
    return found


def _search(prefix: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks at and below ``module``."""
    children = [
        (f"{prefix}.{key}" if prefix else key, child) for key, child in module.named_children()
    ]
    inner = [block for name, child in children for block in _search(name, child)]
    own = _repeating(children) if _is_list(module) else []
    if own and (len(own) >= _FEW or len(inner) <= len(own)):
        return own
    return inner


def _is_list(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_children()]
    return bool(names) and all(name.isdigit() for name in names)


def _repeating(children: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    structures = [_structure(child) for _, child in children]
    counts = Counter(structures)
    return [
        block
        for block, structure in zip(children, structures, strict=True)
        if counts[structure] > 1 and any(True for _ in block[1].parameters())
    ]


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """Equal for modules that are built alike."""
    tensors = tuple(
        (name, tuple(tensor.shape), tensor.dtype)
        for name, tensor in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        )
    )
    children = tuple((name, _structure(child)) for name, child in module.named_children())
    return (type(module), tensors, children)
