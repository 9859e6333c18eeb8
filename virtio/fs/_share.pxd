# SPDX-License-Identifier: Apache-2.0
# What all threads of a share have in common, and what each of them has for itself.
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from virtio.fs._dax cimport Window
from virtio.fs._host cimport __user_cap_data_struct, statx
from virtio.fs._inodes cimport Node
from virtio.fs._table cimport Table
from virtio.fs._fuse cimport fuse_attr, fuse_entry_out
from virtio._limiter cimport RateLimiter
from vmm._fastpath cimport iovec

cdef enum:
    IN_HEADER = 40
    OUT_HEADER = 16
    MAX_WRITE = 1 << 20             # bytes of a WRITE; 256 pages, the most that Linux sends
    PIECE = 16 << 20                # bytes that one request copies at most: the device's end waits for no more
    ALLOCATED = 256 << 20           # bytes that are allocated between two looks at whether the device ends
    REQUEST_MAX = 65536 + 8192      # an extended attribute's value, its name, and what is around them
    OUT_MAX = 65536 + 8192          # the same in a reply
    DIRENTS = 32768                 # bytes of entries read at once
    NAME_MAX = 255
    PATH_MAX = 4096
    XATTR_MAX = 65536
    MINOR_LEAST = 31                # Linux 5.4, the first with virtiofs
    MINOR_SGID = 37                 # Linux 6.1; since 6.0 its VFS judges set-group-id bits of new files

cdef class Share:
    cdef Table table
    cdef int proc_fd            # /proc/self/fd, from which descriptors are opened anew
    cdef bint read_only
    cdef bint writeback         # the guest may keep what it writes (cache=always)
    cdef bint flush_matters     # close() of the host's file system may fail, as NFS's does
    cdef bint submounts         # other mounts below the directory are entered
    cdef bint announces         # the guest knows what FUSE_ATTR_SUBMOUNT says
    cdef bint squash
    cdef uint32_t uid           # whose every access is, but for what root makes for the guest's users
    cdef uint32_t gid
    cdef uint64_t valid         # seconds that the guest may believe what it was told
    cdef uint32_t open_flags    # FOPEN_* of every file
    cdef uint32_t dir_flags     # and of every directory
    cdef readonly Window window         # of DAX, or None
    cdef int initialised        # atomic: INIT was answered
    cdef bint may_not_open      # the guest may use files without opening them (cache=always), if it knows how
    cdef bint no_open           # and it does so: no request names a handle
    cdef bint no_nowait         # the host's file system cannot say whether a read would wait
    cdef bint judges_sgid       # the guest's kernel takes set-group-id bits away from who may not set them
    cdef bint dax_inodes        # the guest maps files that FUSE_ATTR_DAX marks

# What the thread may do as whom.
cdef struct Credentials:
    bint reads_all              # whatever a file's mode says
    bint writes_all
    bint switches               # it can take on the user that the guest names
    __user_cap_data_struct[2] full
    __user_cap_data_struct[2] create        # of that user, while a file is made: the guest's kernel has judged
    __user_cap_data_struct[2] create_sgid   # the same where it has judged set-group-id bits, too
    __user_cap_data_struct[2] no_fsetid     # so that the host's kernel clears set-id bits

cdef struct Counters:
    uint64_t requests
    uint64_t bad_requests       # malformed; answered with an error where there is room for one
    uint64_t bad_forgets        # of what the guest was not told, or more often than it was told
    uint64_t bytes_read
    uint64_t bytes_written
    uint64_t handed_over        # to a helper thread

cdef uint64_t foreign_ino(const statx *st) noexcept nogil

cdef class Agent:
    cdef Share share
    cdef Table table
    cdef Counters counters
    cdef Credentials credentials
    cdef RateLimiter limiter
    cdef const int *ending      # atomic: the device stops, what is not done yet need not be
    cdef uint8_t *request       # what follows the header, and a 0
    cdef uint8_t *out           # what follows the reply's header
    cdef int inotify            # by which inodes are compared; -1: none yet
    cdef uint8_t *entries       # linux_dirent64s read ahead of what the guest asked; DIRENTS bytes
    cdef uint64_t entries_fh    # the handle that they are of
    cdef uint64_t entries_next  # the directory offset of the next of them,
    cdef uint32_t entries_at    # its place among the bytes,
    cdef uint32_t entries_have  # and how many those are
    cdef const char *name       # components that were judged
    cdef const char *name2
    cdef uint64_t length        # bytes in request
    cdef uint64_t room          # bytes that a reply may have after its header
    cdef bint may_wait          # for the host's disk; a queue's own thread may not, while helpers have room
    cdef bint direct            # the payload is in the guest's memory already
    cdef iovec *narrowed        # with direct: the first buffer of the payload, and what it was
    cdef iovec before
    cdef char[40] path          # of a descriptor in /proc/self/fd
    cdef uint32_t path_start    # where its number goes

    cdef int enter(self) noexcept nogil         # once on the thread; 0 or an errno
    cdef const char *path_of(self, int fd) noexcept nogil
    cdef bint may_read(self, const statx *st) noexcept nogil
    cdef void fill_attr(self, fuse_attr *attr, const statx *st) noexcept nogil
    cdef void fill_entry(self, fuse_entry_out *entry, uint64_t nodeid, const statx *st) noexcept nogil
    cdef int become(self, uint32_t uid, uint32_t gid) noexcept nogil
    cdef bint enters(self, const Node *parent, int fd, const statx *st, bint *overlay) noexcept nogil
    cdef uint64_t add_linked(self, int fd, const statx *st, const Node *parent, const char *name) noexcept nogil
    cdef bint same_inode(self, int one, int other) noexcept nogil
    cdef int64_t lookup(self, const Node *parent, int dirfd, const char *name, fuse_entry_out *entry,
                        bint likely) noexcept nogil
    cdef int64_t adopt(self, const Node *parent, const char *name, int fd, fuse_entry_out *entry) noexcept nogil
    cdef void fill_found(self, const Node *parent, fuse_entry_out *entry, uint64_t nodeid,
                         const statx *st) noexcept nogil
