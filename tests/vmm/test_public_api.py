# SPDX-License-Identifier: Apache-2.0
"""The names of ``vmm``: exported, printed so that they can be pasted, compared, and held by type checkers."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from pathlib import Path

import pytest

import vmm
from vmm import Exit, Machine, StopReason
from vmm.kvm.cpu_template import Bits

CONFIGS: list[tuple[object, str]] = [
    (vmm.VmConfig("vmlinux", memory="1G"), "VmConfig('vmlinux', memory='1G')"),
    (
        vmm.VmConfig("k", memory=(1 << 20) + 4096, entropy=True),
        "VmConfig('k', memory='1028K', entropy=EntropyConfig())",
    ),
    (
        vmm.VmConfig("k", drives=[vmm.DriveConfig("a b.img", is_read_only=True, queues=2)], cpus=2),
        "VmConfig('k', cpus=2, drives=(DriveConfig('a b.img', is_read_only=True, queues=2),))",
    ),
    (vmm.VmConfig("k"), "VmConfig('k')"),
    (vmm.NetConfig("tap0", mtu=1500), "NetConfig(host_dev_name='tap0', mtu=1500)"),
    (vmm.VsockConfig(3, "v.sock"), "VsockConfig(3, 'v.sock')"),
    (vmm.FsConfig("tag", "/srv", dax=2 << 20), "FsConfig('tag', '/srv', dax=2097152)"),
    (vmm.BalloonConfig(), "BalloonConfig()"),
    (vmm.BalloonConfig(64, deflate_on_oom=False), "BalloonConfig(amount_mib=64, deflate_on_oom=False)"),
    (vmm.MmdsConfig(["eth0"], version="V2"), "MmdsConfig(('eth0',), version='V2')"),
    (vmm.RateLimiterConfig(ops=(1, 2, 3)), "RateLimiterConfig(ops=(1, 2, 3))"),
    (vmm.EntropyConfig(), "EntropyConfig()"),
    (vmm.CpuTemplate(msrs={1: Bits(3, 1)}), "CpuTemplate(cpuid={}, msrs={1: Bits(3, 1)})"),
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
    for name, value in {"is_read_only": True, "queues": 2, "io_engine": "Sync", "path_on_host": "b"}.items():
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
            assert set(inspect.signature(kind).parameters) == set(kind.__slots__), name


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


def test_settings_are_those_of_the_configuration() -> None:
    # The declaration that type checkers read is only for them: it is read as text.
    text = Path(vmm.__file__).with_name("settings.py").read_text()
    declared = dict(re.findall(r"^ {8}(\w+): (.+)$", text, re.MULTILINE))
    parameters = list(inspect.signature(vmm.VmConfig.__init__).parameters.values())[1:]
    assert declared == {parameter.name: parameter.annotation for parameter in parameters}
