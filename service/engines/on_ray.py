"""Workers on a Ray cluster: a detached actor for each, which keeps it running as its child, and one keeper.

The keeper is an actor without a CPU that has what was asked for; every couple of seconds it starts workers that are
missing, by name, and removes those that have ended. Ray restarts both kinds: where a process, a raylet or a host is
lost, on another host. Ray sees no job, and needs nothing but this package on each of its hosts.
"""

import logging
import os
import platform
import re
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import ray
import structlog
from ray._private.authentication.authentication_token_setup import (
    ensure_token_if_auth_enabled,
    maybe_enable_token_auth_if_token_available,
)
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError, RayError

from nanomoe.logs import configure_logging
from service.database.database import Database
from service.database.opening import open_database
from service.engines.demand import read_demand, workers_wanted
from service.engines.fleet import EngineError, Fleet, FleetStatus, PlacedWorker, WorkerState
from service.engines.pilot import Pilot
from service.errors import ServiceError, StartRefused
from service.settings import SQLITE, read_settings

log = structlog.get_logger(__name__)

NAMESPACE = "nanomoe"
"""Ray's namespace of all names here."""

ROUND_SECONDS = 2.0
"""Time between two rounds of a keeper."""

_ANSWER_SECONDS = 5.0
"""Longest wait for actors to report; one that has not by then is busy starting."""

_KEEPER_SECONDS = 60.0
"""Longest wait for a keeper to be placed, and for a name to be free again."""

_LONGEST_PAUSE = 60.0
"""Longest time before a worker whose actor could not be made is tried again."""


class WorkerActor:
    """One worker of a fleet."""

    def __init__(self, fleet: Fleet, index: int) -> None:
        configure_logging("json")
        self._fingerprint = fleet.fingerprint(index)
        self._pilot = Pilot(fleet.worker_name(index), fleet.worker_arguments(index), fleet.worker_environment(index))
        threading.Thread(target=self._pilot.run, name="pilot", daemon=True).start()

    def report(self) -> tuple[str, PlacedWorker]:
        """The fingerprint of what it was asked for, and the worker now."""
        return self._fingerprint, replace(self._pilot.report(), host=platform.node())

    def stop(self, now: bool) -> None:
        """Begin to drain the worker."""
        self._pilot.stop(now=now)


class KeeperActor:
    """Keeps up the number of a fleet's workers."""

    def __init__(self, fleet: Fleet) -> None:
        configure_logging("json")
        os.environ.update(fleet.environment)
        self._fleet = fleet
        self._db: Database | None = None
        self._problem: str | None = None
        self._retries: dict[int, _Retry] = {}
        self._made: set[int] = set()
        """Indices of the workers that were there in the last round, or made in it."""
        threading.Thread(target=self._keep, name="keeper", daemon=True).start()

    def report(self) -> tuple[Fleet, str | None]:
        """What was asked for, and what keeps it from being so."""
        return self._fleet, self._problem

    def _keep(self) -> None:
        while True:
            began = time.monotonic()
            try:
                self._problem = self._round()
            except RayError as error:  # a head that restarts, for example
                self._problem = f"Ray: {_first_line(error)}"
            except Exception as error:
                # A bug: shown, and the next round may do better. The workers go on in any case.
                log.exception("round_failed", fleet=self._fleet.name)
                self._problem = f"{type(error).__name__}: {error}"
            if self._problem:
                log.warning("fleet_not_kept_up", fleet=self._fleet.name, reason=self._problem)
            time.sleep(max(0.0, began + ROUND_SECONDS - time.monotonic()))

    def _round(self) -> str | None:
        """Make what is missing and remove what has ended; returns what stands in the way."""
        fleet = self._fleet
        wanted, problem = self._wanted()
        present: dict[int, _Placed] = {}
        for placed in _placed_workers(fleet.name):
            if placed.worker.state == "ended":
                log.info("worker_removed", worker=placed.worker.name)
                _remove(placed.handle)
                self._made.discard(placed.index)
                continue
            present[placed.index] = placed
            is_other = placed.fingerprint is not None and placed.fingerprint != fleet.fingerprint(placed.index)
            if is_other or placed.index >= fleet.most:
                placed.stop(now=False)
        # One that is refused takes a place: others would be refused for the same reason.
        live = [one for one in present.values() if one.worker.state != "draining"]
        while len(live) > wanted and live[-1].worker.state == "pending":
            _remove(live[-1].handle)
            self._made.discard(live[-1].index)
            del present[live.pop().index]
        for index in sorted(self._made - present.keys()):
            # Ray gave it up: what it was to run cannot be imported there, for example.
            problem = f"the actor of {fleet.worker_name(index)} has ended: {_cause_of_death(fleet.worker_name(index))}"
            self._retries.setdefault(index, _Retry()).failed()
        self._made = set(present)
        missing = (n for n in range(fleet.most) if n not in present and self._retries.get(n, _NEVER_FAILED).is_due())
        for index, _ in zip(missing, range(wanted - len(live)), strict=False):
            if _make_worker(fleet, index):
                self._made.add(index)
        return problem

    def _wanted(self) -> tuple[int, str | None]:
        """How many workers there should be, and why that is not known."""
        fleet = self._fleet
        if fleet.least == fleet.most:
            return fleet.most, None
        try:
            if self._db is None:
                self._db = open_database(read_settings(_env_file=None))
            return workers_wanted(read_demand(self._db, fleet), fleet), None
        except (ServiceError, StartRefused) as error:
            return fleet.least, f"the queue cannot be read: {error}"


class _Retry:
    """When an actor that could not be made is made again."""

    def __init__(self) -> None:
        self._pause = 1.0
        self._due = 0.0

    def failed(self) -> None:
        self._due = time.monotonic() + self._pause
        self._pause = min(_LONGEST_PAUSE, 2 * self._pause)

    def is_due(self) -> bool:
        return time.monotonic() >= self._due


_NEVER_FAILED = _Retry()


@dataclass(frozen=True)
class _Placed:
    """A worker's actor."""

    index: int
    handle: Any
    worker: PlacedWorker
    fingerprint: str | None = None
    """None while it does not answer."""

    def stop(self, *, now: bool) -> None:
        """Have it drain; one without a worker to drain is removed."""
        if self.worker.state in ("pending", "ended", "refused"):
            _remove(self.handle)
        else:
            self.handle.stop.remote(now)


def _placed_workers(name: str) -> list[_Placed]:
    """The actors of a fleet's workers by index, those that wait for a place included."""
    own_name = re.compile(rf"{re.escape(name)}-(\d+)")
    found = []
    for row in _actor_table():
        if matched := own_name.fullmatch(row["Name"]):
            with suppress(ValueError):  # gone meanwhile
                found.append((int(matched[1]), row, ray.get_actor(row["Name"], namespace=NAMESPACE)))
    found.sort(key=lambda one: one[0])
    asked = {index: handle.report.remote() for index, row, handle in found if row["State"] == "ALIVE"}
    if asked:
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER_SECONDS)
    return [_placed(index, row, handle, asked.get(index)) for index, row, handle in found]


def _placed(index: int, row: dict[str, Any], handle: Any, answer: Any) -> _Placed:
    state: WorkerState = "starting"
    reason = None
    if answer is None:
        state = "pending"
        reason = "is placed anew" if row["State"] == "RESTARTING" else "no host has had room for it yet"
    else:
        with suppress(RayError):  # it has not answered yet, or was lost just now
            fingerprint, worker = ray.get(answer, timeout=0)
            worker = replace(worker, restarts=worker.restarts + row["NumRestarts"])
            return _Placed(index, handle, worker, fingerprint)
    return _Placed(index, handle, PlacedWorker(row["Name"], state, restarts=row["NumRestarts"], reason=reason))


def _actor_table() -> list[dict[str, Any]]:
    """Ray's rows of all actors that are not dead. Its public list asks the dashboard, which may not run."""
    from ray._private.state import actors

    return [row for row in actors().values() if row["State"] != "DEAD"]


def _cause_of_death(name: str) -> str:
    from ray._private.state import actors

    ended = [row for row in actors(actor_state_name="DEAD").values() if row["Name"] == name]
    last = max(ended, key=lambda row: row["EndTime"], default=None)
    return "unknown" if last is None else " ".join(str(last["DeathCause"]).split())[:500]


def _make_worker(fleet: Fleet, index: int) -> bool:
    """Make the actor of a worker; False while there is one of its name."""
    name = fleet.worker_name(index)
    options = {
        "num_cpus": fleet.cpus,
        "num_gpus": fleet.gpus,
        "max_restarts": -1,
        "lifetime": "detached",
        # When its raylet dies an actor's process would kill the worker, which is to drain instead.
        "runtime_env": {"env_vars": {"RAY_kill_child_processes_on_worker_exit": "0"}},
    }
    try:
        ray.remote(WorkerActor).options(name=name, namespace=NAMESPACE, **options).remote(fleet, index)
    except ValueError:  # one that was removed just now
        return False
    log.info("worker_made", worker=name)
    return True


def _remove(handle: Any) -> None:
    ray.kill(handle, no_restart=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


class RayEngine:
    """The fleets of one cluster."""

    def __init__(self, address: str) -> None:
        """Connect to the cluster at `address`; `auto` is RAY_ADDRESS, or the one that this host belongs to.

        Raises EngineError `cluster_unreachable`, `cluster_refused`.
        """
        if address == "auto":
            address = os.environ.get("RAY_ADDRESS", address)
        try:
            if address != "auto":
                _check_that_it_answers(address)
            ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        except AuthenticationError as error:
            raise EngineError(
                "cluster_refused", f"the cluster at {address} wants its token (RAY_AUTH_TOKEN): {_first_line(error)}"
            ) from None
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise EngineError("cluster_unreachable", f"no Ray cluster at {address}: {_first_line(error)}") from None

    def up(self, fleet: Fleet) -> FleetStatus:
        """See `Engine.up`. Raises EngineError `database_not_shared`, `keeper_not_placed`."""
        hosts = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
        if len(hosts) > 1 and fleet.environment.get("NANOMOE_DATABASE_URL", SQLITE).startswith(SQLITE):
            raise EngineError(
                "database_not_shared",
                f"the cluster has {len(hosts)} hosts, and SQLite serves one: workers of several need PostgreSQL and a "
                "bucket (NANOMOE_DATABASE_URL, NANOMOE_STORE)",
            )
        give_up = time.monotonic() + _KEEPER_SECONDS
        while (asked := self._asked(fleet.name)) != fleet:
            if asked is not None or _find(_keeper_name(fleet.name)) is not None:
                self._remove_keeper(fleet.name)
                for placed in _placed_workers(fleet.name):
                    if placed.worker.state == "pending":  # it cannot say what it was to be
                        _remove(placed.handle)
            if time.monotonic() > give_up:
                name = _keeper_name(fleet.name)
                raise EngineError(
                    "keeper_not_placed", f"no host of the cluster has started {name}: {_cause_of_death(name)}"
                )
            with suppress(ValueError):  # somebody else's, or the old one's name is not free yet
                options = {"num_cpus": 0, "max_restarts": -1, "lifetime": "detached"}
                name = _keeper_name(fleet.name)
                ray.remote(KeeperActor).options(name=name, namespace=NAMESPACE, **options).remote(fleet)
        return self.status(fleet.name)

    def status(self, name: str) -> FleetStatus:
        """See `Engine.status`."""
        keeper, placed = _find(_keeper_name(name)), _placed_workers(name)
        if keeper is None and not placed:
            raise EngineError("no_such_fleet", f"there is no fleet {name} on this cluster")
        fleet, problem = None, "nobody keeps up the number of workers: run `workers up` again"
        if keeper is not None:
            try:
                fleet, problem = ray.get(keeper.report.remote(), timeout=_ANSWER_SECONDS)
            except RayError as error:
                problem = f"the keeper does not answer: {_first_line(error)}"
        return FleetStatus(name, fleet, [one.worker for one in placed], problem)

    def down(self, name: str, *, now: bool) -> Sequence[PlacedWorker]:
        """See `Engine.down`."""
        ended = self.status(name).workers
        self._remove_keeper(name)
        while placed := _placed_workers(name):
            for one in placed:
                one.stop(now=now)  # again: an actor that was started anew meanwhile does not know
            time.sleep(0.2)
        return ended

    def _asked(self, name: str) -> Fleet | None:
        """What the keeper of that name was asked for; None without one that answers."""
        keeper = _find(_keeper_name(name))
        if keeper is None:
            return None
        try:
            fleet: Fleet = ray.get(keeper.report.remote(), timeout=_KEEPER_SECONDS)[0]
        except RayError:
            return None
        return fleet

    def _remove_keeper(self, name: str) -> None:
        give_up = time.monotonic() + _KEEPER_SECONDS
        while (keeper := _find(_keeper_name(name))) is not None and time.monotonic() < give_up:
            _remove(keeper)
            time.sleep(0.05)


def _check_that_it_answers(address: str) -> None:
    """Ask what `ray.init` tries again and again for minutes, whatever the reason.

    Raises OSError when nothing listens there, AuthenticationError, ValueError when it is no address.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname is None or parts.port is None:
        raise ValueError("an address is HOST:PORT or auto")
    socket.create_connection((parts.hostname, parts.port), timeout=_ANSWER_SECONDS).close()
    if not parts.scheme:
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        ensure_token_if_auth_enabled(create_token_if_missing=False)
        GcsClient(address=address)


def _keeper_name(name: str) -> str:
    return f"{name}.keeper"


def _find(name: str) -> Any:
    """The handle of the actor of that name; None without one."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None
