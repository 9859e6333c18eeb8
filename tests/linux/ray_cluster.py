# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of two nodes on this host, with sandboxes of pyvmm on both, by Ray's own interface.

python -m tests.linux.ray_cluster IMAGE     # of a registry; ray is in PYTHONPATH; prints a JSON object
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import sys
import threading
import time
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.experimental import sandbox
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tests.page import Page, own_address
from vmm.sandbox import registry

HOOK = {"worker_process_setup_hook": "vmm.sandbox.ray.use_pyvmm"}
PATIENCE = 60


def error_of(reference: Any) -> list[str]:
    """The class of what a call fails with, and what it says."""
    try:
        return ["none", str(ray.get(reference, timeout=PATIENCE))]
    except ray.exceptions.RayTaskError as error:
        return [type(error.cause).__name__, str(error.cause)]
    except ray.exceptions.ActorDiedError as error:  # its last line is the cause
        return [type(error).__name__, str(error).strip().splitlines()[-1]]


def until_empty() -> list[str]:
    """Names of sandboxes that are left after a moment for their processes to end."""
    end = time.monotonic() + PATIENCE
    while (left := [each["name"] for each in registry.all_running()]) and time.monotonic() < end:
        time.sleep(0.02)
    return left


def made(node: str, image: str = "busybox", **more: Any) -> Any:
    """A sandbox on that node."""
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    return sandbox.Sandbox.options(num_cpus=0, scheduling_strategy=where).remote(image, memory="128Mi", **more)


def in_public(node: str, image: str) -> list[Any]:
    """What a sandbox of a registry's image says, which has a network to the host and no further."""
    with http.server.ThreadingHTTPServer(("0.0.0.0", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        box = made(node, image, network="public", dns=["192.0.2.53"])
        line = f"pwd; cat /etc/resolv.conf; wget -q -O - http://{own_address()}:{server.server_port}/"
        said = ray.get(box.exec.remote(line, shell="/bin/sh"), timeout=PATIENCE)
        ray.get(box.delete.remote(), timeout=PATIENCE)
        server.shutdown()
        return [said.exit_code, said.stdout]


def main() -> int:
    """Every scenario, one after the other."""
    found: dict[str, Any] = {}
    begun = time.monotonic()
    small = {"num_cpus": 4, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **small})
    cluster.add_node(**small)
    ray.init(address=cluster.address, runtime_env=HOOK, log_to_driver=False)
    found["up_s"] = time.monotonic() - begun
    try:
        here = ray.get_runtime_context().get_node_id()
        # This process's node is the first: the other one dies at the end.
        nodes = sorted((node["NodeID"] for node in ray.nodes()), key=lambda node: node != here)
        found["nodes"] = len(nodes)
        begun = time.monotonic()
        boxes = [made(node, env={"WHO": "ray"}, workdir="/work") for node in nodes]
        saying = [box.exec.remote("echo $WHO; pwd; uname -s", shell="/bin/sh") for box in boxes]
        said = ray.get(saying, timeout=PATIENCE)
        found["first_s"] = time.monotonic() - begun
        found["said"] = [[each.exit_code, each.stdout] for each in said]
        found["running"] = len({each["pid"] for each in registry.all_running()})
        one, two = boxes
        ray.get(one.write_file.remote("data", b"\0\xff"), timeout=PATIENCE)
        found["read"] = list(ray.get(one.read_file.remote("/work/data"), timeout=PATIENCE))
        found["read_only"] = ray.get(one.exec.remote("echo >/etc/x", shell="/bin/sh"), timeout=PATIENCE).exit_code
        found["other"] = error_of(two.read_file.remote("/work/data"))
        found["late"] = error_of(one.exec.remote(["sleep", "1000"], timeout=0.2))
        found["status"] = ray.get(one.get_status.remote(), timeout=PATIENCE).value
        found["config"] = ray.get(one.get_config.remote(), timeout=PATIENCE).image

        pid = {each["name"]: each["pid"] for each in registry.all_running()}
        os.kill(pid[ray.get(two.get_instance_id.remote(), timeout=PATIENCE)], signal.SIGKILL)
        try:
            ray.get(two.exec.remote(["true"]), timeout=PATIENCE)
        except ray.exceptions.RayActorError as error:
            found["killed"] = type(error).__name__
        ray.get(one.delete.remote(), timeout=PATIENCE)
        found["deleted"] = error_of(one.exec.remote(["true"]))
        found["after_kill_and_delete"] = until_empty()
        found["refused"] = error_of(made(nodes[0], network="host").get_status.remote())

        found["public"] = in_public(nodes[0], sys.argv[1])
        refusals = ({"network": "public", "dns": ["a b"]}, {"workdir": "work"}, {"image": "/no/such.tar"})
        found["bad"] = [error_of(made(nodes[0], **bad).get_status.remote())[1] for bad in refusals]

        begun = time.monotonic()
        short = made(nodes[1], ttl_seconds=1)
        ray.get(short.get_status.remote(), timeout=PATIENCE)
        found["second_s"] = time.monotonic() - begun
        found["after_ttl"] = until_empty()
        found["expired"] = ray.get(short.get_status.remote(), timeout=PATIENCE).value

        forgotten = made(nodes[0])
        ray.get(forgotten.get_status.remote(), timeout=PATIENCE)
        del forgotten
        found["after_forgotten"] = until_empty()

        last = made(nodes[1])
        ray.get(last.get_status.remote(), timeout=PATIENCE)
        cluster.remove_node(next(each for each in cluster.list_all_nodes() if each.node_id == nodes[1]), False)
        found["after_node_death"] = until_empty()
    finally:
        begun = time.monotonic()
        ray.shutdown()
        cluster.shutdown()
        found["down_s"] = time.monotonic() - begun
    found["files"] = os.listdir(registry.root())
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
