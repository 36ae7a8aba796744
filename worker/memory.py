"""Count of the kernel's out-of-memory kills, which tells such a kill from any other SIGKILL.

Knows no job. Linux only; elsewhere nothing is ever counted.
"""

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup/memory.events")
_MACHINE = Path("/proc/vmstat")


def oom_kills(*sources: Path) -> int:
    """Out-of-memory kills so far, in this container where it has its own count (cgroup v2), else on the machine."""
    for source in sources or (_CGROUP, _MACHINE):
        try:
            lines = source.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0
