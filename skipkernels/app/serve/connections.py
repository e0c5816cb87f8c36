"""HTTP connections of the server, limited in number and in the time to send the header of a request."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


class LimitedProtocol(H11Protocol):
    """Connection of uvicorn that is closed if it waits too long for the header of a request, or is one too many.

    uvicorn itself limits the time between two requests, which any byte ends, and answers requests beyond a number of
    connections, but does not close them.
    """

    most = 200
    """Largest number of connections."""
    seconds = 10.0
    """Longest time from the start of the connection, or the first byte after a response, to the end of a header."""
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time, or close the connection."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Stop the time at the end of a header."""
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # a request is being answered
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.seconds, self.transport.abort)
