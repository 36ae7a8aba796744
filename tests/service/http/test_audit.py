"""Every route that changes something leaves an entry, in the transaction of the change; nothing else does."""

from typing import Any

import sqlalchemy as sa

from service.access.audit import list_entries
from service.access.keys import create_key, identify_key
from service.database.schema import table
from service.http.permissions import PERMISSIONS, Permission
from service.jobs import queue
from service.jobs.new_job import NewJob
from service.jobs.submit import submit_finished_job
from service.jobs.tables import Job
from tests.api import TEXT, Api, Serve

ACTIONS = {
    ("POST", "/jobs"): "job.submit",
    ("PATCH", "/jobs/{job_id}"): "job.relabel",
    ("DELETE", "/jobs/{job_id}"): "job.delete",
    ("POST", "/jobs/{job_id}/cancel"): "job.cancel",
    ("POST", "/jobs/{job_id}/pause"): "job.pause",
    ("POST", "/jobs/{job_id}/resume"): "job.resume",
    ("POST", "/models"): "job.import",
    ("POST", "/sweeps"): "sweep.submit",
    ("DELETE", "/sweeps/{sweep_id}"): "sweep.delete",
    ("POST", "/sweeps/{sweep_id}/cancel"): "sweep.cancel",
    ("POST", "/sweeps/{sweep_id}/pause"): "sweep.pause",
    ("POST", "/sweeps/{sweep_id}/resume"): "sweep.resume",
}
"""What the audit calls each change."""


def change_everything(api: Api, headers: dict[str, str]) -> list[tuple[str, str]]:
    """One change of each kind, each sent twice where that is harmless; the action and the object of each."""

    def send(method: str, path: str, body: Any = None) -> Any:
        answer = api.http.request(method, path, json=body, headers=headers)
        assert answer.status_code in (201, 202, 200, 204), answer.text
        return answer.json() if answer.content else None

    job = send("POST", "/jobs", {"text": TEXT})["id"]
    sweep = send("POST", "/sweeps", {"text": TEXT, "seeds": 2})["id"]
    send("PATCH", f"/jobs/{job}", {"name": "gato"})
    made = [("job.submit", job), ("sweep.submit", sweep), ("job.relabel", job)]
    for kind, one in (("job", job), ("sweep", sweep)):
        for action in ("pause", "resume", "cancel"):
            for _ in range(2):
                send("POST", f"/{kind}s/{one}/{action}")
            made.append((f"{kind}.{action}", one))
        send("DELETE", f"/{kind}s/{one}")
        made.append((f"{kind}.delete", one))
    for path in ("/jobs", "/sweeps", "/session", "/jobs?status=queued"):
        send("GET", path)
    send("POST", "/jobs?dry_run=true", {"text": TEXT})
    return made


def test_every_change_with_a_key_is_audited_once_and_reading_is_not(serve: Serve) -> None:
    api = serve()
    key = create_key(api.db, "ana", "member")
    made = change_everything(api, {"Authorization": f"Bearer {key.key}"})
    entries = [one for one in reversed(list_entries(api.db)) if one.key_id is not None]
    assert [(one.action, one.object_id) for one in entries] == made
    assert {(one.owner, one.key_id) for one in entries} == {("ana", key.id)}
    changing = {route for route, permission in PERMISSIONS.items() if permission is Permission.CHANGE}
    assert set(ACTIONS) == changing
    assert {action for action, _ in made} | {"job.import"} == set(ACTIONS.values())
    assert len(list_entries(api.db, owner="ana", limit=3)) == 3
    assert list_entries(api.db, owner="rui") == []


def test_without_keys_nothing_is_audited(serve: Serve) -> None:
    api = serve()
    change_everything(api, {})
    assert list_entries(api.db) == []


def test_an_import_is_audited_and_a_workers_changes_are_not(serve: Serve) -> None:
    api = serve()
    key = create_key(api.db, "ana", "member").key
    identity = identify_key(api.db, key)
    assert identity is not None
    checkpoint: dict[str, Any] = {"folder": "f", "manifest_sha256": "m", "files": [], "metrics": {}}
    new = NewJob(text="a b", config={})
    submit_finished_job(api.db.acting_as(identity.caller), new, job_id="0" * 32, reason="imported", **checkpoint)
    api.http.headers["Authorization"] = f"Bearer {key}"
    claim = api.claim(api.submit()["id"])
    queue.finish(api.db, claim, "succeeded")
    assert [one.action for one in list_entries(api.db)] == ["job.submit", "job.import", "key.create"]


def test_a_change_that_fails_leaves_no_entry(serve: Serve) -> None:
    api = serve()
    api.http.headers["Authorization"] = f"Bearer {create_key(api.db, 'ana', 'member').key}"
    job = api.submit()["id"]
    api.http.delete(f"/jobs/{job}")
    with api.db.engine.connect().execution_options(writes=True) as connection, connection.begin():
        connection.execute(sa.update(table(Job)).values(owner="rui"))
    assert api.http.post(f"/jobs/{job}/cancel").status_code == 404
    assert [one.action for one in list_entries(api.db)] == ["job.submit", "key.create"]
