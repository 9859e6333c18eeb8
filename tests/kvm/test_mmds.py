# SPDX-License-Identifier: Apache-2.0
"""The metadata service of a machine made by the library, asked by this host's TCP through a guest that is a bridge."""

from __future__ import annotations

import http.client

import pytest

from tests.kvm.guests import PATIENCE
from tests.kvm.ring3 import Ring3
from vmm.config.devices import MmdsConfig, NetConfig
from vmm.mmds.store import Mmds


@pytest.mark.parametrize("address", ["169.254.169.254", "169.254.42.1"])
def test_a_machine_tells_what_its_document_says_now(namespace: None, address: str) -> None:
    nets = [NetConfig("service", mode="auto", id="in"), NetConfig("h", mode="auto", address="169.254.9.1/16")]
    config = MmdsConfig(["in"], address=address)
    with Ring3("bridge", nets=nets, mmds=config) as guest:
        guest.vm.mmds.put({"a": "before", "large": "x" * 50_000})
        guest.start()
        connection = http.client.HTTPConnection(address, timeout=PATIENCE)

        def get(path: str) -> bytes:
            connection.request("GET", path)
            return connection.getresponse().read()

        assert get("/a") == b"before"
        guest.vm.mmds.patch({"a": "after"})
        assert get("/a") == b"after"
        for _ in range(10):
            assert get("/large") == b"x" * 50_000
        connection.close()
        stats = guest.vm.stats
        assert stats["virtio-net0"]["mmds_connections_created"] == 1
        assert stats["virtio-net0"]["mmds_errors"] == 0
        assert "mmds_rx_accepted" not in stats["virtio-net1"]


def test_a_document_made_before_the_machine(namespace: None) -> None:
    document = Mmds(limit=100)
    net = NetConfig("service", mode="auto")
    config = MmdsConfig(["eth0"], version="V2")
    with Ring3("bridge", nets=[net], mmds=config, metadata=document) as guest:
        assert guest.vm.mmds is document
        assert document.version == "V2"
    with Ring3("bridge", nets=[net]) as guest:
        assert guest.vm.mmds.get() == {}
        assert guest.vm.nets["eth0"].mmds is None
