"""Measure the requests per second that `skipkernels serve` answers.

    python -m bench.serve runs/photos
    python -m bench.serve runs/photos --clients 1 8 --images 16 --nearest 0

The server runs in its own process, on the same machine as the clients. Each client keeps a connection, and sends its
next request when it has the answer. The answers are compared first: the same image must get the same classes in each.
The images are synthetic JPEGs of the size of a picture of the web (500 x 375) and of a camera (4000 x 3000). Appends to
bench/results/DEVICE/serve.csv.
"""

from __future__ import annotations

import http.client
import io
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from . import measure
from .inputs import positive

_SIZES = ((500, 375), (4000, 3000))
_BOUNDARY = "boundary-of-parts"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = measure.command(__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 4], help="that send requests at a time")
    parser.add_argument("--images", type=positive, nargs="+", default=[1, 16], help="in a request, at most 16")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--nearest", type=int, default=4, help="training images shown with each result")
    args = parser.parse_args(arguments)
    args.device = measure.default_device()
    rows = []
    command = [sys.executable, "-m", "skipkernels", "serve", str(args.run), "--port", "0", "--rate", str(10**9)]
    with subprocess.Popen([*command, "--nearest", str(args.nearest)], stdout=subprocess.PIPE, text=True) as server:
        try:
            host = urlsplit(next(word for word in server.stdout.readline().split() if "://" in word)).netloc
            for size, images, clients in itertools.product(_SIZES, args.images, args.clients):
                seconds, elapsed = answered(host, form(photo(*size), images), clients, args.seconds)
                case = {"run": args.run.name, "image": "{}x{}".format(*size), "nearest": args.nearest}
                case |= {"images": images, "clients": clients}
                rate = len(seconds) / elapsed
                rows.append(case | measure.milliseconds(seconds) | {"requests_s": round(rate, 2)})
                print(f"{case['image']:>9}, {images} in a request, {clients} clients: {rate:7.2f} requests/s, ", end="")
                print(f"{rate * images:7.2f} images/s, {rows[-1]['p50_ms']:.1f} ms")
        finally:
            server.terminate()
    measure.save(args, rows, "serve")


def photo(width: int, height: int) -> bytes:
    """A JPEG with detail at the scale of 8 pixels, about 0.3 bytes per pixel, as a camera's."""
    blocks = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC).save(file, "jpeg", quality=90)
    return file.getvalue()


def form(image: bytes, count: int) -> bytes:
    """A form with an image several times."""
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'.encode()
    return (head + image + b"\r\n") * count + f"--{_BOUNDARY}--\r\n".encode()


def answered(host: str, body: bytes, clients: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of each request of a measurement, and of all together; exits if an answer has other classes."""
    expected = ask(http.client.HTTPConnection(host), body)
    begin = time.perf_counter()

    def client(number: int) -> list[float]:
        connection, found = http.client.HTTPConnection(host), []
        while (start := time.perf_counter()) < begin + seconds:
            if ask(connection, body) != expected:
                raise SystemExit("the same image got other classes: no measurement")
            found.append(time.perf_counter() - start)
        return found

    with ThreadPoolExecutor(clients) as pool:
        found = list(itertools.chain.from_iterable(pool.map(client, range(clients))))
    return found, time.perf_counter() - begin


def ask(connection: http.client.HTTPConnection, body: bytes) -> list[str]:
    """The best class of each image of a form."""
    connection.request("POST", "/predict", body, {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"})
    found = json.loads(connection.getresponse().read())
    if "error" in found:
        raise SystemExit(f"the server refused the request: {found['error']}")
    return [image["predictions"][0]["label"] for image in found["images"]]


if __name__ == "__main__":
    main()
