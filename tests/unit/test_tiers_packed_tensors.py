"""Small tensors inside the record of a commit come back bit for bit."""

import json

import pytest
import torch

from offload.tiers.store import pack_tensor, unpack_tensor

DTYPES = sorted(
    {
        dtype
        for name in dir(torch)
        if isinstance(dtype := getattr(torch, name), torch.dtype)
        # Quantized ones carry scales beside their bytes; those below one byte can't be viewed.
        and not name.startswith(("q", "bits", "bit"))
        and str(dtype).removeprefix("torch.").strip("u") not in {f"int{n}" for n in range(1, 8)}
    },
    key=str,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)], ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_packed_tensors_come_back_bit_for_bit(dtype, shape):
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    raw = (torch.arange(nbytes, dtype=torch.uint8) * 37 + 129) % (2 if dtype is torch.bool else 255)
    tensor = raw.to(torch.uint8).view(dtype).reshape(shape)
    packed = json.loads(json.dumps(pack_tensor(tensor)))
    back = unpack_tensor(packed)
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    assert torch.equal(back.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert back.untyped_storage().resizable() or not nbytes  # memory of its own


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.tensor([float("nan"), float("inf"), -0.0]),
        torch.tensor([1 + 2j, 3 - 4j]).conj(),
        torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        torch.arange(3.0, requires_grad=True),
    ],
    ids=["transposed", "special", "conjugate", "negative", "graph"],
)
def test_packed_views_come_back_by_value(tensor):
    plain = tensor.detach().clone().resolve_conj().resolve_neg()
    back = unpack_tensor(pack_tensor(tensor))
    assert back.shape == plain.shape
    assert back.reshape(-1).view(torch.uint8).tolist() == (
        plain.contiguous().reshape(-1).view(torch.uint8).tolist()
    )
