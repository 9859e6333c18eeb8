# SPDX-License-Identifier: Apache-2.0
"""Sandboxes on a Ray cluster: one VM a job, as many at once as the cluster has processors for.

python examples/ray_sandboxes.py [IMAGE [JOBS]]

Needs ray: ``pip install pyvmm-kvm[ray]``. Without ``RAY_ADDRESS`` it starts a cluster of this machine alone.
"""

from __future__ import annotations

import sys
from collections import Counter

import ray
from ray.experimental import sandbox

PROGRAM = "i=0; while [ $i -le {number} ]; do total=$((total + i * i)); i=$((i + 1)); done; echo $total"


def main(image: str = "debian", jobs: str = "20") -> int:
    """Run every job, print how they went; returns how many were wrong."""
    ray.init(runtime_env={"worker_process_setup_hook": "vmm.sandbox.ray.use_pyvmm"}, log_to_driver=False)
    waiting = {}
    for number in range(int(jobs)):
        # Ray begins an actor when a node has half a processor left for it.
        box = sandbox.create(image, cpu=0.5, memory="128Mi", ttl_seconds=300)
        written = box.write_file.remote("/tmp/job", PROGRAM.format(number=number))
        done = box.exec.remote(["/bin/sh", "/tmp/job"], timeout=60)
        waiting[done] = (number, box, written)
        del box
    answers: Counter[str] = Counter()
    while waiting:
        (first,), _ = ray.wait(list(waiting), num_returns=1)
        number, box, written = waiting.pop(first)
        try:
            ray.get(written)
            right = int(ray.get(first).stdout) == sum(i * i for i in range(number + 1))
            answers["right" if right else "wrong"] += 1
        except (ray.exceptions.RayError, ValueError) as error:
            answers["failed"] += 1
            print(f"job {number}: {error}", file=sys.stderr)
        # Its processor goes to the next one. An actor that nothing refers to ends, and its VM with it.
        ray.get(box.delete.remote())
        del box
    print(", ".join(f"{count} {how}" for how, count in sorted(answers.items())))
    ray.shutdown()
    return int(jobs) - answers["right"]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
