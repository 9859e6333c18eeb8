# SPDX-License-Identifier: Apache-2.0
from virtio.fs._dax import Window

def type_stores_files(f_type: int) -> bool: ...
def stores_files(fd: int) -> tuple[bool, int]:
    """Whether `fd` is on a file system that stores files, not one that shows the kernel's insides; and its f_type."""

class Share:
    """What all threads of one share have in common."""

    def __init__(
        self,
        root_fd: int,
        proc_fd: int,
        *,
        read_only: bool,
        writeback: bool,
        valid: int,
        direct_io: bool,
        keep_cache: bool,
        squash: tuple[int, int] | None,
        submounts: bool = False,
        dax: int = 0,
    ) -> None: ...
    window: Window | None
    def clear(self) -> None:
        """Forget what the guest was told: its driver is gone."""
    def close(self) -> None:
        """Close the directory itself, too: no thread of the share runs any more."""
    @property
    def nodes(self) -> int:
        """Files that the guest knows of, the directory itself included."""
    @property
    def reopened(self) -> int:
        """Times that a file's descriptor was opened again, after others had needed it."""
    @property
    def handles(self) -> int:
        """Files and directories that the guest has open."""
