# SPDX-License-Identifier: Apache-2.0
"""Configuration: sizes as people write them, and every wrong value in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.declared import type_stored
from vmm.config import parse_size
from vmm.config.cpu_template import CpuTemplate
from vmm.config.devices import DEVICES, DriveConfig, NetworkPolicy, RateLimiterConfig, ShareConfig
from vmm.config.option import REQUIRED, Config
from vmm.config.vm import DEFAULT_CMDLINE, VmConfig
from vmm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 << 20), ("2G", 2 << 30), ("2g", 2 << 30), ("2GiB", 2 << 30), ("2GB", 2 << 30), ("65536", 65536),
        ("1.5G", 3 << 29), ("64k", 65536), (" 1 G ", 1 << 30), ("1T", 1 << 40), (4096, 4096),
    ],
)  # fmt: skip
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_size("memory", text) == size


@pytest.mark.parametrize("text", ["", "M", "-1G", "1X", "1..5G", "1e9", "0x10", "1GM", "٣G", "1.G", "G1", "9" * 40])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match=r"e\.g\. 512M or 2G"):
        parse_size("memory", text)


@pytest.mark.parametrize("memory", ["0", 0, -1, "4095", "999999T", 1 << 70])
def test_memory_out_of_range(memory: int | str) -> None:
    with pytest.raises(ConfigError, match=r"memory .*must be 1M to 1T"):
        VmConfig("k", memory=memory)


@pytest.mark.parametrize("cpus", [0, -1, 65, 1 << 40])
def test_cpus_out_of_range(cpus: int) -> None:
    with pytest.raises(ConfigError, match="must be 1 to 64"):
        VmConfig("k", cpus=cpus)


@pytest.mark.parametrize("console", ["", "tty", "file", "file:", "FILE:x", "unix:"])
def test_console_out_of_range(console: str) -> None:
    with pytest.raises(ConfigError, match="console"):
        VmConfig("k", console=console)


def test_disk_options() -> None:
    drive = DriveConfig.parse("a,,b.img,ro")
    assert (drive.path, drive.read_only) == ("a,b.img", True)
    assert not DriveConfig.parse("a.img").read_only
    with pytest.raises(ConfigError, match="unknown option 'rw'; allowed: ro"):
        DriveConfig.parse("a.img,rw")
    with pytest.raises(ConfigError, match="disk path: is empty"):
        DriveConfig.parse(",ro")


def test_every_disk_option() -> None:
    drive = DriveConfig.parse(
        "a.img,id=data,queues=4,engine=io_uring,direct,cache=unsafe,bps=100M,iops=5000,format=qcow2"
    )
    assert (drive.id, drive.queues, drive.engine, drive.direct) == ("data", 4, "io_uring", True)
    assert (drive.cache, drive.format) == ("unsafe", "qcow2")
    assert drive.rate_limiter is not None
    assert drive.rate_limiter.bandwidth == ((100 << 20) // 10, 0, 100)
    assert drive.rate_limiter.ops == (500, 0, 100)
    plain = DriveConfig.parse("a.img")
    assert (plain.queues, plain.engine, plain.direct, plain.cache) == (1, None, False, "writeback")
    snap = DriveConfig.parse("a.img,format=qcow2,backing=b,,.img,backing_format=qcow2")
    assert (snap.backing, snap.backing_format) == ("b,.img", "qcow2")
    assert (plain.rate_limiter, plain.format, plain.id) == (None, None, None)
    assert DriveConfig.parse("a.img,engine=sync").engine == "sync"


@pytest.mark.parametrize(
    "option", ["queues=0", "queues=9", "queues=x", "engine=aio", "cache=none", "bps=1", "iops=x", "format=vmdk",
               "backing=b", "backing_format=raw", "format=qcow2,backing_format=raw",
               "format=qcow2,backing=b,backing_format=vmdk"]
)  # fmt: skip
def test_disk_options_out_of_range(option: str) -> None:
    with pytest.raises(ConfigError, match=option.rpartition(",")[2].partition("=")[0]):
        DriveConfig.parse(f"a.img,{option}")


def test_root_is_named_by_its_place() -> None:
    root = DriveConfig("r", root=True, read_only=True)
    assert VmConfig("k", drives=[DriveConfig("a"), root]).full_cmdline == f"{DEFAULT_CMDLINE} root=/dev/vdb ro"
    assert VmConfig("k", drives=[root], append="root=LABEL=x").full_cmdline == f"{DEFAULT_CMDLINE} root=LABEL=x"
    assert VmConfig("k", drives=[root], cmdline="mine").full_cmdline == "mine"
    with pytest.raises(ConfigError, match="only one"):
        VmConfig("k", drives=[root, DriveConfig("b", root=True)])
    share = ShareConfig.parse("rootfs=/srv/a,,b,ro", root=True)
    assert VmConfig("k", shares=[share]).full_cmdline == f"{DEFAULT_CMDLINE} root=rootfs rootfstype=virtiofs ro"
    with pytest.raises(ConfigError):
        VmConfig("k", drives=[root], shares=[share])


def test_a_share_as_people_write_it() -> None:
    share = ShareConfig.parse("tag=/a,,b=c,ro,cache=always,dax=1G,threads=4,squash=1000:100")
    assert (share.tag, share.path, share.read_only, share.cache) == ("tag", "/a,b=c", True, "always")
    assert (share.dax, share.threads, share.squash) == (1 << 30, 4, (1000, 100))
    limited = ShareConfig.parse("tag=/a,bps=10M,iops=100").rate_limiter
    assert limited is not None and limited.ops == (10, 0, 100)
    assert not share.submounts and ShareConfig.parse("tag=/a,submounts").submounts
    for wrong in ("/dir", "t=", "=/dir", f"{'t' * 37}=/", "t t=/", "t=/,cache=some", "t=/,dax=3M", "t=/,threads=0",
                  "t=/,squash=1", "t=/,squash=root:root", "t=/,rw", "t=/,ro,ro",
                  "t=/,dax=2M,bps=1M"):  # fmt: skip
        with pytest.raises(ConfigError):
            ShareConfig.parse(wrong)
    with pytest.raises(ConfigError):
        VmConfig("k", shares=[ShareConfig("t", "/a"), ShareConfig("t", "/b")])


class Stranger:
    """A value of a type that no parameter has."""


@pytest.mark.parametrize("kind", [VmConfig, *DEVICES, NetworkPolicy, RateLimiterConfig, CpuTemplate])
def test_no_parameter_takes_a_value_of_another_type(kind: type[Config]) -> None:
    good = {"int": 3, "Sequence[str]": ["x"]}
    needed = {
        name: good.get(type_stored(kind, name), "x") for name, each in kind.OPTIONS.items() if each.default is REQUIRED
    }
    for name in kind.OPTIONS:
        for wrong in (Stranger(), [Stranger()]):
            with pytest.raises(TypeError, match=rf"^{kind.__name__}: {name} must be .+, not .+$"):
                kind(**needed | {name: wrong})


def test_what_a_wrong_type_is_told() -> None:
    drive = DriveConfig("a.img")
    for given, told in (
        ({"drives": drive}, "VmConfig: drives must be a list of DriveConfig, not a DriveConfig"),
        ({"drives": ["a.img"]}, "VmConfig: drives must be a list of DriveConfig, not ['a.img']"),
        ({"memory": None}, "VmConfig: memory must be a whole number or a string, not None"),
        ({"cpus": True}, "VmConfig: cpus must be a whole number, not True"),
        ({"initrd": 3}, "VmConfig: initrd must be a string or a path or None, not 3"),
    ):
        with pytest.raises(TypeError) as error:
            VmConfig("kernel", **given)
        assert str(error.value) == told
    assert VmConfig("kernel", drives=(each for each in [drive])).drives == (drive,)  # type: ignore[arg-type]
    assert DriveConfig(Path("a.img")) == drive


def test_a_change_of_a_configuration_is_checked() -> None:
    config = VmConfig("kernel")
    config.memory = "1G"
    assert config.memory == 1 << 30
    with pytest.raises(ConfigError, match="cpus 65: must be 1 to 64"):
        config.cpus = 65
    with pytest.raises(TypeError, match="VmConfig: nets must be a list of NetConfig, not 'user'"):
        config.nets = "user"  # type: ignore[assignment]
    assert (config.cpus, config.nets) == (1, ())
