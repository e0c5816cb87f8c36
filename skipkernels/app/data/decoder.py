"""A process that decodes image files, with limits of time and pixels, for all threads and commands.

Decoding in this process could be stopped by neither a limit nor Ctrl-C: a file of 200 kB can occupy Pillow for an hour.
A decoder reads requests from its stdin and answers on its stdout. Both are a line of JSON and the bytes that it
announces: the file, if the request has no path; the pixels, if the answer has no error. A decoder ends itself at a
limit, and at the end of its stdin, which this process closes at the latest when it ends.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, BinaryIO

from PIL import Image

from .base import InputError
from .decoding import TooLarge, UnknownFormat, open_image, to_rgb, unreadable

SECONDS = 60.0
"""Longest time to decode an image, far more than the largest takes."""
PIXELS = 178_956_970
"""Most pixels of an image, as in Pillow: 0.5 GiB of RGB."""
_ERRORS = {kind.__name__: kind for kind in (InputError, TooLarge, UnknownFormat)}


class DecoderError(OSError):
    """Error for a decoder that can't start, which is not about an image."""


def decode(source: bytes | str, name: str | Path, *, max_pixels: int = PIXELS, seconds: float = SECONDS) -> Image.Image:
    """Decode an image, the bytes of a file or the path of one, as RGB; see `reading.read_image`.

    Of an image of more than `max_pixels` nothing is decoded.
    """
    path, data = (source, b"") if isinstance(source, str) else (None, source)
    request = {"path": path, "name": str(name), "max_pixels": max_pixels, "seconds": seconds}
    decoder = _take()
    start = time.monotonic()
    try:
        found, pixels = decoder.ask(request, data)
    except (OSError, EOFError, ValueError):  # the process has ended; ValueError: `end`, by another thread
        decoder.end()
        late = time.monotonic() - start >= seconds
        code = decoder.process.returncode
        why = f"decoding takes more than {seconds:g} s" if late else f"its decoder ended with code {code}"
        raise unreadable(name, why) from None
    except BaseException:  # an interruption: the rest of the answer would be taken for the next
        decoder.end()
        raise
    finally:
        decoder.taken.release()
    if "error" in found:
        raise _ERRORS[found["error"]](found["message"])
    return Image.frombytes("RGB", tuple(found["size"]), pixels)


class _Decoder:
    """A process that decodes one image at a time, for the thread that has `taken` it."""

    def __init__(self) -> None:
        self.taken = threading.Lock()
        self.taken.acquire()
        paths = [path for path in sys.path if isinstance(path, str)]  # import ignores others
        # Ctrl-C is for this process
        code = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        code += f"sys.path[:] = {paths!r}; from {__name__} import answer; answer()"
        try:
            command = [sys.executable, "-c", code]
            self.process: Any = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert self.process.stdout is not None
            _receive(self.process.stdout)  # it is ready
        except (OSError, EOFError) as error:
            why = str(error) or "its error is on stderr"
            raise DecoderError(f"{sys.executable!r} can't start a process that decodes images: {why}") from error

    def ask(self, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """Send a request, and receive the answer."""
        _send(self.process.stdin, request, data)
        return _receive(self.process.stdout)

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
            decoder.end()
    decoder = _Decoder()
    _decoders.append(decoder)
    return decoder


@atexit.register
def end_decoders() -> None:
    """End the decoders of this process, also those that are decoding."""
    while _decoders:
        _decoders.pop().end()


def _send(stream: IO[bytes], head: dict[str, Any], data: bytes = b"") -> None:
    stream.write(json.dumps(head | {"bytes": len(data)}).encode() + b"\n")
    stream.write(data)
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """Read what `_send` wrote. EOFError: the stream has ended."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    head = json.loads(line)
    data = stream.read(head["bytes"])
    if len(data) < head["bytes"]:
        raise EOFError
    return head, data


def answer() -> None:
    """Answer requests until stdin ends: what a decoder's process runs."""
    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):  # a library that prints disturbs neither the answers nor the terminal
        os.dup2(null, number)
    Image.MAX_IMAGE_PIXELS = None  # `open_image` has the limit of each request
    _send(stdout, {"ready": True})
    with contextlib.suppress(EOFError):
        while True:
            request, data = _receive(stdin)
            found: dict[str, Any]
            faulthandler.dump_traceback_later(request["seconds"], exit=True)
            try:
                image = _decoded(request, data)
                found, pixels = {"size": image.size}, image.tobytes()
            except InputError as error:
                found, pixels = {"error": type(error).__name__, "message": str(error)}, b""
            faulthandler.cancel_dump_traceback_later()
            _send(stdout, found, pixels)


def _decoded(request: dict[str, Any], data: bytes) -> Image.Image:
    name, max_pixels = request["name"], request["max_pixels"]
    file = io.BytesIO(data) if request["path"] is None else _opened(request["path"], name)
    with file, open_image(file, name, max_pixels) as image:
        return to_rgb(image, name)


def _opened(path: str, name: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise InputError(f"{name}: no such file. Was it removed, or is it a broken link?") from None
    except OSError as error:
        raise InputError(f"{name}: can't be read ({error.strerror}). Replace or remove the file.") from None
