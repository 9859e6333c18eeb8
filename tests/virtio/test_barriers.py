# SPDX-License-Identifier: Apache-2.0
"""The queue's two full fences: a driver in C races the queue's own C functions.

Each round is the store-buffering race of §2.7.13.4.1 or §2.7.7.2: both sides store, fence, and load what the
other stores. A round in which neither sees the other is a notification that never comes. With the device's
fence taken out, each of these tests fails on two idle x86 cores; on busy ones the race is rarer.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cffi import FFI

from vmm import _fastpath

ROUNDS = 100_000

HARNESS = r"""
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>

/* cdef struct Ring of vmm/_fastpath.pxd */
struct ring {
    uint8_t *desc, *avail, *used;
    uint16_t size, last_avail, next_used, published;
    int event_idx, indirect;
};

enum { NOTIFY, INTERRUPT };
#define SIZE 4
#define LOAD(p) __atomic_load_n((uint16_t *)(p), __ATOMIC_RELAXED)
#define STORE(p, v) __atomic_store_n((uint16_t *)(p), (v), __ATOMIC_RELEASE)

static uint8_t avail[64] __attribute__((aligned(64))), used[64] __attribute__((aligned(64)));
static int turn[2] __attribute__((aligned(64)));
static long rounds;
static int what, event_idx, driver_fence, told;

static void meet(int side, int round) {
    __atomic_store_n(&turn[side], round, __ATOMIC_SEQ_CST);
    int waited = 0;
    while (__atomic_load_n(&turn[!side], __ATOMIC_ACQUIRE) < round)
        if (++waited % 256)
            __builtin_ia32_pause();
        else
            sched_yield();      /* the other side may want this very CPU */
}

static void spin(int n) { for (volatile int i = 0; i < n; i++) ; }

static void *driver(void *unused) {
    for (long i = 0; i < rounds; i++) {
        uint16_t old = i, new = i + 1, event;
        meet(0, 2 * i + 1);
        spin(i % 13);
        if (what == NOTIFY) {               /* offer a chain: does the device want to know? */
            STORE(avail + 2, new);
            if (driver_fence) __atomic_thread_fence(__ATOMIC_SEQ_CST);
            event = LOAD(event_idx ? used + 4 + 8 * SIZE : used);
            told = event_idx ? (uint16_t)(new - event - 1) < (uint16_t)(new - old) : !(event & 1);
        } else {                            /* ask for an interrupt: has the device been here already? */
            if (event_idx) STORE(avail + 4 + 2 * SIZE, old); else STORE(avail, 0);
            if (driver_fence) __atomic_thread_fence(__ATOMIC_SEQ_CST);
            told = LOAD(used + 2) == new;
        }
        meet(0, 2 * i + 2);
    }
    return unused;
}

/* Rounds in which neither side saw the other; -1 where no thread could be had. */
long race(void *function, int kind, int with_event_idx, int with_driver_fence, long count) {
    int (*call)(struct ring *) = function;
    struct ring ring = {0, avail, used, SIZE, 0, 0, 0, with_event_idx, 0};
    pthread_t thread;
    long lost = 0;
    memset(avail, 0, sizeof avail);
    memset(used, 0, sizeof used);
    if (with_event_idx) {
        STORE(avail + 4 + 2 * SIZE, (uint16_t)-1);
        STORE(used + 4 + 8 * SIZE, (uint16_t)-1);
    }
    turn[0] = turn[1] = 0;
    rounds = count, what = kind, event_idx = with_event_idx, driver_fence = with_driver_fence;
    if (pthread_create(&thread, 0, driver, 0))
        return -1;
    for (long i = 0; i < count; i++) {
        int seen;
        ring.last_avail = i;
        ring.next_used = i + 1;
        if (!with_event_idx)
            STORE(kind == NOTIFY ? used : avail, 1);
        meet(1, 2 * i + 1);
        spin(i % 7);
        seen = call(&ring);
        meet(1, 2 * i + 2);
        lost += !seen && !told;
    }
    pthread_join(thread, 0);
    return lost;
}
"""


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    directory: Path = tmp_path_factory.mktemp("barriers")
    ffi = FFI()
    ffi.cdef("long race(void *function, int kind, int with_event_idx, int with_driver_fence, long count);")
    ffi.set_source("_barriers", HARNESS, libraries=["pthread"], extra_compile_args=["-O2"])
    from importlib.util import module_from_spec, spec_from_file_location

    found = spec_from_file_location("_barriers", ffi.compile(str(directory)))
    assert found is not None and found.loader is not None
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module


def c_function(harness: Any, name: str) -> Any:
    """Address of one of the C functions that ``_fastpath.pxd`` gives to other Cython modules."""
    capsule = _fastpath.__pyx_capi__[name]  # type: ignore[attr-defined]
    get_name, get_pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return harness.ffi.cast("void *", get_pointer(capsule, get_name(capsule)))


@pytest.mark.parametrize("event_idx", [1, 0], ids=["event_idx", "flags"])
@pytest.mark.parametrize(("kind", "name"), [(0, "queue_enable_notify"), (1, "queue_flush_call")])
def test_neither_side_misses_the_other(harness: Any, kind: int, name: str, event_idx: int) -> None:
    assert harness.lib.race(c_function(harness, name), kind, event_idx, 1, ROUNDS) == 0
