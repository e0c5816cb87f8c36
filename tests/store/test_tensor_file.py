"""Writing of safetensors files."""

from __future__ import annotations

import io
import tracemalloc

import pytest
import torch
from safetensors.torch import load, save

from skipkernels.store.digest import digest_bytes
from skipkernels.store.tensor_file import DTYPE_NAMES, write_tensors


def written(tensors, metadata) -> bytes:
    file = io.BytesIO()
    size, digest = write_tensors(file, tensors, metadata)
    data = file.getvalue()
    assert (size, digest) == (len(data), digest_bytes(data))
    return data


@pytest.mark.parametrize("metadata", [{}, {"shard": '7 of "é"'}])
def test_write_tensors_has_the_bytes_of_safetensors(metadata):
    tensors = {f"{name}{i}": torch.full((3, i), 2).to(dtype) for i, dtype in enumerate(DTYPE_NAMES) for name in "bé"}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "transposed": torch.rand(3, 5).T}
    data = written(tensors, metadata)
    assert data == save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata or None)
    assert load(data)["transposed"].equal(tensors["transposed"])


def test_write_tensors_shared_memory():
    weight = torch.rand(4)
    assert all(tensor.equal(weight) for tensor in load(written({"a": weight, "b": weight}, {})).values())


def test_write_tensors_unsupported_dtype():
    with pytest.raises(TypeError, match="write_tensors: x has dtype torch.complex128, which safetensors does not"):
        write_tensors(io.BytesIO(), {"x": torch.ones(1, dtype=torch.complex128)}, {})


def test_write_tensors_does_not_copy():
    weight = torch.ones(1 << 20)
    tracemalloc.start()
    try:
        with open("/dev/null", "wb") as file:
            write_tensors(file, {"weight": weight}, {})
        assert tracemalloc.get_traced_memory()[1] < weight.nbytes / 4
    finally:
        tracemalloc.stop()
