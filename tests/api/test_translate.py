# SPDX-License-Identifier: Apache-2.0
"""One VM said in four ways: command line, ``VmConfig``, configuration file, ``GET /vm/config``; all mean the same."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.api import ApiError, translate, types
from vmm.api.actions import Vmm
from vmm.commands import cli, run
from vmm.config.devices import (
    BalloonConfig,
    DriveConfig,
    MmdsConfig,
    NetConfig,
    NetworkPolicy,
    RateLimiterConfig,
    ShareConfig,
    VsockConfig,
)
from vmm.config.option import Config
from vmm.config.vm import VmConfig
from vmm.errors import ConfigError

_PLAIN = {"format", "any_size", "engine", "id", "root", "append", "cmdline"}
_buckets = st.none() | st.tuples(st.integers(1, 1 << 40), st.integers(0, 1 << 40), st.integers(1, 1 << 20))
_limits = st.none() | st.builds(RateLimiterConfig, _buckets, _buckets)
_drives = st.builds(
    DriveConfig, st.just("/disk"), read_only=st.booleans(), root=st.booleans(), queues=st.integers(1, 8),
    engine=st.sampled_from(["sync", "io_uring"]), direct=st.booleans(),
    cache=st.sampled_from(["writeback", "unsafe"]), rate_limiter=_limits,
    format=st.sampled_from(["raw", "qcow2"]),
) | st.builds(
    DriveConfig, st.just("/disk"), engine=st.just("sync"), format=st.just("qcow2"), backing=st.just("/b"),
    backing_format=st.sampled_from([None, "raw", "qcow2"]),
)  # fmt: skip
_nets = st.one_of(
    st.builds(NetConfig, st.just("tap0"), mac=st.sampled_from([None, "06:00:00:00:00:01"]),
              rx_rate_limiter=_limits, tx_rate_limiter=_limits),
    st.builds(NetConfig, st.none(), mode=st.just("auto"), address=st.just("10.0.0.1/24"), nat=st.booleans(),
              mtu=st.sampled_from([None, 1400]), queues=st.integers(1, 8)),
    st.builds(NetConfig, st.none(), mode=st.just("user"), loopback=st.booleans(),
              pcap=st.sampled_from([None, "/pcap"])),
    st.builds(NetConfig, st.just("tap0"), policy=st.sampled_from(
        [NetworkPolicy(), NetworkPolicy(["pypi.org:443", "10.1.0.0/16"], deny=["10.1.9.0/24"])]
    )),
)  # fmt: skip
_shares = st.builds(
    ShareConfig, st.uuids().map(str), st.just("/share"), read_only=st.booleans(),
    cache=st.sampled_from(["auto", "always", "none"]), threads=st.integers(1, 32),
    squash=st.sampled_from([None, (1000, 1000)]), submounts=st.booleans(), rate_limiter=_limits,
) | st.builds(ShareConfig, st.uuids().map(str), st.just("/share"), dax=st.just(2 << 20))  # fmt: skip


def _facts(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_facts(each) for each in value]
    if not isinstance(value, Config):
        return value
    return {name: _facts(each) for name, each in vars(value).items() if name not in _PLAIN}


@given(
    st.lists(_drives, max_size=3).filter(lambda drives: sum(drive.root for drive in drives) < 2),
    st.lists(_nets, max_size=2),
    st.lists(_shares, max_size=2),
    st.booleans(),
    st.sampled_from([None, "console=ttyS0 mine", 'x="a  b" -- single']),
    st.sampled_from(["", "quiet", "root=/dev/nfs", 'y="c  root=d" -- init']),
    st.sampled_from([1 << 20, 512 << 20, (64 << 20) + 4096]),
)
def test_a_machine_by_a_file_is_the_machine(
    drives: list[DriveConfig], nets: list[NetConfig], shares: list[ShareConfig], every: bool, cmdline: str | None,
    append: str, memory: int,
) -> None:  # fmt: skip
    config = VmConfig(
        "/kernel", cmdline=cmdline, append=append, memory=memory, drives=drives, nets=nets,
        shares=shares, cpus=2, smt=every, entropy=every, balloon=BalloonConfig(0) if every else None,
        vsock=VsockConfig(3, "/vsock") if every else None, console="none" if every else "stdio",
        exit_port=None if every else 0xF4, poll_us=7 * every, track_dirty_pages=every,
        initrd="/initrd" if every else None, huge_pages="2M" if every else None,
    )  # fmt: skip
    text = msgspec.json.encode(translate.vm_body(config))
    again = translate.vm_config(msgspec.json.decode(text, type=types.VmConfiguration))
    assert _facts(again) == _facts(config)
    assert sorted(again.full_cmdline.split()) == sorted(config.full_cmdline.split())
    # What a file says, it says again.
    assert msgspec.json.encode(translate.vm_body(again)) != b""


def test_the_command_line_as_a_file() -> None:
    devices = ["--disk", "/d,queues=2", "--share", "work=/srv,ro", "--net", "auto,addr=10.0.0.1/24", "--rng"]
    more = ["--vsock", "cid=7,uds=/v", "--balloon", "16", "--append", "quiet"]
    args = cli.parse("run", run, ["/kernel", "/root.img,ro", *devices, *more])
    body = translate.vm_body(run.config_from(args))
    assert [drive.is_root_device for drive in body.drives] == [True, False]
    assert "root=" not in (body.boot_source.boot_args or "")
    again = translate.vm_config(body)
    assert sorted(again.full_cmdline.split()) == sorted(run.config_from(args).full_cmdline.split())
    assert (again.vsock and again.vsock.cid, again.balloon and again.balloon.amount_mib) == (7, 16)


def test_a_root_disk_is_the_first_as_in_firecracker() -> None:
    drives = [types.Drive(drive_id=name, is_root_device=name == "c", path_on_host=f"/{name}") for name in "abc"]
    whole = types.VmConfiguration(boot_source=types.BootSource(kernel_image_path="/k", boot_args="a"), drives=drives)
    config = translate.vm_config(whole)
    assert [drive.id for drive in config.drives] == ["c", "a", "b"]
    assert config.full_cmdline == "a root=/dev/vda rw"


def test_the_root_device_is_named_before_inits_own_words() -> None:
    root = types.Drive(drive_id="r", is_root_device=True, path_on_host="/r")
    source = types.BootSource(kernel_image_path="/k", boot_args='a="x  y" -- b')
    config = translate.vm_config(types.VmConfiguration(boot_source=source, drives=[root]))
    assert config.full_cmdline == 'a="x  y" root=/dev/vda rw -- b'
    # And a command line that was written as a file means the same.
    args = cli.parse("run", run, ["/kernel", "/root.img", "--append", 'a="x  y" -- b'])
    again = translate.vm_config(translate.vm_body(run.config_from(args))).full_cmdline
    assert again.endswith(' a="x  y" root=/dev/vda rw -- b')


def test_partuuid() -> None:
    root = types.Drive(drive_id="r", is_root_device=True, path_on_host="/r", partuuid="0eaa", is_read_only=True)
    whole = types.VmConfiguration(boot_source=types.BootSource(kernel_image_path="/k", boot_args=""), drives=[root])
    assert translate.vm_config(whole).full_cmdline == "root=PARTUUID=0eaa ro"


@pytest.mark.parametrize(("size", "refill", "bucket"), [(0, 5, None), (5, 0, None), (5, 6, (5, 0, 6))])
def test_a_bucket_that_never_fills_limits_nothing(size: int, refill: int, bucket: tuple[int, int, int] | None) -> None:
    limits = translate.limiter(types.RateLimiter(ops=types.TokenBucket(size=size, refill_time=refill)))
    assert limits is not None and limits.ops == bucket


def test_what_no_file_can_say() -> None:
    # Nothing is left out without a word.
    with pytest.raises(ConfigError, match=r"net fd 7: .*cannot be expressed in a configuration file"):
        translate.vm_body(VmConfig("/k", nets=[NetConfig(mode="fd", fd=7)]))
    mmds = MmdsConfig(["eth0"], imds_compat=True)
    with pytest.raises(ConfigError, match="mmds imds_compat True"):
        translate.vm_body(VmConfig("/k", nets=[NetConfig("tap0")], mmds=mmds))
    with pytest.raises(ConfigError, match="--kvm"):
        translate.vm_body(VmConfig("/k", kvm="/dev/other"))


def test_vhost_user_drives_are_refused() -> None:
    with pytest.raises(ConfigError, match="vhost-user"):
        translate.drive(types.Drive(drive_id="a", is_root_device=False, socket="/s"))


def test_a_cpu_template_whose_name_no_file_has_is_one_line() -> None:
    whole = types.VmConfiguration(boot_source=types.BootSource(kernel_image_path="k"), cpu_config="a\0b")
    with pytest.raises(ApiError, match="Configure CPU error: a\0b: embedded null byte"):
        Vmm().configure(whole)
