"""Who a request comes from: the key in `Authorization: Bearer`, or the session token in the cookie. Knows no route."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from typing import TypeVar

from anyio import to_thread
from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from service.access import keys
from service.access.identity import ANYBODY, Identity
from service.database.caller import Caller
from service.database.database import Database
from service.errors import DatabaseUnavailable, Unauthorized

T = TypeVar("T")

COOKIE = "nanomoe_session"
"""Name of the cookie that holds a session token."""

LOOK_AGAIN_SECONDS = 1.0
"""Longest time for which it is remembered that no key was ever made."""

FREE_FAILURES = 5
"""Failed attempts of an address that are answered at once."""

FIRST_DELAY_SECONDS = 0.25
"""Delay of the first failed attempt after those; each further one waits twice as long."""

LONGEST_DELAY_SECONDS = 8.0
MAX_PENDING = 16
"""Failed attempts of an address that may be waiting for their answers; while so many do, no other is looked at."""

FORGET_SECONDS = 900.0
"""Time after its last failed attempt from which an address has made none."""

MAX_ADDRESSES = 4096
"""Addresses that are remembered; those that failed longest ago are forgotten first."""

MAX_KNOWN_KEYS = 4096
"""Valid keys that are remembered, by their SHA-256; those used longest ago are forgotten first."""


@dataclass
class _Failures:
    n: int = 0
    pending: int = 0
    last_at: float = 0.0
    answered_at: float = 0.0
    """When the last of the failed attempts so far is answered."""


class SlowDown:
    """Slows down failed attempts: those of one address are answered one after another, each later than the last. A
    valid key is answered at once, and one that was valid here before also while too many failed attempts wait, so that
    whoever shares the address is not locked out."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._addresses: OrderedDict[str, _Failures] = OrderedDict()
        self._known: OrderedDict[str, None] = OrderedDict()
        """SHA-256 of keys that were valid when last looked at."""

    def __len__(self) -> int:
        return len(self._addresses)

    def check(self, address: str, key: str) -> None:
        """Raises Unauthorized `too_many_attempts` while too many failed attempts of the address wait: then a key that
        was never valid here is not looked at, or the answers to thousands at once would tell the valid one by its
        speed."""
        if self.knows(key):
            return
        found = self._addresses.get(_network_of(address))
        if found is not None and found.pending >= MAX_PENDING:
            wait = max(1.0, found.answered_at - self._clock())
            raise Unauthorized("too_many_attempts", "too many keys were not valid", retry_after=wait)

    def knows(self, key: str) -> bool:
        """Whether a key was valid when it was last looked at."""
        return keys.digest_of(key) in self._known

    def succeeded(self, key: str) -> None:
        """Remember a key that was found to be valid."""
        digest = keys.digest_of(key)
        self._known[digest] = None
        self._known.move_to_end(digest)
        while len(self._known) > MAX_KNOWN_KEYS:
            self._known.popitem(last=False)

    async def failed(self, address: str, key: str) -> None:
        """Wait as long as the answer to a failed attempt is to be held back."""
        self._known.pop(keys.digest_of(key), None)  # it was revoked
        now, network = self._clock(), _network_of(address)
        found = self._addresses.get(network)
        if found is None or (not found.pending and now - found.last_at > FORGET_SECONDS):
            found = self._addresses[network] = _Failures()
        self._addresses.move_to_end(network)
        while len(self._addresses) > MAX_ADDRESSES:
            self._addresses.popitem(last=False)
        found.n += 1
        found.last_at = now
        if found.n <= FREE_FAILURES:
            return
        doublings = min(found.n - FREE_FAILURES - 1, 10)
        delay = min(FIRST_DELAY_SECONDS * 2**doublings, LONGEST_DELAY_SECONDS)
        found.answered_at = max(now, found.answered_at) + delay
        found.pending += 1
        try:
            await self._sleep(found.answered_at - now)
        finally:
            found.pending -= 1


def _network_of(address: str) -> str:
    """The address itself; of IPv6 its /64, which is what one site has."""
    with suppress(ValueError):
        if isinstance(parsed := ip_address(address), IPv6Address) and parsed.ipv4_mapped is None:
            return str(ip_network((int(parsed) & ~((1 << 64) - 1), 64)))
    return address


class Authenticator:
    """Finds out who a request comes from."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._slow_down = SlowDown()
        self._keys_exist = False
        self._looked: tuple[int, float] | None = None
        """Number of the newest change and time when there was no key yet."""

    async def keys_are_required(self, *, was_sent: bool = False) -> bool:
        """Whether a key was ever made. Once it was, that stays so; until then it is looked up again after any change of
        the database, and at once where credentials were sent (`was_sent`): whoever has some was given them. While the
        database is out of reach, so is all that a key would guard: then the last answer stands."""
        if self._keys_exist:
            return True
        now, number = time.monotonic(), self._database.changes.number
        is_new = self._looked is not None and self._looked[0] == number and now - self._looked[1] < LOOK_AGAIN_SECONDS
        if is_new and not was_sent:
            return False
        try:
            self._keys_exist = await to_thread.run_sync(keys.any_key_was_made, self._database)
        except DatabaseUnavailable:
            if self._looked is None:
                raise
            return False
        self._looked = number, now
        return self._keys_exist

    async def identify(self, headers: Headers, address: str) -> Identity | None:
        """Who sends a request with these headers; None where no key was sent, or a sign-in is over.

        Raises Unauthorized `key_invalid`, `too_many_attempts`.
        """
        key = _bearer(headers)
        if not await self.keys_are_required(was_sent="authorization" in headers):
            return ANYBODY
        if key is not None:
            return await self.with_key(address, keys.identify_key, key)
        if (token := session_token(headers)) is not None:
            return await to_thread.run_sync(keys.identify_session, self._database, token)
        return None

    async def with_key(self, address: str, use: Callable[[Database, str], T | None], key: str) -> T:
        """What `use` finds with a key; None of it is a failed attempt. Raises as `identify` does."""
        self._slow_down.check(address, key)
        found = await to_thread.run_sync(use, self._database, key)
        if found is None:
            await self._slow_down.failed(address, key)
            raise Unauthorized("key_invalid", "this key is not valid here")
        self._slow_down.succeeded(key)
        return found

    async def check_still_answered(self, caller: Caller) -> None:
        """For answers without an end: raises Unauthorized once the caller's key was revoked (`key_invalid`), or, of a
        caller without one, once a key was made (`key_required`)."""
        if caller.key_id is None:
            if await self.keys_are_required():
                raise Unauthorized("key_required", "this service needs a key by now")
        elif not await to_thread.run_sync(keys.is_valid, self._database, caller.key_id):
            raise Unauthorized("key_invalid", "this key is not valid here any more")


def _bearer(headers: Headers) -> str | None:
    """The key of `Authorization: Bearer KEY`; None for another scheme, or none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def session_token(headers: Headers) -> str | None:
    """The session token in the cookie."""
    # As browsers and Starlette read it: `SimpleCookie` drops all cookies for one of another program on this host that
    # it cannot read, such as JSON.
    return cookie_parser(headers.get("cookie", "")).get(COOKIE) or None


def address_of(client: tuple[str, int] | None) -> str:
    """The address of a request's client, from `scope["client"]`; empty where there is none, as on a Unix socket."""
    return client[0] if client else ""
