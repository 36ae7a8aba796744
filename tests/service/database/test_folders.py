"""The type of the file system that holds a folder."""

import sys
from pathlib import Path

import pytest

from service.database.folders import file_system_type, find_file_system

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:5 / /proc rw - proc proc rw
41 22 0:44 / /home rw - nfs4 server:/home rw,vers=4.2
42 41 0:45 / /home/ana/local rw - xfs /dev/sdb1 rw
43 22 0:46 / /mnt/my\\040share rw - cifs //server/share rw
44 22 0:47 / /mnt/hidden rw - nfs server:/x rw
45 22 8:9 / /mnt/hidden rw - ext4 /dev/sdc1 rw
46 22 0:48 / /mnt/ação日 rw master:1 - fuse.sshfs me@there: rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/", "ext4"),
        ("/var/data", "ext4"),
        ("/home/ana", "nfs4"),
        ("/homework", "ext4"),
        ("/home/ana/local/data", "xfs"),
        ("/mnt/my share/data", "cifs"),
        ("/mnt/hidden", "ext4"),
        ("/mnt/ação日/x", "fuse.sshfs"),
    ],
)
def test_the_nearest_mount_decides(folder: str, kind: str) -> None:
    assert find_file_system(Path(folder), MOUNTS) == kind


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists its mounts in a file")
def test_this_machine_tells_its_file_system(tmp_path: Path) -> None:
    assert file_system_type(Path("/proc")) == "proc"
    assert file_system_type(tmp_path) not in (None, "proc")
