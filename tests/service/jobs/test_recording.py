"""What a worker records of a running job, on SQLite and on PostgreSQL."""

from service.database.database import Database
from service.jobs import queue, reads, recording
from service.jobs.recording import Report
from service.jobs.workers import WorkerIdentity
from tests.queued import CHECKPOINT, EXECUTION, STEPS, claim, out_of_memory, prepare, running


def test_the_execution_of_the_first_start_stays(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker, warnings=[{"code": "known", "message": "from the config"}])
    first = {"execution": {"device": "cpu"}, "n_tokens": 9, "total_steps": 4}
    model = {"n_params": 5, "n_active_params": 3}
    recording.record_prepared(db, held, **first, model=model, warnings=[{"code": "new", "message": "m"}])
    queue.release(db, held)
    again = claim(db, worker)
    assert again.job.execution == {"device": "cpu"}
    repeated = [{"code": "known", "message": "from the config"}, {"code": "new", "message": "otherwise"}]
    recording.record_prepared(db, again, **first | {"execution": {"device": "cuda"}}, model=model, warnings=repeated)
    job = reads.get_job(db, held.job_id)
    assert job.execution == {"device": "cpu"}
    assert (job.n_tokens, job.total_steps, job.n_params, job.n_active_params) == (9, 4, 5, 3)
    assert job.warnings == [{"code": "known", "message": "from the config"}, {"code": "new", "message": "m"}]
    events = reads.events_after(db, held.job_id, 0)
    warned = [event.data for event in events if event.kind == "warning"]
    assert warned == [{"code": "new", "message": "m"}, {"code": "new", "message": "otherwise"}]
    assert [event.seq for event in events] == list(range(1, job.event_seq + 1))


def test_warnings_about_the_config_are_those_after_the_text_is_tokenised(db: Database, worker: WorkerIdentity) -> None:
    outdated = [{"code": code, "message": "of 9 tokens"} for code in ("warmup_beyond_end", "prefix_longer_than_text")]
    held = running(db, worker, warnings=[*outdated, {"code": "upcycle_not_equal", "message": "of the parent"}])
    current = {"code": "warmup_beyond_end", "message": "of 12 tokens"}
    decided = {"execution": EXECUTION, "n_tokens": 12, "total_steps": 4, "model": {"n_params": 1, "n_active_params": 1}}
    for _ in range(2):
        recording.record_prepared(db, held, **decided, warnings=[current])
        job = reads.get_job(db, held.job_id)
        assert job.warnings == [{"code": "upcycle_not_equal", "message": "of the parent"}, current]
        assert job.n_tokens == 12


def test_a_smaller_micro_batch_holds_for_every_later_attempt(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    prepare(db, held)
    recording.record_micro_batch(db, held, 6)
    job = out_of_memory(db, held)
    assert (job.status, job.status_reason, job.crashes) == ("queued", "memory ran out", 0)
    assert [event.data["code"] for event in reads.events_after(db, job.id, 0) if event.kind == "warning"] == ["a", "b"]
    again = claim(db, worker)
    assert again.job.execution == {"device": "cpu", "micro_batch": 4}
    prepare(db, again)
    assert reads.get_job(db, job.id).execution == {"device": "cpu", "micro_batch": 4}


def test_a_checkpoint_written_again_replaces_its_row(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    recording.record_checkpoint(db, held, percent=25, **CHECKPOINT)
    recording.record_checkpoint(db, held, percent=25, **CHECKPOINT | {"folder": "newer", "metrics": {"loss": 1.0}})
    (found,) = reads.list_checkpoints(db, held.job_id)
    assert (found.folder, found.metrics, found.fence) == ("newer", {"loss": 1.0}, 1)


def test_a_job_has_one_snapshot_the_newest(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    for step in (10, 20):
        recording.record_snapshot(db, held, step=step, folder=f"s{step}", manifest_sha256="m")
    found = reads.find_snapshot(db, held.job_id)
    assert found is not None
    assert (found.step, found.folder) == (20, "s20")


def test_rewinding_forgets_the_steps_past_the_snapshot(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    recording.record_steps(db, held, STEPS)
    recording.record_snapshot(db, held, step=2, folder="s2", manifest_sha256="m")
    recording.rewind(db, held, 1)
    assert reads.series(db, held.job_id)["step"] == [1]
    assert reads.find_snapshot(db, held.job_id) is None


def test_events_are_numbered_without_a_gap(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    recording.record_event(db, held, "warning", {"code": "w", "message": "m"})
    recording.record_checkpoint(db, held, percent=0, **CHECKPOINT)
    recording.heartbeat(db, held)
    queue.finish(db, held, "succeeded")
    events = reads.events_after(db, held.job_id, 0)
    assert [(event.seq, event.kind) for event in events] == [
        (1, "status"), (2, "status"), (3, "warning"), (4, "checkpoint"), (5, "status"),
    ]  # fmt: skip
    assert [event.seq for event in reads.events_after(db, held.job_id, 3, limit=1)] == [4]
    assert reads.get_job(db, held.job_id).event_seq == 5


def test_reports_of_a_job_that_go_together_are_recorded_in_their_order(db: Database, worker: WorkerIdentity) -> None:
    held = running(db, worker)
    recording.record_steps(db, held, STEPS)
    decided = {"execution": EXECUTION, "n_tokens": 9, "total_steps": 4, "model": {"n_params": 1, "n_active_params": 1}}
    warnings = [{"code": "a", "message": "new"}, {"code": "b", "message": "new"}]
    again = STEPS | {"train_loss": [7.0] * len(STEPS["step"])}
    reports = [
        Report(held, progress={"step": 0}),
        recording.prepared_report(held, **decided, warnings=warnings),
        recording.rewinding(held, 0),
        recording.event_report(held, "warning", {"code": "resumed", "message": "from 0"}),
        Report(held, {name: figures[:1] for name, figures in again.items()}, {"step": 1}),
        Report(held, {name: figures[1:] for name, figures in again.items()}, {"step": 2}),
        recording.checkpoint_report(held, percent=25, **CHECKPOINT),
        recording.snapshot_report(held, step=2, folder="s2", manifest_sha256="m"),
    ]
    recording.record(db, Report.merged(reports))
    events = reads.events_after(db, held.job_id, 0)
    assert [event.data.get("code", event.kind) for event in events][-4:] == ["a", "b", "resumed", "checkpoint"]
    assert [event.seq for event in events] == list(range(1, reads.get_job(db, held.job_id).event_seq + 1))
    assert reads.series(db, held.job_id)["train_loss"] == again["train_loss"]
    assert reads.get_job(db, held.job_id).progress == {"step": 2}
    assert reads.find_snapshot(db, held.job_id) is not None
