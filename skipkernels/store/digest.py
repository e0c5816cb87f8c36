"""Digests; see `skipkernels.digests`."""

from ..digests import _device_digest, digest_bytes, digest_file, digest_json, digest_tensors, digests

__all__ = ["_device_digest", "digest_bytes", "digest_file", "digest_json", "digest_tensors", "digests"]
