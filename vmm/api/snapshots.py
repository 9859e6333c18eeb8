# SPDX-License-Identifier: Apache-2.0
"""``PUT /snapshot/create`` and ``PUT /snapshot/load``: Firecracker's rules, texts and two files, in pyvmm's format.

The memory file is guest RAM, one region after the other, as Firecracker's; the state file is that of
:mod:`vmm.machine.snapshot_file` with the bodies that ``GET /vm/config`` shows.
Source: Firecracker 1.12.1, compared with the real one in ``tests/api/test_differential_snapshot.py``.
"""

from __future__ import annotations

import os
import time

import msgspec

from vmm import undertaker
from vmm.api import ApiError, FatalError, refusing, types
from vmm.api.bodies import encode
from vmm.api.diff import Diff
from vmm.config import check_names
from vmm.durable import write_all, write_whole
from vmm.errors import ConfigError, HostError, SnapshotError, VmmError
from vmm.machine.snapshot_file import (
    decode,
    is_merging,
    open_regular,
    pieces_of,
    prefetch,
    read_state,
    write_memory,
)  # fmt: skip
from vmm.machine.snapshot_file import encode as encode_state
from vmm.memory import MemoryFile, joined
from vmm.uffd import HandlerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.api.actions import Vmm
    from vmm.machine.machine import Machine
    from vmm.machine.snapshot import Image

_NO_DIFF = (
    "The requested operation is not supported: Diff snapshots are not allowed on uVMs with dirty page tracking"
    " disabled."
)
_RUNNING = "Cannot save the microVM state: Operation not allowed: save/restore unavailable while running"
_CONFIGURED = "Loading a microVM snapshot not allowed after configuring boot-specific resources."
_JSON = "An error occurred when deserializing the json body of a request: "
_NO_MEMORY = "missing field: either `mem_backend` or `mem_file_path` is required."
_TWO_MEMORIES = "too many fields: either `mem_backend` or `mem_file_path` exclusively is required."
_RESTORE = "Failed to restore from snapshot: "
_STATE = f"{_RESTORE}Failed to get snapshot state from file"
_MEMORY = f"{_RESTORE}Failed to load guest memory: Error creating guest memory from file: "
_HANDLER = f"{_RESTORE}Failed to load guest memory: Error creating guest memory from uffd: "
_STEPS = {
    "create": "Failed to UFFD object",
    "register": "Failed to register memory address range with the userfaultfd object",
    "connect": "Failed to connect to UDS Unix stream",
    "send": "Failed to sends file descriptor",
}
_BUILD = f"{_RESTORE}Failed to build microVM from snapshot: "
_NO_MARK = bytes(16)


def create(vmm: Vmm, machine: Machine, body: types.SnapshotCreate) -> None:
    """Write a paused machine into two files; of a Diff only the memory that was written since the snapshot before."""
    begun = time.monotonic_ns()
    diff = body.snapshot_type == "Diff"
    if diff and not machine.config.track_dirty_pages:
        raise ApiError(_NO_DIFF)
    if machine.state == "Running":
        raise ApiError(f"Create snapshot error: {_RUNNING}")
    with refusing("Create snapshot error: Cannot save the microVM state"):  # also of a machine that has just ended
        check_names(snapshot_path=body.snapshot_path, mem_file_path=body.mem_file_path)
        _write(vmm, machine, body, diff=diff)
    vmm.metrics.store(
        "latencies_us", f"{body.snapshot_type.lower()}_create_snapshot", (time.monotonic_ns() - begun) // 1000
    )


def _write(vmm: Vmm, machine: Machine, body: types.SnapshotCreate, *, diff: bool) -> None:
    begun_anew = False

    # Once the devices have finished what they have. A snapshot that failed leaves what it was to have to the next one.
    def look() -> None:
        nonlocal begun_anew
        written, begun_anew = machine.memory.take_written()
        vmm.unsaved = joined(sorted(vmm.unsaved + written))

    def state_of(image: Image) -> bytes:
        shown = msgspec.structs.replace(vmm.whole, logger=None, metrics=None, serial=msgspec.UNSET)
        return encode_state(image, _NO_MARK, api=encode(shown))

    def write(image: Image) -> None:
        assert over is not None
        over.write(body.snapshot_path, state_of(image), vmm.unsaved, machine.memory.slice)
        if not begun_anew:
            machine.memory.freeze()

    over: Diff | None = None
    try:
        if diff and (over := Diff.over(body.mem_file_path, machine.config.memory)) is not None:
            machine._freeze(look, write)  # beside the disk, which writes meanwhile
            over.wait()
        else:
            never = machine.memory.regions[0].file is not None  # was it frozen: before it there were zeros
            image = machine._freeze(look)
            write_files(body, image, state_of(image), vmm.unsaved if diff and not never else None)
    except HostError:  # of the machine, not of a file
        raise
    except OSError as error:
        what = "snapshot" if error.filename == body.snapshot_path else "memory"
        raise ApiError(f"Create snapshot error: Cannot perform open on the {what} backing file: {_io(error)}") from None
    finally:
        if over is not None:
            over.close()
    vmm.unsaved = []
    if machine.config.track_dirty_pages:
        undertaker.be_there()  # a Diff may come next


def write_files(
    body: types.SnapshotCreate,
    image: Image,
    state: bytes,
    written: list[tuple[int, int]] | None,
) -> None:
    """Write two new files, which take the names of those that were there once both are whole.

    :param state: what ``encode`` made of `image`
    :param written: (guest address, bytes) of what a Diff has; None: a Full one
    :raises OSError: a file cannot be written, ``filename`` is its path
    """
    write_whole(
        (body.snapshot_path, lambda fd: write_all(fd, state)),
        (body.mem_file_path, lambda fd: write_memory(image.memory, image.config.memory, fd, written)),
    )


def load(vmm: Vmm, body: types.SnapshotLoad) -> None:
    """Make the machine that a snapshot is of, paused unless `resume_vm`.

    :raises ApiError: a load is not allowed now, or the request is invalid
    :raises FatalError: the snapshot cannot be loaded
    """
    begun = time.monotonic_ns()
    if (body.mem_backend is None) == (body.mem_file_path is None):
        raise ApiError(_JSON + (_NO_MEMORY if body.mem_backend is None else _TWO_MEMORIES))
    backend = body.mem_backend.backend_path if body.mem_backend is not None else None
    with refusing("Load snapshot error"):
        check_names(snapshot_path=body.snapshot_path, mem_file_path=body.mem_file_path, backend_path=backend)
    if vmm.configured:
        raise ApiError(f"Load snapshot error: {_CONFIGURED}")
    try:
        _load(vmm, body)
    except (VmmError, OSError) as error:
        raise FatalError(f"Load snapshot error: {error}") from error
    vmm.metrics.store("latencies_us", "load_snapshot", (time.monotonic_ns() - begun) // 1000)


def _load(vmm: Vmm, body: types.SnapshotLoad) -> None:
    try:
        image, _ = decode(read_state(body.snapshot_path), body.snapshot_path)
        if not image.api:
            raise SnapshotError(body.snapshot_path, "was not made by the API: pyvmm run --restore takes it")
        shown = msgspec.json.decode(image.api, type=types.VmConfiguration)
    except OSError as error:
        raise ApiError(f"{_STATE}: Failed to open snapshot file: {_io(error)}") from None
    except SnapshotError as error:
        raise ApiError(f"{_STATE}: Failed to load snapshot state from file: {error}") from None
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ApiError(f"{_STATE}: Failed to load snapshot state from file: {body.snapshot_path}: {error}") from None
    _override(image, shown, body)
    diffs = body.enable_diff_snapshots or body.track_dirty_pages
    backend = body.mem_backend
    path = body.mem_file_path or (backend.backend_path if backend is not None else "")
    if backend is not None and backend.backend_type == "Uffd":
        image.handler = path
    else:
        memory = _memory_file(path, image.config.memory)
        prefetch(memory, f"{path}.touched", image.config.memory)
        image.memory = pieces_of(memory, image.config.memory)
    if shown.machine_config is not None:
        shown.machine_config.track_dirty_pages = diffs
    image.config = image.config.replaced(track_dirty_pages=diffs)
    try:
        vmm.go_on(image, shown, resume=body.resume_vm)
    except HandlerError as error:
        raise ApiError(f"{_HANDLER}{_STEPS[error.step]}: {_io(error)}") from error
    except (ConfigError, HostError, SnapshotError) as error:
        raise ApiError(f"{_BUILD}{error}") from error


def _memory_file(path: str, size: int) -> MemoryFile:
    try:
        fd = open_regular(path)
    except OSError as error:
        raise ApiError(f"{_MEMORY}Failed to load guest memory: {_io(error)}") from None
    except SnapshotError as error:
        raise ApiError(f"{_MEMORY}Failed to load guest memory: {error}") from None
    file = MemoryFile(fd, at_once=True)
    if os.fstat(fd).st_size < size:
        short = "The specified file offset and length is greater then file length"
        raise ApiError(f"{_MEMORY}Failed to restore guest memory: Cannot create mmap region: {short}")
    if is_merging(fd):
        raise ApiError(f"{_MEMORY}{path}: has half of a Diff, whose writer was killed")
    return file


def _override(image: Image, shown: types.VmConfiguration, body: types.SnapshotLoad) -> None:
    taps = {each.iface_id: each.host_dev_name for each in body.network_overrides}
    names = [each.iface_id for each in shown.network_interfaces]
    if any(name not in names for name in taps):
        raise ApiError(f"{_STATE}: Unknown Network Device.")
    if body.vsock_override is not None:
        if shown.vsock is None or image.config.vsock is None:
            raise ApiError(f"{_STATE}: Unknown Vsock Device.")
        uds_path = body.vsock_override.uds_path
        with refusing(_STATE):
            image.config = image.config.replaced(vsock=image.config.vsock.replaced(path=uds_path))
        shown.vsock.uds_path = uds_path
    if taps:
        for each in shown.network_interfaces:
            each.host_dev_name = taps.get(each.iface_id, each.host_dev_name)
        nets = [net.replaced(mode="tap", tap=taps[net.id]) if net.id in taps else net for net in image.config.nets]
        image.config = image.config.replaced(nets=nets)


def _io(error: OSError) -> str:
    # As Rust's std::io::Error says it.
    return f"{os.strerror(error.errno or 0)} (os error {error.errno})"
