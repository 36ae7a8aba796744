"""When a failed request is sent again, and after how long. Knows no clock: its callers wait.

A request is repeated only where that is safe: it never reached the service, or sending it twice means the same as once,
or the service itself said "later" (`Retry-After`).
"""

import httpx

from service.client.connection import URL_VARIABLE
from service.client.errors import ClientError, Unavailable, Unreachable

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 10.0
STREAM_RETRIES = 10
"""How often a stream that had been going is opened again: for about 45 seconds, enough for a service that is being
restarted."""

_PASSING = {429, 502, 503, 504}


class Patience:
    """The attempts of one call: `pause_after` each failure says how long to wait, or raises when waiting is no use."""

    def __init__(self, repeatable: bool, retries: int) -> None:
        self._repeatable = repeatable
        self._left = retries
        self._pause = FIRST_PAUSE_SECONDS

    def pause_after(self, failure: httpx.TransportError | ClientError, *, may_repeat: bool = True) -> float:
        """Seconds before the next attempt; raises what the caller of the client should see when there is none.

        `may_repeat`: false once a part of the answer has been handed on.
        """
        error = failure if isinstance(failure, ClientError) else unreachable(failure)
        pause = self._pause
        if isinstance(error, Unavailable) and error.retry_after is not None:
            pause = error.retry_after
        if not may_repeat or not self._may_repeat(failure) or self._left == 0 or pause > LONGEST_PAUSE_SECONDS:
            raise error from (None if error is failure else failure)
        self._left -= 1
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        return pause

    def _may_repeat(self, failure: httpx.TransportError | ClientError) -> bool:
        match failure:
            case Unavailable(status=status, retry_after=retry_after):
                return status in _PASSING and (self._repeatable or retry_after is not None)
            case ClientError():
                return False
            case httpx.ConnectError() | httpx.ConnectTimeout():
                return True
            case httpx.UnsupportedProtocol():
                return False
            case _:
                return self._repeatable


def unreachable(failure: httpx.TransportError) -> Unreachable:
    """What a broken exchange means to somebody who called the client."""
    url = failure.request.url
    address = f"{url.scheme}://{url.netloc.decode()}"
    if isinstance(failure, httpx.ReadTimeout):
        return Unreachable(f"no answer from {address} in time")
    if isinstance(failure, httpx.ConnectError | httpx.ConnectTimeout):
        return Unreachable(f"nothing answers at {address}; another address is set with {URL_VARIABLE}", address)
    return Unreachable(f"the connection to {address} broke: {failure}")
