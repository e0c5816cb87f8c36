"""A process that decodes image files, with limits of time and memory, for all threads and commands.

Decoding in this process could be stopped by neither a limit nor Ctrl-C: a file of 200 kB can occupy Pillow for an hour.
A decoder reads requests from its stdin: a line of JSON, followed by the file if it has no path. It answers with a PPM
file or with a line of JSON that has the error. It ends itself at a limit, and when its stdin is closed: at the latest
when this process ends.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from .base import InputError
from .decoding import TooLarge, UnknownFormat, open_image, to_rgb, unreadable

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SECONDS = 60.0
"""Longest time to decode an image, far more than the largest takes."""
# What a decoder may allocate: itself, with a stack of 8 MiB for a thread on each core, and for each pixel of an image.
_BYTES, _BYTES_PER_PIXEL = (256 + 8 * (os.cpu_count() or 1)) << 20, 24
_ERRORS = {kind.__name__: kind for kind in (InputError, TooLarge, UnknownFormat)}
_PPM = b"P6\n"
_READY = b"ready\n"


def decode(
    source: bytes | str, name: str | Path, *, max_pixels: int | None = None, seconds: float = SECONDS
) -> Image.Image:
    """Decode an image, the bytes of a file or the path of one, as RGB; see `images.read_image`.

    Of more than `max_pixels` nothing is decoded; by default the limit is Pillow's, 179 million.
    """
    if max_pixels is None:
        max_pixels = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else 1 << 40
    request = {"name": str(name), "max_pixels": max_pixels, "seconds": seconds}
    request |= {"path": source} if isinstance(source, str) else {"bytes": len(source)}
    decoder = _take()
    start = time.monotonic()
    try:
        found = decoder.ask(request, b"" if isinstance(source, str) else source)
    except BaseException as error:  # also an interruption: the rest of the answer would be taken for the next
        decoder.end()
        if not isinstance(error, (OSError, EOFError)):
            raise
        late = time.monotonic() - start >= seconds
        code = decoder.process.returncode
        why = f"decoding takes more than {seconds:g} s" if late else f"its decoder ended with code {code}"
        raise unreadable(name, why) from None
    finally:
        decoder.taken.release()
    if isinstance(found, InputError):
        raise found
    return found


class _Decoder:
    """A process that decodes one image at a time, for the thread that has `taken` it."""

    def __init__(self) -> None:
        self.taken = threading.Lock()
        self.taken.acquire()
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import answer; answer()"
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process: Any = subprocess.Popen([sys.executable, "-c", code], **pipes)
        self.process = process
        if process.stdout.readline() != _READY:
            self.end()
            raise RuntimeError(f"decode: {sys.executable} can't import {__name__}. Is Pillow installed there?")

    def ask(self, request: dict[str, Any], data: bytes) -> Image.Image | InputError:
        """Send a request; return the image or the error. EOFError and OSError: the process has ended."""
        stdin, stdout = self.process.stdin, self.process.stdout
        stdin.write(json.dumps(request).encode() + b"\n")
        stdin.write(data)
        stdin.flush()
        head = stdout.readline()
        if head != _PPM:
            if not head.endswith(b"\n"):
                raise EOFError
            kind, message = json.loads(head)
            return _ERRORS[kind](message)
        width, height = map(int, stdout.readline().split())
        stdout.readline()  # largest value, 255
        pixels = bytearray(3 * width * height)
        if stdout.readinto(pixels) < len(pixels):
            raise EOFError
        return Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)

    def end(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError), self.process:  # OSError: the rest of a request can't be sent
            self.process.kill()


_decoders: list[_Decoder] = []


def _take() -> _Decoder:
    """Return a decoder that no other thread uses; a new one if there is none."""
    for decoder in tuple(_decoders):
        if decoder.taken.acquire(blocking=False):
            if decoder.process.poll() is None:
                return decoder
            _decoders.remove(decoder)  # it has ended, or it is another process's, which forked this one
    decoder = _Decoder()
    _decoders.append(decoder)
    return decoder


@atexit.register
def end_decoders() -> None:
    """End the decoders of this process, also those that are decoding."""
    while _decoders:
        _decoders.pop().end()


def answer() -> None:
    """Answer requests until stdin is closed: what a decoder's process runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints does not disturb the answers
    stdout.write(_READY)
    stdout.flush()
    for line in stdin:
        request = json.loads(line)
        faulthandler.dump_traceback_later(request["seconds"], exit=True)
        found: Image.Image | InputError
        try:
            found = _decoded(request, stdin)
        except InputError as error:
            found = error
        faulthandler.cancel_dump_traceback_later()
        if isinstance(found, InputError):
            stdout.write(json.dumps([type(found).__name__, str(found)]).encode() + b"\n")
        else:
            found.save(stdout, "PPM")
        stdout.flush()


def _decoded(request: dict[str, Any], stdin: BinaryIO) -> Image.Image:
    name, max_pixels = request["name"], request["max_pixels"]
    file = _opened(request["path"], name) if "path" in request else io.BytesIO(stdin.read(request["bytes"]))
    Image.MAX_IMAGE_PIXELS = max_pixels / 2  # Pillow's limit is twice that; it warns from there
    _limit_memory(max_pixels)
    with file, open_image(file, name, max_pixels) as image:
        _limit_memory(image.width * image.height)
        return to_rgb(image, name)


def _opened(path: str, name: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise InputError(f"{name}: no such file. Was it removed, or is it a broken link?") from None
    except OSError as error:
        raise InputError(f"{name}: can't be read ({error.strerror}). Replace or remove the file.") from None


def _limit_memory(pixels: int) -> None:
    """Let this process allocate no more than an image of this size takes."""
    if resource is not None:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = _BYTES + _BYTES_PER_PIXEL * pixels
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
