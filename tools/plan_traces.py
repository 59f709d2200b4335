"""Training steps of transformers, recorded without computing anything: what memory plans are of."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from offload.swap.transients import StepTrace, record_step

Activations = Literal["kept", "recomputed", "swapped"]
_SMALL_NBYTES = 64 << 10  # saved tensors below it are never swapped


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and its batch; ``family`` is gpt2 or llama."""

    family: str
    layers: int
    width: int
    tokens: int = 1024
    batch: int = 1

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.family} {self.layers}x{self.width}, {self.batch}x{self.tokens}"


def record_training(shape: Shape, activations: Activations, *, gradients_leave: bool) -> StepTrace:
    """Forward and backward with every saved activation kept, recomputed by block, or swapped.

    Args:
        gradients_leave: as soon as they are complete, as Offload's do; else they stay to the end.
    """
    with FakeTensorMode():
        model = model_of(shape)
        if activations == "recomputed":
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        if gradients_leave:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        tokens = torch.randint(0, 1000, (shape.batch, shape.tokens))

        def step() -> None:
            with _swapping(model) if activations == "swapped" else contextlib.nullcontext():
                model(input_ids=tokens, labels=tokens).loss.backward()

        return record_step(step)


def model_of(shape: Shape) -> Any:
    """The model of ``shape`` from transformers; call it under ``FakeTensorMode``."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if shape.family == "gpt2":
        # Dropout of attention's own would take the kernel without fused attention on the CPU.
        model = GPT2LMHeadModel(
            GPT2Config(
                n_layer=shape.layers,
                n_embd=shape.width,
                n_head=shape.width // 64,
                n_positions=shape.tokens,
                attn_pdrop=0.0,
                use_cache=False,
            )
        )
        model.loss_type = "ForCausalLM"  # it has none by itself, and takes this one with a warning
        return model
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(
            LlamaConfig(
                num_hidden_layers=shape.layers,
                hidden_size=shape.width,
                intermediate_size=shape.width * 11 // 4 // 64 * 64,
                num_attention_heads=shape.width // 128,
                num_key_value_heads=max(1, shape.width // 512),
                max_position_embeddings=shape.tokens,
                use_cache=False,
            )
        )
    finally:
        torch.set_default_dtype(before)


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


@dataclass(frozen=True)
class _Elsewhere:
    """A saved tensor whose bytes have left the device."""

    dtype: torch.dtype
    nbytes: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextlib.contextmanager
def _swapping(model: nn.Module) -> Iterator[None]:
    """Saved tensors leave at once, and come back whole when backward asks for them."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def pack(saved: torch.Tensor) -> torch.Tensor | _Elsewhere:
        storage = saved.untyped_storage()
        if storage._cdata in weights or storage.nbytes() < _SMALL_NBYTES:
            return saved
        offset = int(saved.storage_offset())
        return _Elsewhere(saved.dtype, storage.nbytes(), saved.size(), saved.stride(), offset)

    def unpack(packed: torch.Tensor | _Elsewhere) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        flat = torch.empty(packed.nbytes // packed.dtype.itemsize, dtype=packed.dtype)
        return flat.as_strided(packed.size, packed.stride, packed.offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
