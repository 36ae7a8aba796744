"""The roles of keys. Loads nothing, so that the client may share them."""

from typing import Literal, get_args

Role = Literal["admin", "member", "viewer"]
"""`admin` reads and changes everything, `member` the owner's own jobs, `viewer` reads what a member does."""

ROLES: tuple[Role, ...] = get_args(Role)
