"""Removal of files that no row refers to any more. What stays is swept as an orphan.

Knows no job and no database.
"""

import threading

import structlog

from nanomoe.store.store import Store, StoreError

log = structlog.get_logger(__name__)


def remove_when_possible(folder: Store) -> None:
    """Remove a folder: at once on a disk; in the background from a bucket, which may take minutes to answer, longer
    than a lease without a heartbeat."""
    if folder.is_local:
        folder.remove()
    else:
        threading.Thread(target=_remove, args=[folder], name="removal", daemon=True).start()


def _remove(folder: Store) -> None:
    try:
        folder.remove()
    except StoreError as error:
        log.warning("files_not_removed", folder=folder.location, reason=str(error))
