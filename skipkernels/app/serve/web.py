"""Web page and REST endpoint of a classifier, as an ASGI application.

`GET /` is the page, `POST /predict` classifies images, `GET /classes` and `GET /health` describe the classifier. No
file is served. Errors are {"error": line}, and a line of text for another host.
"""

from __future__ import annotations

import asyncio
import io
from typing import Any

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
from torch import Tensor

import skipkernels

from ...formatting import decimal, escaped
from ..data import InputError
from ..data.reading import TooLarge, UnknownFormat, decode
from ..report.parts import render
from ..train.description import CALIBRATED, NOT_CALIBRATED
from .classifier import Classifier
from .inputs import check_counts, check_threshold
from .output import json_predictions, rows_of

IMAGE_BYTES, PIXELS, IMAGES = 20_000_000, 50_000_000, 16
"""Largest size of an image file, pixels of an image, and images in a request; a larger request is refused."""
_MULTIPART_BYTES = 1 << 16  # beside the images, in the body of a request
# Status of a request with no image that can be read; 400 for other reasons.
_STATUS: dict[type[InputError], int] = {TooLarge: 413, UnknownFormat: 415}
_HEADERS = {
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Service:
    """Handlers of the requests. Images of one request at a time are decoded and classified, in a thread."""

    def __init__(self, classifier: Classifier, title: str, *, top: int = 5, threshold: float | None = None):
        check_counts(top=top)
        check_threshold(threshold)
        self.classifier, self.title, self.top, self.threshold = classifier, title, top, threshold
        self._busy = asyncio.Lock()

    async def show_page(self, request: Request) -> Response:
        """Return the page."""
        page = render(
            "serve.html.j2",
            title=self.title,
            calibration=CALIBRATED if self.classifier.calibrated else NOT_CALIBRATED,
            classes=self.classifier.classes,
            threshold=self.threshold,
            image_bytes=IMAGE_BYTES,
            pixels=PIXELS,
            images=IMAGES,
            address=request.url.netloc,
        )
        return HTMLResponse(page)

    async def health(self, request: Request) -> Response:
        """Return the version."""
        return JSONResponse({"status": "ok", "version": skipkernels.__version__})

    async def classes(self, request: Request) -> Response:
        """Return the names of the classes."""
        classifier = self.classifier
        described = {"classes": classifier.classes, "calibrated": classifier.calibrated, "threshold": self.threshold}
        return JSONResponse(described)

    async def predict(self, request: Request) -> Response:
        """Classify the images of a request: a form with files, or the bytes of an image."""
        self._check_length(request)
        try:
            uploads = await self._uploads(request)
            async with self._busy:
                status, found = await run_in_threadpool(self._answer, uploads)
            return JSONResponse(found, status, {"Cache-Control": "no-store"})
        except asyncio.CancelledError:  # Ctrl-C, and the images take longer than uvicorn waits
            raise HTTPException(503, "the server was stopped.") from None
        finally:
            await request.close()  # deletes the temporary files of a form

    def _check_length(self, request: Request) -> None:
        """Refuse a body that is larger than all images may be, or of unknown length, before it is received."""
        most = IMAGES * IMAGE_BYTES + _MULTIPART_BYTES if _is_form(request) else IMAGE_BYTES
        length = request.headers.get("Content-Length", "")
        if not length.isdecimal():  # isdigit accepts "²", which int refuses
            raise HTTPException(411, "the request must have its length in the header Content-Length.")
        if int(length) > most:
            raise HTTPException(413, f"the request must have at most {decimal(most)}.")

    async def _uploads(self, request: Request) -> list[UploadFile]:
        """Receive the images of a request. Those of a form are in temporary files."""
        if not _is_form(request):
            body = await request.body()
            found = [UploadFile(io.BytesIO(body), size=len(body))] if body else []
        else:
            form = await request.form(max_files=IMAGES, max_fields=IMAGES)
            found = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not found:
            raise HTTPException(400, "the request has no image; send a form with files, or the bytes of an image.")
        return found

    def _answer(self, uploads: list[UploadFile]) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status and the results, with an error in place of those of an image that can't be read."""
        read = [self._read(upload) for upload in uploads]
        predictions = iter(self._classified([image for image in read if isinstance(image, Tensor)]))
        items: list[dict[str, Any]] = []
        for upload, image in zip(uploads, read, strict=True):
            if isinstance(image, InputError):
                items.append({"name": _name(upload), "error": str(image)})
            else:
                items.append({"name": _name(upload), "predictions": next(predictions)})
        errors = [image for image in read if isinstance(image, InputError)]
        if len(errors) < len(read):
            return 200, {"images": items}
        return _STATUS.get(type(errors[0]), 400), {"error": str(errors[0]), "images": items}

    def _read(self, upload: UploadFile) -> Tensor | InputError:
        """Decode and preprocess an image; return the error if it can't be read."""
        name, size = _name(upload), upload.size or 0
        try:
            if size > IMAGE_BYTES:
                raise TooLarge(f"{name}: must have at most {decimal(IMAGE_BYTES)}; got {decimal(size)}.")
            return self.classifier.transform(decode(io.BytesIO(upload.file.read()), name, max_pixels=PIXELS))
        except InputError as error:
            return error

    def _classified(self, images: list[Tensor]) -> list[list[dict[str, Any]]]:
        """Predictions of preprocessed images [3, H, W], in JSON types."""
        if not images:
            return []
        found = self.classifier.predict(torch.stack(images), top=self.top, threshold=self.threshold)
        return [json_predictions(row) for row in rows_of(found)]


def _is_form(request: Request) -> bool:
    return request.headers.get("Content-Type", "").lower().startswith("multipart/form-data")


def _name(upload: UploadFile) -> str:
    """Name of an image in the results."""
    return escaped(upload.filename or "image")


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
        Route("/predict", service.predict, methods=["POST"]),
    ]
    middleware = [Middleware(SameOrigin)]
    if hosts is not None:
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=hosts))
    handlers: Any = {HTTPException: _json_error, ClientDisconnect: _gone, Exception: _bug}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
