# SPDX-License-Identifier: Apache-2.0
from virtio.fs._dax import Window

def file_system(fd: int) -> int: ...
def stores_files(f_type: int) -> bool: ...

class Share:
    def __init__(
        self,
        root_fd: int,
        f_type: int,
        proc_fd: int,
        *,
        read_only: bool,
        cache: str,
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
