"""Memory that this process can still have: of the machine, and by its control groups."""

from __future__ import annotations

from pathlib import Path

from flashu_compile.system.memory import available_memory

GB = 1 << 30
MACHINE = f"MemTotal:  99999999 kB\nMemAvailable:   {8 * GB // 1024} kB\nBuffers: 1 kB"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_the_machine(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    assert available_memory(write(tmp_path, {"proc/meminfo": MACHINE})) == 8 * GB


def test_a_group_of_version_2_and_one_above(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/pod"
    write(tmp_path, {"proc/meminfo": MACHINE, "proc/self/cgroup": "0::/pod/app"})
    write(tmp_path, {f"{group}/app/memory.max": "max", f"{group}/app/memory.current": "5"})
    assert available_memory(tmp_path) == 8 * GB
    write(tmp_path, {f"{group}/memory.max": f"{4 * GB}", f"{group}/memory.current": f"{3 * GB}"})
    assert available_memory(tmp_path) == GB
    write(tmp_path, {f"{group}/memory.stat": f"anon 5\ninactive_file {GB // 2 - 7}\nactive_file 7"})
    assert available_memory(tmp_path) == GB + GB // 2


def test_a_group_of_version_1(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory"
    write(tmp_path, {"proc/meminfo": MACHINE, "proc/self/cgroup": "5:cpu:/\n4:memory:/docker/of-the-host"})
    write(tmp_path, {f"{group}/memory.limit_in_bytes": "9223372036854771712"})
    write(tmp_path, {f"{group}/memory.usage_in_bytes": f"{GB}"})
    assert available_memory(tmp_path) == 8 * GB
    write(tmp_path, {f"{group}/memory.limit_in_bytes": f"{3 * GB}"})
    assert available_memory(tmp_path) == 2 * GB
    own = f"inactive_file 1\nactive_file 2\ntotal_inactive_file {GB // 4}\ntotal_active_file {GB // 4}"
    write(tmp_path, {f"{group}/memory.stat": own})
    assert available_memory(tmp_path) == 2 * GB + GB // 2


def test_more_than_is_allowed_is_used(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "5"})
    write(tmp_path, {"sys/fs/cgroup/memory.current": "9"})
    assert available_memory(tmp_path) == 1
