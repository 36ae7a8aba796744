"""Which job a name, an id or the beginning of an id stands for, on SQLite and on PostgreSQL."""

from collections.abc import Callable

import pytest
import sqlalchemy as sa

from service.database.database import Database
from service.errors import Ambiguous, NotFound
from service.jobs.references import MAX_CANDIDATES, find_job_id
from tests.queued import submit

Submit = Callable[..., str]


@pytest.fixture
def submit_as(db: Database, monkeypatch: pytest.MonkeyPatch) -> Submit:
    """Submits a job whose id begins with `prefix`."""

    def of(prefix: str, name: str | None = None) -> str:
        job_id = prefix.ljust(32, "0")
        monkeypatch.setattr("service.jobs.submit.new_id", lambda: job_id)
        return submit(db, name=name).id

    return of


def candidates(db: Database, reference: str, *, certain: bool = False) -> list[str]:
    with pytest.raises(Ambiguous) as refused:
        find_job_id(db, reference, certain=certain)
    assert (refused.value.status, refused.value.code) == (409, "ambiguous_job")
    return [one.id for one in refused.value.candidates]


def assert_no_job(db: Database, reference: str) -> None:
    with pytest.raises(NotFound) as refused:
        find_job_id(db, reference)
    assert refused.value.code == "job_not_found"


def test_a_job_is_found_by_its_id_its_name_and_the_beginning_of_its_id(db: Database, submit_as: Submit) -> None:
    first, second = submit_as("0192aaaa1", "gato"), submit_as("0192aaaa2", "rato do rei/50 %")
    for certain in (False, True):
        assert find_job_id(db, first, certain=certain) == first
        assert find_job_id(db, "gato", certain=certain) == first
        assert find_job_id(db, "rato do rei/50 %", certain=certain) == second
        assert find_job_id(db, "0192aaaa2", certain=certain) == second
        assert find_job_id(db, second[:31], certain=certain) == second


@pytest.mark.parametrize(
    "reference",
    ["", "gat", "Gato", "gato ", "019", "0192AAAA1", "0192%", "_192aaaa1", "\0", "g\n", "0192b", "x" * 201, "'; --"],
)
def test_nothing_is_found_by_less(db: Database, submit_as: Submit, reference: str) -> None:
    submit_as("0192aaaa1", "gato")
    assert_no_job(db, reference)


def test_an_id_is_that_id_whatever_the_names(db: Database, submit_as: Submit) -> None:
    first = submit_as("0192aaaa1")
    submit_as("0192aaaa2", first)
    assert find_job_id(db, first) == first


def test_several_jobs_of_one_name_are_ambiguous_the_newest_first(db: Database, submit_as: Submit) -> None:
    ids = [submit_as(f"0192{letter}", "gato") for letter in "bca"]
    assert candidates(db, "gato") == ids[::-1]
    assert candidates(db, "gato", certain=True) == ids[::-1]


def test_the_beginning_of_several_ids_is_ambiguous(db: Database, submit_as: Submit) -> None:
    ids = [submit_as(prefix) for prefix in ("0192aaff", "0192ab", "0192aa0")]
    assert candidates(db, "0192aa") == [ids[2], ids[0]]


def test_a_name_stands_before_the_beginning_of_an_id_but_is_not_certain_then(db: Database, submit_as: Submit) -> None:
    other, named = submit_as("0192aaaa1"), submit_as("0192bbbb1", "0192aaaa")
    assert find_job_id(db, "0192aaaa") == named
    assert candidates(db, "0192aaaa", certain=True) == [named, other]
    own = submit_as("0192cccc1", "0192cccc")
    assert find_job_id(db, "0192cccc", certain=True) == own, "it is the name and the beginning of the id of one job"


def test_no_more_than_so_many_candidates_are_listed(db: Database, submit_as: Submit) -> None:
    ids = [submit_as(f"0192{n:04x}") for n in range(MAX_CANDIDATES + 2)]
    with pytest.raises(Ambiguous, match="more than 20 jobs") as refused:
        find_job_id(db, "0192")
    assert [one.id for one in refused.value.candidates] == ids[:1:-1]


def test_a_look_up_reads_an_index(db: Database) -> None:
    with db.read() as session:
        if db.engine.dialect.name != "sqlite":
            session.execute(sa.text("SET LOCAL enable_seqscan = off"))
        explain = "EXPLAIN QUERY PLAN" if db.engine.dialect.name == "sqlite" else "EXPLAIN"
        for condition, index in (("name = 'gato'", "ix_jobs_name"), ("id BETWEEN '0192' AND '0192g'", "jobs")):
            plan = str(session.execute(sa.text(f"{explain} SELECT id FROM jobs WHERE {condition}")).all())  # noqa: S608
            assert index in plan, plan
            assert "SCAN" not in plan.upper().replace("INDEX SCAN", "").replace("INDEX ONLY SCAN", ""), plan
