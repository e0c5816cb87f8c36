"""Web page and REST endpoint of a classifier, as an ASGI application.

`GET /` is the page, `POST /predict` classifies images, `GET /classes` and `GET /health` describe the classifier, and
`GET /training/N` is the thumbnail of a training image. No other file is served. Errors are {"error": line}.
"""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import skipkernels

from ...formatting import decimal, escaped
from ..data import InputError
from ..data.decoder import decode
from ..data.decoding import TooLarge, UnknownFormat
from ..report.mistakes import encoded
from ..report.rendering import render
from .classifier import Classifier
from .embedded_images import EmbeddedImages
from .output import json_predictions, labelled

Upload = tuple[str, BinaryIO, int]
"""Name, contents and size in bytes of an uploaded image."""
_MULTIPART_BYTES = 1 << 16  # beside the images, in the body of a request
_STATUS = {TooLarge: 413, UnknownFormat: 415}  # of a request with no image that can be read; 400 for other reasons
_HEADERS = {
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Decoded(NamedTuple):
    """An image of a request: input [3, H, W] of the model, and the file of its thumbnail."""

    tensor: torch.Tensor
    thumbnail: bytes | None


@dataclass(frozen=True)
class Limits:
    """Largest requests, and how many; a larger one is refused.

    Attributes:
        image_bytes: Size of an image file.
        pixels: Pixels of an image.
        images: Images in a request.
        rate: Requests of a client to classify images in a minute.
        pending: Requests that are received, waiting or classified at a time; images are decoded for one of them, and
            the model runs for one.
        seconds: Time to send a request.
        decoding: Time in seconds to decode the images of a request.
    """

    image_bytes: int = 20_000_000
    pixels: int = 50_000_000
    images: int = 16
    rate: int = 120
    pending: int = 8
    seconds: float = 60.0
    decoding: float = 30.0


@dataclass(frozen=True)
class Page:
    """Texts of the page: its title, and sentences on the probabilities and the nearest training images."""

    title: str
    calibration: str
    nearest: str


class Service:
    """Handlers of the requests; images of one request at a time are decoded, and of one classified, in threads."""

    def __init__(
        self,
        classifier: Classifier,
        page: Page,
        *,
        top: int = 5,
        threshold: float | None = None,
        training: EmbeddedImages | None = None,
        nearest: int = 4,
        limits: Limits = Limits(),
    ):
        self.classifier, self.page, self.top, self.threshold = classifier, page, top, threshold
        self.training, self.nearest, self.limits = training, nearest, limits
        self._pending = 0
        self._decoding, self._classifying = asyncio.Lock(), asyncio.Lock()
        self._minute, self._requests = 0, Counter[str]()

    async def show_page(self, request: Request) -> Response:
        """Return the page."""
        page = render(
            "serve.html.j2",
            **vars(self.page),
            classes=self.classifier.classes,
            threshold=self.threshold,
            limits=self.limits,
            address=request.url.netloc,
        )
        return HTMLResponse(page)

    async def health(self, request: Request) -> Response:
        """Return the version and the state of the queue."""
        return JSONResponse({"status": "ok", "version": skipkernels.__version__, "pending": self._pending})

    async def classes(self, request: Request) -> Response:
        """Return the names of the classes."""
        classifier = self.classifier
        described = {"classes": classifier.classes, "calibrated": classifier.calibrated, "threshold": self.threshold}
        return JSONResponse(described)

    async def thumbnail(self, request: Request) -> Response:
        """Return the thumbnail of a training image."""
        number, thumbnails = request.path_params["number"], self.training.thumbnails if self.training else []
        if not number.isdecimal() or len(number) > 9 or int(number) >= len(thumbnails):
            raise HTTPException(404, "no such training image.")
        data = thumbnails[int(number)]
        return Response(data, media_type=_media_type(data), headers={"Cache-Control": "private, max-age=3600"})

    async def predict(self, request: Request) -> Response:
        """Classify the images of a request: a form with files, or the bytes of an image."""
        self._count(request)
        if self._pending >= self.limits.pending:
            raise HTTPException(503, "the server is busy; try again.", {"Retry-After": "1"})
        limited = Request(request.scope, self._limited_receive(request))
        self._pending += 1
        try:
            try:
                uploads = await asyncio.wait_for(self._uploads(limited), self.limits.seconds)
            except asyncio.TimeoutError:
                raise HTTPException(408, f"the request took more than {self.limits.seconds:g} s to send.") from None
            async with self._decoding:
                decoded = await self._decode(uploads, thumbnails="thumbnail" in request.query_params)
            async with self._classifying:
                status, found = await run_in_threadpool(self._classify, uploads, decoded)
            return JSONResponse(found, status, {"Cache-Control": "no-store"})
        finally:
            self._pending -= 1
            await limited.close()  # deletes the temporary files of a form

    def _count(self, request: Request) -> None:
        """Count a request of a client, and refuse it if there were too many in this minute of the clock."""
        minute, second = divmod(int(time.monotonic()), 60)
        if minute != self._minute:
            self._minute, self._requests = minute, Counter()
        client = request.client.host if request.client else ""
        self._requests[client] += 1
        if self._requests[client] > self.limits.rate:
            wait = 60 - second
            message = f"more than {self.limits.rate} requests in a minute; try again in {wait} s."
            raise HTTPException(429, message, {"Retry-After": str(wait)})

    def _limited_receive(self, request: Request) -> Any:
        """Return the receive function of a request, which refuses a body that is larger than all images may be."""
        limits, received = self.limits, 0
        form = _is_form(request)
        most = (limits.images if form else 1) * limits.image_bytes + (_MULTIPART_BYTES if form else 0)
        error = HTTPException(413, f"the request must have at most {decimal(most)}.")
        length = request.headers.get("Content-Length", "")
        if length.isdigit() and int(length) > most:
            raise error

        async def receive() -> Any:
            nonlocal received
            message = await request.receive()
            received += len(message.get("body", b""))
            if received > most:
                raise error
            return message

        return receive

    async def _uploads(self, request: Request) -> list[Upload]:
        """Receive the images of a request. Those of a form are in temporary files."""
        if not _is_form(request):
            body = await request.body()
            found: list[Upload] = [("image", io.BytesIO(body), len(body))] if body else []
        else:
            form = await request.form(max_files=self.limits.images, max_fields=self.limits.images)
            files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
            found = [(escaped(file.filename or "image"), file.file, file.size or 0) for file in files]
        if not found:
            raise HTTPException(400, "the request has no image; send a form with files, or the bytes of an image.")
        return found

    async def _decode(self, uploads: list[Upload], *, thumbnails: bool) -> list[Decoded | InputError]:
        """Decode images one after the other, each by a decoder that waits in a thread."""
        deadline = time.monotonic() + self.limits.decoding
        return [await run_in_threadpool(self._decoded, *upload, deadline, thumbnails) for upload in uploads]

    def _decoded(self, name: str, file: BinaryIO, size: int, deadline: float, thumbnails: bool) -> Decoded | InputError:
        limits, left = self.limits, deadline - time.monotonic()
        try:
            if size > limits.image_bytes:
                most = decimal(limits.image_bytes)
                raise TooLarge(f"{name}: must have at most {most}; got {decimal(size)}.")
            if left <= 0:
                raise InputError(f"{name}: images of a request must take at most {limits.decoding:g} s to decode.")
            image = decode(file.read(), name, max_pixels=limits.pixels, seconds=left)
        except InputError as error:
            return error
        return Decoded(self.classifier.transform(image), encoded(image) if thumbnails else None)

    def _classify(self, uploads: list[Upload], decoded: list[Decoded | InputError]) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status and the results, an error in place of those of an image that can't be read."""
        items: list[dict[str, Any]] = [{"name": name} for name, _, _ in uploads]
        read: list[dict[str, Any]] = []
        tensors = []
        for item, each in zip(items, decoded, strict=True):
            if isinstance(each, InputError):
                item["error"] = str(each)
                continue
            if each.thumbnail is not None:
                item["thumbnail"] = _data_url(each.thumbnail)
            read.append(item)
            tensors.append(each.tensor)
        if not tensors:
            kind: Any = type(decoded[0])
            return _STATUS.get(kind, 400), {"error": items[0]["error"], "images": items}
        predictions = self.classifier.predict(torch.stack(tensors), top=self.top, threshold=self.threshold)
        for item, (_, found) in zip(read, labelled(predictions), strict=True):
            item["predictions"] = json_predictions(found)
        if self.training is not None:
            near = self.training.nearest(predictions.embeddings, self.nearest)
            for item, cosines, numbers in zip(read, *(part.tolist() for part in near), strict=True):
                item["nearest"] = [self._neighbour(*pair) for pair in zip(cosines, numbers, strict=True)]
        return 200, {"images": items}

    def _neighbour(self, cosine: float, number: int) -> dict[str, Any]:
        training: Any = self.training
        label = training.classes[int(training.labels[number])]
        found = {"label": label, "cosine": round(cosine, 4), "name": escaped(training.names[number])}
        return found | {"thumbnail": f"training/{number}"}


def _media_type(thumbnail: bytes) -> str:
    return "image/png" if thumbnail.startswith(b"\x89PNG") else "image/jpeg"


def _data_url(thumbnail: bytes) -> str:
    return f"data:{_media_type(thumbnail)};base64,{base64.b64encode(thumbnail).decode()}"


def _is_form(request: Request) -> bool:
    return request.headers.get("Content-Type", "").lower().startswith("multipart/form-data")


async def _json_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _bug(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "internal error; the server's terminal has its traceback."}, 500, _HEADERS)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # the client has closed the connection


class SameOrigin:
    """Middleware that refuses what a page of another site requests, and adds `_HEADERS` to every response.

    A browser lets any page of the web send requests to a server on its machine, and show images from it, though not
    read the answers. A link to this page is followed.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        app = self.app
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            is_link = scope["method"] == "GET" and headers.get("Sec-Fetch-Mode") == "navigate"
            if headers.get("Sec-Fetch-Site") == "cross-site" and not is_link:
                app = JSONResponse({"error": "pages of other sites can't use this server."}, 403)
        await app(scope, receive, send_with_headers)


def make_app(service: Service, hosts: list[str] | None = None) -> Starlette:
    """Make the ASGI application.

    `hosts` are the names by which clients may address it, by default any: a page of the web with a name that was made
    to point at 127.0.0.1 (DNS rebinding) could otherwise read the results.
    """
    routes = [
        Route("/", service.show_page),
        Route("/health", service.health),
        Route("/classes", service.classes),
        Route("/training/{number}", service.thumbnail),
        Route("/predict", service.predict, methods=["POST"]),
    ]
    middleware = [Middleware(SameOrigin)]
    if hosts is not None:
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=hosts))
    handlers: Any = {HTTPException: _json_error, ClientDisconnect: _gone, Exception: _bug}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
