"""When a failed request is sent again, and after which delay. Knows no clock: its callers sleep.

A request is repeated only where that is safe: it never reached the service, it is idempotent, or the service answered
with `Retry-After`.
"""

import httpx

from service.client.connection import URL_VARIABLE
from service.client.errors import ClientError, Unavailable, Unreachable

FIRST_DELAY_SECONDS = 0.1
LONGEST_DELAY_SECONDS = 10.0
STREAM_RETRIES = 10
"""How often a broken stream is opened again: for about 45 seconds, enough for a service that is being restarted."""

_TRANSIENT = {429, 502, 503, 504}


class RetryPolicy:
    """Exponential backoff of one call: `delay_after` each failure gives the delay before the next attempt, or raises
    the failure when another attempt is not safe or not useful."""

    def __init__(self, repeatable: bool, retries: int) -> None:
        self._repeatable = repeatable
        self._left = retries
        self._delay = FIRST_DELAY_SECONDS

    def delay_after(self, failure: httpx.TransportError | ClientError, *, may_repeat: bool = True) -> float:
        """Seconds before the next attempt; raises the client's own exception when there is to be none.

        `may_repeat`: false once a part of the answer has been handed to the caller.
        """
        error = failure if isinstance(failure, ClientError) else unreachable(failure)
        delay = self._delay
        if isinstance(error, Unavailable) and error.retry_after is not None:
            delay = error.retry_after
        if not may_repeat or not self._may_repeat(failure) or self._left == 0 or delay > LONGEST_DELAY_SECONDS:
            raise error from (None if error is failure else failure)
        self._left -= 1
        self._delay = min(2 * self._delay, LONGEST_DELAY_SECONDS)
        return delay

    def _may_repeat(self, failure: httpx.TransportError | ClientError) -> bool:
        match failure:
            case Unavailable(status=status, retry_after=retry_after):
                return status in _TRANSIENT and (self._repeatable or retry_after is not None)
            case ClientError():
                return False
            case httpx.ConnectError() | httpx.ConnectTimeout():
                return True
            case httpx.UnsupportedProtocol():
                return False
            case _:
                return self._repeatable


def unreachable(failure: httpx.TransportError) -> Unreachable:
    """The client's exception for a request that httpx could not complete."""
    url = failure.request.url
    address = f"{url.scheme}://{url.netloc.decode()}"
    if isinstance(failure, httpx.ReadTimeout):
        return Unreachable(f"no answer from {address} in time")
    if isinstance(failure, httpx.ConnectError | httpx.ConnectTimeout):
        return Unreachable(f"nothing answers at {address}; another address is set with {URL_VARIABLE}", address)
    return Unreachable(f"the connection to {address} broke: {failure}")
