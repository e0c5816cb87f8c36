"""Writing safetensors files: tensor by tensor, so that no more than one is in memory twice.

`safetensors.torch.save_file` writes to a temporary file of its own, which a kill leaves behind, and `save` copies all
tensors. The format is https://github.com/huggingface/safetensors#format: length of the header, header in JSON, bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import BinaryIO

import torch
import xxhash
from torch import Tensor

# In safetensors' order: tensors of the widest dtype come first, so that each is aligned.
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
    """Write tensors as safetensors does, byte for byte.

    Returns:
        The number of bytes, and their digest as `digest_file` computes it.

    Raises:
        TypeError: For a dtype that safetensors does not have.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise TypeError(f"write_tensors: {name} has dtype {tensor.dtype}, which safetensors files do not have.")
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
