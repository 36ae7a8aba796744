"""Which role each route needs: one table, and what is not in it is nobody's but the admin's.

Knows no key and no handler. A test walks the app's routes and holds this table against what they answer.
"""

import re
from collections.abc import Mapping
from enum import Enum, auto

from service.access.roles import Role


class Permission(Enum):
    """What a request must bring."""

    OPEN = auto()
    """Nothing; a key is not even looked at."""

    SESSION = auto()
    """Nothing; a valid key says who asks."""

    READ = auto()
    """Any key: shows what its owner may see."""

    CHANGE = auto()
    """A key that is no viewer's."""

    ADMIN = auto()
    """An admin's key."""


PERMISSIONS: Mapping[tuple[str, str], Permission] = {
    ("GET", "/healthz"): Permission.OPEN,
    ("GET", "/static"): Permission.OPEN,
    ("GET", "/"): Permission.OPEN,
    ("GET", "/page"): Permission.OPEN,
    ("GET", "/page/{view:path}"): Permission.OPEN,
    ("GET", "/session"): Permission.SESSION,
    ("POST", "/session"): Permission.SESSION,
    ("DELETE", "/session"): Permission.SESSION,
    ("GET", "/docs"): Permission.READ,
    ("GET", "/openapi.json"): Permission.READ,
    ("GET", "/readyz"): Permission.READ,
    ("GET", "/presets"): Permission.READ,
    ("GET", "/jobs"): Permission.READ,
    ("GET", "/jobs/{job_id}"): Permission.READ,
    ("GET", "/jobs/{job_id}/text"): Permission.READ,
    ("GET", "/jobs/{job_id}/metrics"): Permission.READ,
    ("GET", "/jobs/{job_id}/metrics.csv"): Permission.READ,
    ("GET", "/jobs/{job_id}/events"): Permission.READ,
    ("GET", "/jobs/{job_id}/checkpoints"): Permission.READ,
    ("GET", "/jobs/{job_id}/checkpoints/{percent}"): Permission.READ,
    ("GET", "/jobs/{job_id}/checkpoints/{percent}/reconstruction"): Permission.READ,
    ("GET", "/jobs/{job_id}/checkpoints/{percent}/files/{name}"): Permission.READ,
    ("GET", "/sweeps"): Permission.READ,
    ("GET", "/sweeps/{sweep_id}"): Permission.READ,
    ("GET", "/sweeps/{sweep_id}/events"): Permission.READ,
    ("GET", "/events"): Permission.READ,
    ("GET", "/compare"): Permission.READ,
    ("GET", "/compare/series"): Permission.READ,
    ("GET", "/v1/models"): Permission.READ,
    ("GET", "/v1/models/{model}"): Permission.READ,
    # A model is asked something, and nothing is stored.
    ("POST", "/generate"): Permission.READ,
    ("POST", "/score"): Permission.READ,
    ("POST", "/inspect"): Permission.READ,
    ("POST", "/v1/completions"): Permission.READ,
    ("POST", "/v1/chat/completions"): Permission.READ,
    ("POST", "/jobs"): Permission.CHANGE,
    ("PATCH", "/jobs/{job_id}"): Permission.CHANGE,
    ("DELETE", "/jobs/{job_id}"): Permission.CHANGE,
    ("POST", "/jobs/{job_id}/cancel"): Permission.CHANGE,
    ("POST", "/jobs/{job_id}/pause"): Permission.CHANGE,
    ("POST", "/jobs/{job_id}/resume"): Permission.CHANGE,
    ("POST", "/models"): Permission.CHANGE,
    ("POST", "/sweeps"): Permission.CHANGE,
    ("DELETE", "/sweeps/{sweep_id}"): Permission.CHANGE,
    ("POST", "/sweeps/{sweep_id}/cancel"): Permission.CHANGE,
    ("POST", "/sweeps/{sweep_id}/pause"): Permission.CHANGE,
    ("POST", "/sweeps/{sweep_id}/resume"): Permission.CHANGE,
    ("GET", "/workers"): Permission.ADMIN,
    ("GET", "/metrics"): Permission.ADMIN,
}
"""Every route of the service by method and path. `/static` stands for all files below it."""

ALLOWED: Mapping[Permission, frozenset[Role]] = {
    Permission.OPEN: frozenset({"admin", "member", "viewer"}),
    Permission.SESSION: frozenset({"admin", "member", "viewer"}),
    Permission.READ: frozenset({"admin", "member", "viewer"}),
    Permission.CHANGE: frozenset({"admin", "member"}),
    Permission.ADMIN: frozenset({"admin"}),
}
"""The roles that have each permission."""


def _pattern(path: str) -> re.Pattern[str]:
    if path == "/static":
        return re.compile(r"/static(?:/.*)?", re.DOTALL)
    pattern = re.sub(r"\\\{\w+:path\\\}", ".*", re.escape(path))
    return re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", pattern), re.DOTALL)


_PATTERNS = {path: _pattern(path) for _, path in PERMISSIONS}
_BY_PATH: dict[str, dict[str, Permission]] = {}
for (_method, _path), _permission in PERMISSIONS.items():
    _BY_PATH.setdefault(_path, {})[_method] = _permission


def permissions_of(path: str) -> Mapping[str, Permission]:
    """The permission of each method at a path; empty for a path that no route has."""
    if path in _BY_PATH:
        return _BY_PATH[path]
    found = (_BY_PATH[template] for template, pattern in _PATTERNS.items() if pattern.fullmatch(path))
    return next(found, {})
