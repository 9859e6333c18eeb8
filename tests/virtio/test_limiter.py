# SPDX-License-Identifier: Apache-2.0
"""Token buckets: what they grant in a given time, without sleeping: the waits that they name are added up."""

from __future__ import annotations

import pytest

from virtio._limiter import RateLimiter

MS = 1_000_000


def test_without_buckets_everything_is_granted() -> None:
    limiter = RateLimiter()
    assert all(limiter.ask(1 << 30) == 0 for _ in range(1000))
    assert limiter.throttled == 0


def test_a_full_bucket_grants_its_size_then_names_the_time_until_it_has_enough() -> None:
    limiter = RateLimiter(bandwidth=(1 << 20, 0, 1000))
    assert all(limiter.ask(1 << 16) == 0 for _ in range(16))
    wait = limiter.ask(1 << 19)
    assert 400 * MS < wait <= 500 * MS + 1  # half a bucket, less what came back meanwhile
    assert limiter.throttled == 1


def test_operations_are_limited_beside_bytes() -> None:
    limiter = RateLimiter(bandwidth=(1 << 30, 0, 1000), ops=(10, 0, 100))
    assert [limiter.ask(1) for _ in range(10)] == [0] * 10
    assert 5 * MS < limiter.ask(1) <= 10 * MS + 1


def test_the_one_time_burst_comes_first_and_once() -> None:
    limiter = RateLimiter(ops=(2, 5, 60_000))
    assert [limiter.ask(0) for _ in range(7)] == [0] * 7
    assert limiter.ask(0) > 0


def test_a_request_larger_than_the_bucket_waits_for_a_full_one_and_is_paid_for_afterwards() -> None:
    limiter = RateLimiter(bandwidth=(1000, 0, 1000))
    assert limiter.ask(5000) == 0
    assert limiter.ask(1000) > 4900 * MS


@pytest.mark.parametrize("size", [1 << 32, 3 << 32, (1 << 64) - 1])
def test_a_bucket_of_gigabytes_is_a_limit(size: int) -> None:
    limiter = RateLimiter(bandwidth=(size, 0, 60_000))
    assert limiter.buckets[0]
    assert limiter.ask(size) == 0
    assert limiter.ask(size) > 0


@pytest.mark.parametrize("taken_away", [(0, 0, 0), (0, 0, 100), (100, 0, 0)])
def test_limits_change_while_in_use(taken_away: tuple[int, int, int]) -> None:
    limiter = RateLimiter(ops=(1, 0, 60_000))
    assert limiter.ask(0) == 0
    assert limiter.ask(0) > 0
    limiter.update(bandwidth=(1, 0, 1))
    assert limiter.ask(0) > 0  # operations as they were
    limiter.update(bandwidth=taken_away, ops=taken_away)
    assert all(limiter.ask(1000) == 0 for _ in range(100))


@pytest.mark.parametrize("refill_ms", [1 << 58, (1 << 63) - 1, 10**17])
def test_a_time_that_nobody_lives_to_see_is_waited_for(refill_ms: int) -> None:
    limiter = RateLimiter(bandwidth=(1000, 0, refill_ms))
    assert limiter.ask(1000) == 0
    assert 1 << 50 < limiter.ask(1000) < 1 << 63
    assert limiter.ask(1 << 62) < 1 << 63


def test_it_tells_its_limits() -> None:
    limiter = RateLimiter(ops=(10, 3, 100))
    assert list(limiter.buckets) == [None, (10, 3, 100)]
    assert limiter.ask(0, 2) == 0
    limiter.update(bandwidth=(1 << 20, 0, 1000))
    assert list(limiter.buckets) == [(1 << 20, 0, 1000), (10, 1, 100)]
    limiter.update((0, 0, 0), (0, 0, 0))
    assert list(limiter.buckets) == [None, None]
