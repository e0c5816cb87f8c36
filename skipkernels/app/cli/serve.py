"""`skipkernels serve`."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import socket
from typing import Any

from skipkernels.app.console import Terminal

from .options import Device, PrecisionOption, Run, Threshold, Top, Trust, check_run, import_torch

_LOCAL = ("127.0.0.1", "localhost", "::1")
_CONNECTIONS = 100  # open ones; a request of one more is answered by status 503


@dataclasses.dataclass(frozen=True)
class ServeCommand:
    """Classify images in the browser, and by a REST endpoint. Ctrl-C ends it."""

    run: Run
    """Folder of the run."""
    host: str = "127.0.0.1"
    """Address to listen at. 0.0.0.0 is all of this machine: then everyone in its network can use it."""
    port: int = 8000
    """Port to listen at. 0 takes a free one."""
    top: Top = 5
    threshold: Threshold = None
    device: Device = None
    precision: PrecisionOption = "auto"
    trust: Trust = False

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Serve until an interruption."""
        from skipkernels.app.data import InputError

        try:
            import python_multipart  # noqa: F401
            import starlette  # noqa: F401
            import uvicorn  # noqa: F401
        except ModuleNotFoundError as error:
            raise InputError(f"serve needs {error.name}: pip install 'skipkernels[web]'.") from None
        check_run(self.run, "serve", err)
        with self._listening() as listener:  # first: a port that is taken is known before the model is loaded
            import_torch(err)
            from skipkernels.app.serve import Classifier
            from skipkernels.app.serve.web import Service, make_app

            classifier = Classifier.load(self.run, device=self.device, precision=self.precision, trust=self.trust)
            service = Service(classifier, self.run.resolve().name, top=self.top, threshold=self.threshold)
            host, port = listener.getsockname()[:2]
            local = self.host in _LOCAL
            if not local:
                err.print("note: everyone in the network of this machine can use the page", soft_wrap=True)
            address = f"[{host}]" if ":" in host else host
            out.print(f"{self.run} is served at http://{address}:{port}/ ; Ctrl-C ends it", soft_wrap=True)
            out.output.flush()
            _run(make_app(service, [*_LOCAL, "[::1]"] if local else None), listener)
        return 0

    def _listening(self) -> contextlib.closing[socket.socket]:
        """Return a socket that listens at the address."""
        from skipkernels.app.data import InputError

        if not 0 <= self.port < 1 << 16:
            raise InputError(f"must be from 0 to 65535; got {self.port}.", "port", "serve")
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            return contextlib.closing(socket.create_server((self.host, self.port), family=family))
        except OSError as error:
            name_unknown = isinstance(error, socket.gaierror)
            at = "port" if error.errno in (errno.EADDRINUSE, errno.EACCES) and not name_unknown else "host"
            reason = error.strerror if name_unknown or error.errno is None else os.strerror(error.errno)
            raise InputError(
                f"can't listen at {self.host}, port {self.port} ({reason}). Choose another {at}.", at, "serve"
            ) from None


def _run(app: Any, listener: socket.socket) -> None:
    """Answer the requests at a socket until an interruption."""
    import uvicorn

    settings: dict[str, Any] = {"log_level": "warning", "access_log": False, "lifespan": "off"}
    settings |= {"limit_concurrency": _CONNECTIONS, "server_header": False, "timeout_graceful_shutdown": 2}
    server = uvicorn.Server(uvicorn.Config(app, **settings))
    server.run(sockets=[listener])  # raises the signal that ends it again
