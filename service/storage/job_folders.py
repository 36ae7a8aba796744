"""Where the files of a job lie, relative to the store, or to the data folder."""

from nanomoe import checkpoint


def job_folder(job_id: str) -> str:
    """The folder of a job's files."""
    return f"jobs/{job_id}"


def checkpoint_folder(job_id: str, fence: int, percent: int) -> str:
    """The folder of a checkpoint."""
    return f"{job_folder(job_id)}/{checkpoint.folder_name(fence, percent)}"
