"""The folders of a job."""

from service.storage.job_folders import checkpoint_folder


def test_the_folders_of_a_job_are_named_after_the_claim_that_writes_them() -> None:
    assert checkpoint_folder("j", 1, 25) == "jobs/j/f1-25"
