# SPDX-License-Identifier: Apache-2.0
from virtio.fs._dax import Window

def type_stores_files(f_type: int) -> bool: ...
def stores_files(fd: int) -> tuple[bool, int]: ...

class Share:
    def __init__(
        self,
        root_fd: int,
        proc_fd: int,
        *,
        read_only: bool,
        cache: str,
        valid: int,
        squash: tuple[int, int] | None,
        submounts: bool,
        dax: int,
    ) -> None: ...
    window: Window | None
    def clear(self) -> None: ...
    @property
    def mounted(self) -> bool: ...
    @property
    def stats(self) -> dict[str, int]: ...
