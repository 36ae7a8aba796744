"""The folders that a database and its data lie in: creating them, and the type of the file system that holds one."""

import re
from pathlib import Path

from service.errors import StartRefused

NETWORK_FILE_SYSTEMS = (
    *("nfs", "nfs4", "cifs", "smbfs", "smb2", "smb3", "afpfs", "afs", "webdav", "ncpfs"),
    *("ceph", "glusterfs", "lustre", "beegfs", "gpfs", "ocfs2", "gfs2", "fuse.sshfs", "fuse.s3fs", "fuse.rclone"),
    *("fuse.glusterfs", "fuse.ceph", "fuse.gcsfuse", "fuse.juicefs"),
)


def file_system_type(folder: Path) -> str | None:
    """The type of the file system that holds `folder`, as the system names it; None where it is unknown."""
    mounts = Path("/proc/self/mountinfo")
    if not mounts.exists():
        return None
    return find_file_system(folder.resolve(), mounts.read_text(encoding="utf-8", errors="surrogateescape"))


def find_file_system(folder: Path, mountinfo: str) -> str | None:
    """The type of the mount in Linux's `mountinfo` (proc(5)) that lies nearest above the absolute path `folder`."""
    found: tuple[int, str] | None = None
    for line in mountinfo.splitlines():
        fields, _, source = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields.split()[4]))
        # A later mount on the same point hides the earlier one.
        if folder.is_relative_to(point) and (found is None or len(point.parts) >= found[0]):
            found = (len(point.parts), source.split()[0])
    return found and found[1]


def make_folder(folder: Path) -> None:
    """Create a folder and those above it, unless they exist. Raises StartRefused."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartRefused(f"the folder {folder} cannot be made: {error.strerror}") from error
