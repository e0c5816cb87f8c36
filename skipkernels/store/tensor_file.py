"""Writing of safetensors files, tensor by tensor, so that at most one tensor is copied at a time.

`safetensors.torch.save_file` writes its own temporary file, which a kill leaves behind, and `save` copies all tensors.
Format: https://github.com/huggingface/safetensors#format: length of the header, header in JSON, bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import BinaryIO

import torch
import xxhash
from torch import Tensor

# In safetensors' order of tensors: the widest dtype first, so that every tensor is aligned.
DTYPE_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: number for number, dtype in enumerate(DTYPE_NAMES)}


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[int, str]:
    """Write tensors, with the same bytes as safetensors; return the number of bytes and their `digest_file`."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise TypeError(f"write_tensors: {name} has dtype {tensor.dtype}, which safetensors does not have.")
    names = sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        kind, shape = DTYPE_NAMES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()

    def put(data: bytes | memoryview) -> None:
        digest.update(data)
        file.write(data)

    put(len(text).to_bytes(8, "little") + text)
    for name in names:
        put(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return 8 + len(text) + end, digest.hexdigest()
