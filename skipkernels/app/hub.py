"""Access to the Hugging Face hub: without a connection, its cache only, and one failure."""

from __future__ import annotations

import contextlib
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from unittest import mock

from .data.base import InputError

_TIMEOUT = 5.0  # seconds to an answer
_OFFLINE = ("huggingface_hub.constants", "datasets.config")  # modules with a flag HF_HUB_OFFLINE


@contextlib.contextmanager
def hub(what: str, argument: str, remedy: str = "Is the network available?") -> Iterator[None]:
    """Use the hub in a block. `what` is loaded, and `argument` names it, for the error without a connection.

    The packages repeat each request five times: without a network, 50 s passed before an error.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    reason = None if constants.HF_HUB_OFFLINE else _unreachable(constants.ENDPOINT)
    if reason is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        for name in _OFFLINE:
            if name in sys.modules:
                stack.enter_context(mock.patch.object(sys.modules[name], "HF_HUB_OFFLINE", True))
        try:
            yield
        except (OSError, InputError) as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, (ConnectionError, LocalEntryNotFoundError)):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise InputError(
                f"hub: {what} could not be downloaded: {constants.ENDPOINT} can't be reached ({reason}). {remedy}",
                argument,
            ) from error


def _unreachable(address: str) -> str | None:
    """Return the reason why there is no answer from an address within `_TIMEOUT`, or None.

    In a thread: the timeout of a connection is for each of the addresses of a name, and the look-up has none.
    """
    found: list[str | None] = []
    request = threading.Thread(target=lambda: found.append(_fault(address)), daemon=True)
    request.start()
    request.join(_TIMEOUT)
    return found[0] if found else f"no answer in {_TIMEOUT:g} s"


def _fault(address: str) -> str | None:
    """Return the reason why a request fails, or None."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_TIMEOUT).close()
    except urllib.error.HTTPError:  # an answer
        return None
    except (OSError, ValueError, HTTPException) as error:  # ValueError: no address
        reason = getattr(error, "reason", error)
        return None if isinstance(reason, ssl.SSLError) else str(reason)  # the hub may be given other certificates
    return None
