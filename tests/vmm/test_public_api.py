# SPDX-License-Identifier: Apache-2.0
"""The names of ``vmm``: exported, printed so that they can be pasted, compared, and held by type checkers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

import vmm
from vmm import Exit, Machine, StopReason
from vmm.config.cpu_template import Bits
from vmm.testing import tiny_guest

CONFIGS: list[tuple[object, str]] = [
    (vmm.VmConfig("vmlinux", memory="1G"), "VmConfig('vmlinux', memory='1G')"),
    (
        vmm.VmConfig("k", memory=(1 << 20) + 4096, entropy=True),
        "VmConfig('k', memory='1028K', entropy=EntropyConfig())",
    ),
    (
        vmm.VmConfig("k", drives=[vmm.DriveConfig("a b.img", read_only=True, queues=2)], cpus=2),
        "VmConfig('k', cpus=2, drives=(DriveConfig('a b.img', read_only=True, queues=2),))",
    ),
    (vmm.VmConfig("k"), "VmConfig('k')"),
    (vmm.NetConfig("tap0", mtu=1500), "NetConfig(tap='tap0', mtu=1500)"),
    (vmm.NetworkPolicy(["pypi.org"]), "NetworkPolicy(allow=('pypi.org',))"),
    (vmm.VsockConfig(3, "v.sock"), "VsockConfig(3, 'v.sock')"),
    (vmm.ShareConfig("tag", "/srv", dax=2 << 20), "ShareConfig('tag', '/srv', dax=2097152)"),
    (vmm.BalloonConfig(), "BalloonConfig()"),
    (vmm.BalloonConfig(64, deflate_on_oom=False), "BalloonConfig(amount_mib=64, deflate_on_oom=False)"),
    (vmm.MmdsConfig(["eth0"], version="V2"), "MmdsConfig(('eth0',), version='V2')"),
    (vmm.RateLimiterConfig(ops=(1, 2, 3)), "RateLimiterConfig(ops=(1, 2, 3))"),
    (vmm.EntropyConfig(), "EntropyConfig()"),
    (vmm.CpuTemplate(msrs={1: Bits(3, 1)}), "CpuTemplate(msrs={1: Bits(3, 1)})"),
]


def test_every_name_is_there() -> None:
    assert len(vmm.__all__) == len({getattr(vmm, name) for name in vmm.__all__})
    with pytest.raises(AttributeError, match="no attribute 'Machin'"):
        _ = vmm.Machin  # type: ignore[attr-defined]


@pytest.mark.parametrize(("config", "text"), CONFIGS, ids=lambda value: str(value)[:30])
def test_printed_as_it_is_made(config: object, text: str) -> None:
    assert repr(config) == text
    names = {name: getattr(vmm, name) for name in vmm.__all__} | {"Bits": Bits}
    again = eval(text, names)
    assert again == config and again is not config and not again != config


def test_what_differs_is_not_equal() -> None:
    drive = vmm.DriveConfig("a")
    for name, value in {"read_only": True, "queues": 2, "engine": "sync", "path": "b"}.items():
        other = copy.copy(drive)
        assert other == drive
        setattr(other, name, value)
        assert other != drive, name
    assert vmm.EntropyConfig() != vmm.BalloonConfig()
    assert vmm.VmConfig("k", drives=[drive]) != vmm.VmConfig("k")


def test_every_configuration_is_exported_and_shown_whole() -> None:
    shown = {type(config) for config, _ in CONFIGS}
    for name in vmm.__all__:
        kind = getattr(vmm, name)
        if name.endswith("Config"):
            assert kind in shown | {vmm.DriveConfig}
            assert kind.OPTIONS and set(vars(_one(kind))) == set(kind.OPTIONS), name


def _one(kind: type) -> object:
    return next((config for config, _ in CONFIGS if type(config) is kind), vmm.DriveConfig("a"))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: vmm.DriveConfig("a", readonly=True), r"no parameter 'readonly'; did you mean read_only\?"),  # type: ignore[call-arg]
        (lambda: vmm.DriveConfig("a", path="b"), "was given path twice"),  # type: ignore[misc]
        (lambda: vmm.DriveConfig("a", True), "takes 1 values by position, not 2"),  # type: ignore[call-arg]  # what is tested
        (lambda: vmm.DriveConfig(), "DriveConfig needs path: a raw image"),  # type: ignore[call-arg]
    ],
)
def test_a_call_that_is_none_says_why(make: Callable[[], object], problem: str) -> None:
    with pytest.raises(TypeError, match=problem):
        make()


def test_a_misspelt_attribute_is_refused() -> None:
    drive = vmm.DriveConfig("a")
    with pytest.raises(AttributeError, match=r"did you mean read_only\?"):
        drive.readonly = True


def test_a_misspelt_name_is_refused_where_it_is_read() -> None:
    with pytest.raises(AttributeError, match=r"DriveConfig has no parameter 'readonly'; did you mean read_only\?"):
        vmm.DriveConfig("a").readonly  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match=r"module 'vmm' has no attribute 'Machne'; did you mean Machine\?"):
        vmm.Machne  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(vmm.DriveConfig("a"), "__nothing__")
    assert pickle.loads(pickle.dumps(vmm.DriveConfig("a", read_only=True))) == vmm.DriveConfig("a", read_only=True)
    assert copy.deepcopy(vmm.DriveConfig("a")) == vmm.DriveConfig("a")


def test_dir_lists_what_can_be_imported() -> None:
    names = dir(vmm)
    assert {"__version__", *vmm.__all__} <= {*names} and "TYPE_CHECKING" not in names


def test_a_machine_prints_as_what_it_is(tmp_path: Path) -> None:
    guest = tiny_guest(str(tmp_path), b"\xf4")
    with Machine(guest, memory="4M") as vm:
        assert repr(vm) == f"Machine({guest!r}, Not started)"


def test_an_exit_is_a_value() -> None:
    ended = Exit(StopReason.GUEST_EXIT, 7)
    assert ended == Exit(StopReason.GUEST_EXIT, 7) and ended != Exit(StopReason.GUEST_EXIT, 8) and ended != 7
    assert len({ended, Exit(StopReason.GUEST_EXIT, 7)}) == 1
    assert eval(repr(ended), {"Exit": Exit, "StopReason": StopReason}) == ended
    assert pickle.loads(pickle.dumps(ended)) == ended
    assert (str(ended), ended.status) == ("guest exit 7", 7)
    assert not isinstance(ended, BaseException)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"memry": "1G"}, r"Machine has no parameter 'memry'; did you mean memory\?"),
        ({"xyz": 1}, "Machine has no parameter 'xyz'$"),
    ],
)
def test_a_misspelt_parameter(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(TypeError, match=problem):
        Machine("vmlinux", **settings)  # type: ignore[arg-type]


def test_no_kernel() -> None:
    with pytest.raises(TypeError, match="needs a kernel"):
        Machine(memory="1G")
