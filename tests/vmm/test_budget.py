# SPDX-License-Identifier: Apache-2.0
"""What guests may make the process hold."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading

from vmm.budget import KEPT, Budget, dax_slots, raise_descriptor_limit


def test_a_budget_gives_what_it_has_and_no_more() -> None:
    budget = Budget(10)
    assert budget.ask(4) and budget.ask(6)
    assert not budget.ask(1)
    budget.put_back(4)
    assert budget.used == 6
    assert not budget.ask(5) and budget.ask(4)
    assert not Budget(10).ask(2**64 - 1)


def test_threads_together_get_no_more_than_there_is() -> None:
    budget, got = Budget(1000), []

    def take() -> None:
        count = 0
        while budget.ask(1):
            count += 1
        got.append(count)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(got) == budget.used == 1000


def test_the_limit_is_raised_to_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
        most = raise_descriptor_limit()
        assert most == resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_dax_slots_are_no_more_than_descriptors_and_mappings() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (2048, 2048));"
        "import vmm.budget as b, builtins; real = open\n"
        "def fake(path, *more):\n"
        "    if str(path).endswith('nr_open'): raise OSError\n"
        "    return real(path, *more)\n"
        "builtins.open = fake; print(b.dax_slots().limit)"
    )
    few = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(few) == (2048 - KEPT) // 2
    with open("/proc/sys/vm/max_map_count") as file:
        assert 2 * dax_slots().limit < int(file.read())
