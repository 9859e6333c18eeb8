# SPDX-License-Identifier: Apache-2.0
"""``pyvmm jailer``: ``pyvmm serve`` in a jail, with Firecracker's jailer's own options."""

from __future__ import annotations

import os
import shutil
import sys

from vmm import __version__
from vmm.config import attribute, parse_count
from vmm.errors import ConfigError, VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.config import Arguments, Table

STATUS_OK = 0
STATUS_GENERIC = STATUS_ARGUMENTS = 1
# Of a user or a group; the next means "no change" to the kernel.
MAX_ID = (1 << 32) - 2

OPTIONS: Table = (
    ("--id", "ID", None, "the VM's id, 1 to 64 letters, digits and hyphens"),
    ("--exec-file", "FILE", None, "pyvmm or a link to it; its name becomes that of the jail's directory"),
    ("--uid", "UID", None, "user id of the VMM"),
    ("--gid", "GID", None, "group id of the VMM"),
    ("--chroot-base-dir", "DIR", "/srv/jailer", "directory of all jails (default: /srv/jailer)"),
    ("--netns", "FILE", None, "network namespace to enter"),
    ("--cgroup", "FILE=VALUE", [], "set a file of the VMM's cgroup, such as cpu.shares=10; may be repeated"),
    ("--cgroup-version", "N", "1", "1 or 2 (default: 1)"),
    ("--parent-cgroup", "PATH", None, "the parent of the VMM's cgroup (default: the program's name)"),
    ("--resource-limit", "WHAT=N", [], "fsize=BYTES, or no-file=NUMBER (default: no-file=2048); may be repeated"),
    (
        "--daemonize",
        None,
        False,
        "run in a new session; the jailer ends when the VM runs or the API answers",
    ),
    ("--new-pid-ns", None, False, "run as the first process of a new pid namespace"),
    ("--version", None, False, "print the versions of the jailer and of pyvmm"),
)
REST = "vmm"  # the attribute with the words after --: options of ``serve``
REQUIRED = ("--id", "--exec-file", "--uid", "--gid")


def main(args: Arguments) -> int:
    """Go into the jail, and serve there until the VM ends; its exit code."""
    if args.version:
        from vmm.api import API_VERSION

        print(f"Jailer v{API_VERSION}\n\npyvmm {__version__}")
        return STATUS_OK
    try:
        return _run(args)
    except VmmError as error:
        print(f"pyvmm jailer: {error}", file=sys.stderr)
        return STATUS_GENERIC


def _run(args: Arguments) -> int:
    from vmm import launched, threads
    from vmm.commands import cli, serve
    from vmm.jail import jailer
    from vmm.jail.preload import preload

    for option in REQUIRED:
        if getattr(args, attribute(option)) is None:
            raise ConfigError(option, "", "is missing")
    serve.check_id(args.id)
    check_program(args.exec_file)
    # Before the jail: in it argparse is missing, and nobody sees what is wrong.
    vmm = cli.parse("serve", serve, ["--id", args.id, *args.vmm])
    if isinstance(vmm, int):
        return vmm
    serve.from_files(vmm)
    jail = jailer.Jail(
        args.exec_file, args.id, parse_count("--uid", args.uid, 0, MAX_ID), parse_count("--gid", args.gid, 0, MAX_ID),
        chroot_base_dir=args.chroot_base_dir, netns=args.netns, cgroups=args.cgroup,
        cgroup_version=parse_count("--cgroup-version", args.cgroup_version, 0, None),
        parent_cgroup=args.parent_cgroup, resource_limits=args.resource_limit,
        daemonize=args.daemonize, new_pid_ns=args.new_pid_ns,
    )  # fmt: skip
    launched.spare_httptools()
    launched.spare_msgspec()
    preload()
    launched.finish_start()
    jailer.close_what_was_inherited()
    jail.enter()
    threads.no_programs = "and there are no programs in a jail"
    sys.argv[0] = jail.program
    status = serve.main(vmm, on_ready=jail.report_start, files=False)
    jail.report_start(status)  # where it did not come so far
    return status


def check_program(path: str) -> None:
    """:raises ConfigError: the file is neither this program nor a link to it"""
    from vmm.commands.link import is_link

    own = (sys.argv[0], os.path.join(os.path.dirname(sys.executable), "pyvmm"), shutil.which("pyvmm"))
    if not os.path.isfile(path):
        raise ConfigError("--exec-file", path, "must be an existing program")
    if not is_link(path) and not any(each and os.path.exists(each) and os.path.samefile(each, path) for each in own):
        raise ConfigError("--exec-file", path, "must be pyvmm or a link to it (pyvmm link firecracker DIR makes one)")
