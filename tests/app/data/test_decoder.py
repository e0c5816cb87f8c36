"""The process that decodes images: its limits, its end, and its use by threads and forked processes."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader

from skipkernels.app.data import decoder
from skipkernels.app.data.decoder import decode
from skipkernels.app.data.images import Images
from skipkernels.app.data.reading import read_image
from tests.app.data.pictures import class_of, decoders, draw_image, encoded, raises_input_error, slow_picture

PICTURE = encoded(Image.new("RGB", (3, 2), "red"))


def tile(side: int, channels: int = 1) -> bytes:
    """A TIFF of 64 x 64 pixels in one larger tile."""
    writer = zlib.compressobj()
    block = writer.compress(bytes(1 << 20)) + writer.flush(zlib.Z_FULL_FLUSH)  # the next block does not refer to it
    again = writer.compress(bytes(1 << 20)) + writer.flush(zlib.Z_FULL_FLUSH)
    data = block + again * (side * side * channels >> 20)
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1 if channels == 1 else 2, 277: channels}
    tags |= {322: side, 323: side, 324: 8, 325: len(data)}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + fields + bytes(4)


def test_header_is_refused():
    """Decoding this takes 2.3 GiB."""
    start = time.monotonic()
    with raises_input_error("a", "must have at most"):
        decode(tile(46_000), "a")
    assert time.monotonic() - start < 5  # 0.1 s on an idle machine


def test_limit_of_pixels():
    assert decode(PICTURE, "a", max_pixels=6).size == (3, 2)
    with raises_input_error("a: must have at most 5 pixels. Make it smaller."):
        decode(PICTURE, "a", max_pixels=5)


def test_limit_of_time():
    with raises_input_error("a: can't be read as an image (decoding takes more than 0.2 s)"):
        decode(slow_picture(), "a", seconds=0.2)
    assert decode(PICTURE, "b").getpixel((2, 1)) == (255, 0, 0)


def kill_decoders() -> None:
    for process in decoders():
        os.kill(process, signal.SIGKILL)


def test_crash_is_an_error_of_the_image():
    decode(PICTURE, "the decoder starts here")
    threading.Timer(0.2, kill_decoders).start()
    with raises_input_error("a: can't be read as an image (its decoder ended with code -9)"):
        decode(slow_picture(), "a")
    assert decode(PICTURE, "a").size == (3, 2)


def test_end_by_another_thread_is_an_error_of_the_image(monkeypatch):
    def send(*arguments):
        decoder.end_decoders()
        real(*arguments)

    real = decoder._send
    monkeypatch.setattr(decoder, "_send", send)
    with raises_input_error("a: can't be read as an image (its decoder ended with code -9)"):
        decode(PICTURE, "a")


def test_decoder_that_was_ended_is_replaced(monkeypatch):
    monkeypatch.setattr(sys, "path", [Path("ignored"), *sys.path])  # by import
    decode(PICTURE, "a")
    pipes = [pipe for each in decoder._decoders for pipe in (each.process.stdin, each.process.stdout)]
    kill_decoders()
    for each in decoder._decoders:
        each.process.wait(10)
    assert decode(PICTURE, "a").size == (3, 2)
    assert pipes and all(pipe.closed for pipe in pipes)


def test_relative_path_after_a_change_of_folder(tmp_path, monkeypatch):
    draw_image(tmp_path / "inner" / "0.png", 3)
    decode(PICTURE, "the decoder starts here")
    monkeypatch.chdir(tmp_path)
    assert class_of(read_image("inner/0.png")) == 3


def test_threads_and_forked_processes_have_their_own(tmp_path):
    for label in range(8):
        draw_image(tmp_path / f"{label}.png", label)
    images = Images.of_files(tmp_path, [f"{label}.png" for label in range(8)], range(8)).with_transform(class_of)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(images.__getitem__, range(8))) == [(label, label) for label in range(8)]
    many = images.subset(list(range(8)) * 50)
    for found, labels in DataLoader(many, batch_size=50, num_workers=2, multiprocessing_context="fork"):
        assert found.equal(labels)
    assert images[5] == (5, 5)


def test_ends_with_its_parent():
    """Also if the parent is killed; and torch, which takes seconds to import, is not imported."""
    code = f"import sys, time; from skipkernels.app.data import decoder; decoder.decode({PICTURE!r}, 'a');"
    code += "print(sorted(sys.modules), flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert not {"torch", "numpy"} & set(eval(parent.stdout.readline()))
        (process,) = decoders(parent.pid)
        child = Path(f"/proc/{process}")
        parent.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 30
        while child.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
