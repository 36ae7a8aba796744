"""What tests of several routes start from."""

import pytest

from service.jobs import queue
from tests.api import Api
from tests.service.tiny_checkpoint import tiny_files


@pytest.fixture(scope="module")
def job_id(api: Api, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A job with a random model at 25 and at 100 percent."""
    claim = api.claim(api.submit()["id"])
    files = tiny_files(tmp_path_factory.mktemp("tiny") / "checkpoint")
    for percent in (25, 100):
        api.record_checkpoint(claim, percent, percent * 5, files)
    queue.finish(api.db, claim, "succeeded")
    return claim.job_id
