# SPDX-License-Identifier: Apache-2.0
"""The jailer's options, cgroups and limits, and what it says where something of them cannot be."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jail.jailed import ID, ROOT, Jailed
from vmm.commands import cli
from vmm.commands import jailer as command
from vmm.errors import ConfigError
from vmm.jail.jailer import Jail

PARENT = f"pyvmm-test-{os.getpid()}"


@pytest.fixture
def jail(tmp_path: Path) -> Iterator[Jailed]:
    if os.geteuid():
        pytest.skip("LAYER MISSING: jail: needs root")
    jailed = Jailed(tmp_path)
    yield jailed
    jailed.close()


def stopped(jail: Jailed, *options: str, uid: int | None = None) -> str:
    """What the jailer says instead of going in; its exit code is 1."""
    line = jail.command(*options)
    if uid is not None:
        line = [word.replace(f"--uid={jail.uid}", f"--uid={uid}") for word in line]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1, done
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix("pyvmm jailer: ").strip()


def test_both_ways_to_write_an_option() -> None:
    words = "--id=a --exec-file /x --uid 1 --gid=2 --cgroup cpu.shares=3 --cgroup=pids.max=4"
    words += " --daemonize -- --a=b --id c"
    parsed = cli.parse("jailer", command, words.split())
    assert [parsed.id, parsed.exec_file, parsed.uid, parsed.gid] == ["a", "/x", "1", "2"]
    assert parsed.cgroup == ["cpu.shares=3", "pids.max=4"]
    assert parsed.daemonize and not parsed.new_pid_ns
    assert parsed.chroot_base_dir == "/srv/jailer" and parsed.cgroup_version == "1"
    assert parsed.vmm == ["--a=b", "--id", "c"]
    # Left to argparse, which takes a hyphen for a value.
    parsed = cli.parse("jailer", command, ["--id", "a", "--parent-cgroup", "-", "--", "--a=b"])
    assert (parsed.parent_cgroup, parsed.vmm) == ("-", ["--a=b"])


@pytest.mark.parametrize(
    ("words", "named"),
    [("--nothing", "unrecognized arguments: --nothing;"), ("--id", "--id: expected one argument"),
     ("--id --uid 1", "--id: expected one argument"), ("--daemonize=1", "--daemonize: ignored explicit argument '1'"),
     ("stray", "unrecognized arguments: stray"), ("--exec-fil /x", "--exec-fil /x; did you mean --exec-file?")],
)  # fmt: skip
def test_a_mistake_in_an_option_is_named(words: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    required = [f"{each}=1" for each in command.REQUIRED]
    assert cli.parse("jailer", command, [*required, *words.split(), "--", "--no-api"]) == 1
    assert named in capsys.readouterr().err


def test_help_and_version() -> None:
    for word, said in (("--help", "--chroot-base-dir"), ("--version", "Jailer v1.12.1\n\npyvmm ")):
        line = ["python3", "-m", "vmm", "jailer", word]
        assert said in subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--id a/b", "--id a/b: must be 1 to 64 letters, digits and hyphens"),
        ("--id a_b", "--id a_b: must be"),
        (f"--id {'a' * 65}", "must be 1 to 64"),
        ("--id=", "--id: must be"),
        ("--exec-file /bin/true", "--exec-file /bin/true: must be pyvmm or a link to it"),
        ("--exec-file /nowhere", "--exec-file /nowhere: must be an existing program"),
        ("--uid -1", "--uid -1: must be a number"),
        ("--gid root", "--gid root: must be a number"),
        ("--gid 4294967296", "--gid 4294967296: must be a number from 0 to 4294967294"),
        ("--uid 4294967295", "--uid 4294967295: must be a number from 0 to 4294967294"),
        (f"--uid {'9' * 5000}", "must be a number from 0 to 4294967294"),
        ("--chroot-base-dir /nowhere", "--chroot-base-dir /nowhere: must be an existing directory"),
        ("--netns /nowhere", "open /nowhere: No such file"),
        ("--netns /dev/null", "setns /dev/null: Invalid argument"),
        ("--cgroup-version 3", "--cgroup-version 3: must be 1 or 2"),
        ("--cgroup cpu.shares", "--cgroup cpu.shares: must be FILE=VALUE"),
        ("--cgroup shares=1", "--cgroup shares=1: must be FILE=VALUE"),
        ("--cgroup cpu.shares=", "must be FILE=VALUE"),
        ("--cgroup ../cpu.shares=1", "must be FILE=VALUE"),
        ("--cgroup magic.wand=1", "controller magic is not"),
        ("--cgroup-version 2 --cgroup magic.wand=1", "controller magic is not"),
        ("--parent-cgroup /a", "--parent-cgroup /a: must be a relative path"),
        ("--parent-cgroup a/../b", "must be a relative path"),
        ("--resource-limit cpu=1", "--resource-limit cpu=1: must be fsize=BYTES or no-file=NUMBER"),
        ("--resource-limit fsize", "must be fsize=BYTES"),
        ("--resource-limit fsize=x", "--resource-limit fsize=x: must be a number"),
        ("--resource-limit fsize=18446744073709551616", "fsize=18446744073709551616: must be a number below 2^64"),
        (f"--resource-limit no-file={'9' * 5000}", "must be a number below 2^64"),
        ("--resource-limit no-file=18446744073709551615", "setrlimit no-file: "),
    ],
)
def test_a_mistake_in_a_value_is_named(jail: Jailed, options: str, problem: str) -> None:
    assert problem in stopped(jail, *options.split())
    assert not (jail.root / "dev").exists()


def test_a_missing_option_is_named(jail: Jailed) -> None:
    for name in command.REQUIRED:
        words = cli.parse("jailer", command, [f"{each}=1" for each in command.REQUIRED if each != name])
        assert words is not None
        assert command.main(words) == 1


def test_mistakes_in_the_vmms_own_options_are_told_outside(jail: Jailed) -> None:
    line = jail.command(vmm=("--no-such-option",))
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 153
    assert "--no-such-option" in done.stderr
    assert not (jail.root / "dev").exists()


def test_files_are_read_before_the_jail(jail: Jailed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYVMM_CONFIG", str(tmp_path))
    (tmp_path / "config.toml").write_text('[serve]\nlevel = "Loud"\n')
    assert stopped(jail).startswith(f"{tmp_path}/config.toml:2: level Loud: ")


def test_a_jail_is_entered_once(jail: Jailed) -> None:
    jail.start()
    jail.request("GET", "/")
    assert "mknod /dev/net/tun: File exists" in stopped(jail)


@pytest.fixture
def hierarchies() -> Iterator[None]:
    yield
    for path in sorted(Path("/sys/fs/cgroup").rglob(f"*{PARENT}*/**/"), reverse=True):
        path.rmdir()
    for path in Path("/sys/fs/cgroup").rglob(f"{PARENT}"):
        path.rmdir()


def _has_v1(*controllers: str) -> bool:
    mounts = Path("/proc/mounts").read_text()
    return all(re.search(rf" cgroup \S*\b{name}\b", mounts) for name in controllers)


def test_cgroups_of_version_1(jail: Jailed, hierarchies: None) -> None:
    if not _has_v1("cpu", "pids", "cpuset"):
        pytest.skip("LAYER MISSING: cgroup version 1 with cpu, pids and cpuset")
    settings = {"cpu.shares": "10", "pids.max": "100", "cpuset.cpus": "0"}
    words = [f"--cgroup={name}={value}" for name, value in settings.items()]
    jail.start("--parent-cgroup", f"{PARENT}/below", *words)
    jail.request("GET", "/")
    for name, value in settings.items():
        place = Path("/sys/fs/cgroup", name.split(".")[0], PARENT, "below", ID)
        assert (place / name).read_text().strip() == value
        assert str(jail.pid) in (place / "tasks").read_text().split()
    assert Path("/sys/fs/cgroup/cpuset", PARENT, "below", ID, "cpuset.mems").read_text().strip()
    os.kill(jail.pid, signal.SIGTERM)
    jail.end()


def test_the_parent_cgroup_of_version_2_is_joined(jail: Jailed, hierarchies: None) -> None:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    unified = next((Path(path) for _, path, kind, *_ in mounts if kind == "cgroup2"), None)
    if unified is None:
        pytest.skip("LAYER MISSING: cgroup version 2")
    assert "is not a cgroup" in stopped(jail, "--cgroup-version", "2", "--parent-cgroup", PARENT)
    (unified / PARENT).mkdir()
    jail.start("--cgroup-version", "2", "--parent-cgroup", PARENT)
    jail.request("GET", "/")
    assert str(jail.pid) in (unified / PARENT / "cgroup.procs").read_text().split()
    os.kill(jail.pid, signal.SIGTERM)
    jail.end()


def test_the_files_of_every_cgroup_of_version_2_need_no_controller(jail: Jailed, hierarchies: None) -> None:
    jail.start("--cgroup-version", "2", "--parent-cgroup", PARENT, "--cgroup", "cgroup.max.descendants=5")
    jail.request("GET", "/")
    (place,) = Path("/sys/fs/cgroup").rglob(f"{PARENT}/{ID}")
    assert (place / "cgroup.max.descendants").read_text() == "5\n"
    assert str(jail.pid) in (place / "cgroup.procs").read_text().split()
    os.kill(jail.pid, signal.SIGTERM)
    jail.end()


def test_resource_limits(jail: Jailed) -> None:
    jail.start("--resource-limit=fsize=250000000", "--resource-limit", "no-file=1500")
    jail.request("GET", "/")
    limits = Path(f"/proc/{jail.pid}/limits").read_text()
    assert re.search(r"^Max file size +250000000 +250000000 ", limits, re.MULTILINE)
    assert re.search(r"^Max open files +1500 +1500 ", limits, re.MULTILINE)


def test_no_limit_is_a_limit_too(jail: Jailed) -> None:
    """The largest number that Firecracker takes means that to the kernel."""
    jail.start(f"--resource-limit=fsize={(1 << 64) - 1}")
    jail.request("GET", "/")
    limits = Path(f"/proc/{jail.pid}/limits").read_text()
    assert re.search(r"^Max file size +unlimited +unlimited ", limits, re.MULTILINE)


QCOW2 = {"drives": [{"drive_id": "d", "path_on_host": "/image", "is_root_device": False, "is_read_only": False,
                     "image_format": "qcow2"}]}  # fmt: skip
PASST = {"network_interfaces": [{"iface_id": "e", "mode": "user"}]}
POLICY = {"network_interfaces": [{"iface_id": "e", "mode": "auto", "policy": {"allow": ["pypi.org"]}}]}
OWN_TAP = {"network_interfaces": [{"iface_id": "e", "mode": "auto"}]}


@pytest.mark.parametrize("option", ["", "--no-seccomp"])
@pytest.mark.parametrize(
    ("section", "problem"),
    [
        (QCOW2, "disk /image: needs qemu-storage-daemon to be started, and there are no programs in a jail"),
        (PASST, "net user: needs passt to be started, and there are no programs in a jail"),
        (OWN_TAP, "net auto: is not permitted: this process may not make a tap"),
        (POLICY, "net policy: is not permitted: this process may not ask the host's nameservers"),
    ],
)
def test_what_starts_programs_is_refused_in_one_line(
    jail: Jailed, section: dict[str, object], problem: str, option: str
) -> None:
    jail.put("image", b"QFI\xfb" + bytes(508))
    jail.put("kernel", bytes(4096))
    vmm = jail.configure(boot_source={"kernel_image_path": "/kernel"}, **{"drives": [], **section})
    line = jail.command(vmm=(*vmm, *option.split()))
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1, done
    assert problem in done.stderr and done.stderr.count("\n") == 1


def test_a_jail_checks_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--chroot-base-dir"):
        Jail("/x", "a", 0, 0, chroot_base_dir=str(tmp_path / "none"))
