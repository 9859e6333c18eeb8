# SPDX-License-Identifier: Apache-2.0
"""Make devices from their configurations. Only a configured device is imported."""

from __future__ import annotations

from vmm import threads
from vmm.closing import Closers
from vmm.errors import ConfigError
from vmm.machine.attach import Attached

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from virtio._limiter import RateLimiter
    from virtio.balloon import Balloon
    from virtio.blk.device import Block
    from virtio.device import VirtioDevice
    from virtio.fs.device import ShareDevice
    from virtio.net._policy import Policy
    from virtio.net.device import Net
    from virtio.net.host import Passt, Tap
    from virtio.net.resolver import Resolver
    from virtio.rng import Entropy
    from virtio.vsock.device import Listener, Vsock
    from vmm.config.devices import (
        BalloonConfig,
        DriveConfig,
        EntropyConfig,
        NetConfig,
        NetworkPolicy,
        RateLimiterConfig,
        ShareConfig,
        VsockConfig,
    )
    from vmm.config.vm import VmConfig
    from vmm.mmds.store import Mmds

    DeviceConfig = DriveConfig | NetConfig | ShareConfig | VsockConfig | EntropyConfig | BalloonConfig


def own(device: VirtioDevice) -> Attached:
    """A device of the embedding program's, which closes it.

    :raises ConfigError: the device cannot work
    """
    from virtio.device import check

    check(device)
    return Attached("", device.name, device, Closers())


class Builder:
    """Makes the devices of one machine, each with the number of its kind in its name.

    :param config: the machine's
    :param mmds: the metadata service, asked for by an interface that has it
    :param listener: the socket device's, made before; owned by the device. None: it is made from the configuration
    """

    def __init__(self, config: VmConfig, mmds: Callable[[], Mmds], listener: Listener | None = None) -> None:
        self._config = config
        self._mmds = mmds
        self._listener = listener
        self._numbers: dict[str, int] = {}
        self._closers = Closers()

    def all(self) -> Iterator[Attached]:
        """Every configured device, in the order in which the guest finds them.

        :raises ConfigError: a file or other resource that a configuration names cannot be used
        :raises HostError: the host failed
        """
        config = self._config
        for one in (*config.drives, *config.nets, *config.shares, config.vsock, config.entropy, config.balloon):
            if one is not None:
                yield self.make(one)
        if config.virtio_console:
            from virtio.console import Console

            yield self._made("console", "", Console())

    def make(self, config: DeviceConfig) -> Attached:
        """The device that `config` describes.

        :raises ConfigError: something that it names cannot be used
        :raises HostError: the host failed
        :raises TypeError: `config` is not a configuration of a device
        """
        from vmm.config.devices import BalloonConfig, DriveConfig, EntropyConfig, NetConfig, ShareConfig, VsockConfig

        try:
            match config:
                case DriveConfig():
                    number = self._number("drive")
                    return self._made("drive", config.id or f"drive_{number}", self._block(config, number))
                case NetConfig():
                    number = self._number("net")
                    name = config.id or f"eth{number}"
                    return self._made("net", name, self._net(config, number, name))
                case ShareConfig():
                    return self._made("share", config.tag, self._share(config, self._number("share")))
                case VsockConfig():
                    return self._made("vsock", "", self._vsock(config))
                case EntropyConfig():
                    return self._made("entropy", "", self._entropy(config))
                case BalloonConfig():
                    return self._made("balloon", "", self._balloon(config))
                case _:
                    raise TypeError(f"expected a device or its configuration, not {type(config).__name__}")
        except BaseException:
            self._closers.close()
            raise

    def close(self) -> None:
        """Give back a socket that no device was made for."""
        if self._listener is not None:
            self._listener.close()

    def _made(self, kind: str, id: str, device: VirtioDevice) -> Attached:
        device.poll_us = self._config.poll_us
        closers, self._closers = self._closers, Closers()
        return Attached(kind, id or device.name, device, closers)

    def _number(self, kind: str) -> int:
        number = self._numbers.get(kind, 0)
        self._numbers[kind] = number + 1
        return number

    def _block(self, config: DriveConfig, number: int) -> Block:
        from virtio.blk.device import Block, Disk

        path, image_format, discard_block = config.path, config.format, 0
        if image_format == "qcow2":
            _will_start("disk", path, "qemu-storage-daemon")
            from virtio.blk.qcow2 import Qcow2

            image = self._closers.own(
                Qcow2(
                    path, read_only=config.read_only, backing_file=config.backing,
                    backing_format=config.backing_format or "raw",
                )
            )  # fmt: skip
            path, image_format, discard_block = image.raw, "raw", image.cluster
        disk = self._closers.own(
            Disk(
                path, read_only=config.read_only, direct=config.direct, image_format=image_format,
                any_size=config.any_size, discard_block=discard_block,
            )
        )  # fmt: skip
        disk.path = config.path  # also where QEMU shows another one for it
        return Block(
            disk, serial=config.id or "", name=f"virtio-blk{number}", queues=config.queues,
            engine=config.engine, unsafe=config.cache == "unsafe", limiter=make_limiter(config.rate_limiter),
        )  # fmt: skip

    def _net(self, config: NetConfig, number: int, name: str) -> Net:
        from virtio.net.device import Net, default_mac, parse_mac
        from virtio.net.host import Passt, Tap

        backend: Tap | Passt
        policy: Policy | None = None
        resolver: Resolver | None = None
        if config.policy is not None and threads.no_programs:
            problem = "is not permitted: this process may not ask the host's nameservers"
            raise ConfigError("net", "policy", problem)
        if config.mode == "user":
            _will_start("net", "user", "passt")  # before what a jail cannot import
            from virtio.net._policy import Policy

            if config.policy is not None:
                from vmm.config.policy import PASST

                backend = self._closers.own(Passt(PASST))
            else:
                backend = self._closers.own(Passt(loopback=config.loopback))
                if not config.loopback:
                    policy = Policy(only_special=True)  # passt connects a frame to 127.0.0.1 to the host's
        elif config.fd is not None:
            backend = self._closers.own(Tap.inherited(config.fd))
        else:
            if config.mode == "auto" and threads.no_programs:
                raise ConfigError(
                    "net", "auto", "is not permitted: this process may not make a tap; make one beforehand (tap=NAME)"
                )
            backend = self._closers.own(Tap(config.tap or "pyvmm%d", config.queues, make=config.mode == "auto"))
            if config.mode == "auto":
                backend.configure(address=config.address, mtu=config.mtu)
                if config.nat and config.address:
                    from virtio.net.nat import Nat

                    self._closers.own(Nat(config.address, backend.name))
        if config.policy is not None:
            policy, resolver = self._policy(config, config.policy)
        mac = parse_mac(config.mac) if config.mac else default_mac(f"{backend.name}{number}")
        endpoint = None
        if (mmds := self._config.mmds) is not None and name in mmds.interfaces:
            from _socket import inet_aton  # `socket` imports more

            from virtio.net.mmds import Endpoint
            from vmm.jail import preload

            preload.load(preload.METADATA)  # the device's thread may not import
            self._mmds().configure(mmds)
            endpoint = Endpoint(self._mmds().serve, inet_aton(mmds.address))
        net = Net(
            backend, mac, mtu=config.mtu, pcap=config.pcap, rx_limiter=make_limiter(config.rx_rate_limiter),
            tx_limiter=make_limiter(config.tx_rate_limiter), mmds=endpoint, policy=policy,
            resolver=resolver, name=f"virtio-net{number}",
        )  # fmt: skip
        return self._closers.own(net)

    def _policy(self, net: NetConfig, config: NetworkPolicy) -> tuple[Policy, Resolver]:
        from _socket import inet_aton

        from virtio.net._policy import Policy
        from virtio.net.host import parse_address
        from virtio.net.resolver import Resolver
        from vmm.config.policy import GATEWAY, GUEST, RESOLVER, rules

        guest, bits, gateway = inet_aton(GUEST), 32, inet_aton(GATEWAY)
        if net.mode != "user":  # on a tap it has an address of the tap's network, or whichever it was given
            guest, bits = parse_address(net.address) if net.address else (bytes(4), 0)
            gateway = bytes(4)
            if bits and (int.from_bytes(guest, "big") ^ int.from_bytes(inet_aton(RESOLVER), "big")) >> 32 - bits == 0:
                problem = f"must be another network: {RESOLVER} in it is the address of a policy's nameserver"
                raise ConfigError("net addr", net.address, problem)
        allow, names = rules("allow", config.allow)
        policy = Policy(guest, gateway, inet_aton(RESOLVER), allow, rules("deny", config.deny)[0], guest_bits=bits)
        return policy, self._closers.own(Resolver(policy, inet_aton(RESOLVER), names))

    def _share(self, config: ShareConfig, number: int) -> ShareDevice:
        from virtio.fs.device import ShareDevice

        device = ShareDevice(
            config.tag, config.path, read_only=config.read_only, cache=config.cache,
            threads=config.threads, squash=config.squash, submounts=config.submounts, dax=config.dax,
            name=f"virtio-fs{number}", limiter=make_limiter(config.rate_limiter),
        )  # fmt: skip
        return self._closers.own(device)

    def _vsock(self, config: VsockConfig) -> Vsock:
        from virtio.vsock.device import Listener, Vsock

        listener, self._listener = self._listener, None
        return Vsock(self._closers.own(listener or Listener(config.path)), config.cid)

    def _entropy(self, config: EntropyConfig) -> Entropy:
        from virtio.rng import Entropy

        return Entropy(limiter=make_limiter(config.rate_limiter))

    def _balloon(self, config: BalloonConfig) -> Balloon:
        from virtio.balloon import Balloon
        from vmm.config.devices import check_amount

        check_amount(config.amount_mib, self._config.memory >> 20)
        return Balloon(
            config.amount_mib, deflate_on_oom=config.deflate_on_oom,
            stats_polling_interval_s=config.stats_interval_s, free_page_reporting=config.free_page_reporting,
        )  # fmt: skip


def make_limiter(config: RateLimiterConfig | None) -> RateLimiter | None:
    """The limiter that `config` describes; None: no limit."""
    if config is None:
        return None
    from virtio._limiter import RateLimiter

    return RateLimiter(config.bandwidth, config.ops)


def _will_start(field: str, value: str, program: str) -> None:
    if threads.no_programs:
        raise ConfigError(field, value, f"needs {program} to be started, {threads.no_programs}")
