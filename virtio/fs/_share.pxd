# SPDX-License-Identifier: Apache-2.0
# The state that all threads of a share have in common, and the state of each thread.
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memchr

from virtio.fs._dax cimport Window
from virtio.fs._host cimport __user_cap_data_struct, statx
from virtio.fs._inodes cimport Node
from virtio.fs._table cimport Table
from virtio.fs._fuse cimport fuse_attr, fuse_entry_out
from virtio._limiter cimport RateLimiter
from vmm._fastpath cimport iovec
from vmm._sys cimport flag_read

cdef enum:
    IN_HEADER = 40
    OUT_HEADER = 16
    MAX_WRITE = 1 << 20             # bytes of a READ or WRITE; 256 pages, the most that Linux asks for
    PIECE = 16 << 20                # most bytes that one request copies, so that stopping the device never waits long
    ALLOCATED = 256 << 20           # bytes allocated between two checks whether the device stops
    REQUEST_MAX = 65536 + 8192      # bytes: an extended attribute's value and name, and the structures around them
    OUT_MAX = 65536 + 8192          # the same for a reply
    DIRENTS = 32768                 # bytes of directory entries read at once
    NAME_MAX = 255
    PATH_MAX = 4096
    XATTR_MAX = 65536
    MINOR_LEAST = 31                # Linux 5.4, the first with virtiofs
    MINOR_SGID = 37                 # Linux 6.1; since 6.0 its VFS checks set-group-id bits of new files

# Share.session: what INIT agreed on, in one word, since other threads may still serve requests sent before INIT.
cdef enum:
    INITIALISED = 1             # INIT succeeded
    NO_OPEN = 2                 # the guest uses files without OPEN: no request has a handle
    CHECKS_SGID = 4             # the guest's kernel clears set-group-id bits that the user may not set
    ANNOUNCES = 8               # the guest supports FUSE_ATTR_SUBMOUNT
    DAX_INODES = 16             # the guest uses DAX for files marked by FUSE_ATTR_DAX

cdef class Share:
    cdef Table table
    cdef int proc_fd            # descriptor of /proc/self/fd, for opening nodes; borrowed
    cdef bint read_only
    cdef bint writeback         # the guest may cache writes (cache=always)
    cdef bint flush_matters     # close() may fail on the host's file system, as on NFS
    cdef bint submounts         # mounts below the directory are shared, too
    cdef bint squash
    cdef uint32_t uid           # the user of every access, except when root creates files for the guest's users
    cdef uint32_t gid
    cdef uint64_t valid         # seconds that the guest may cache names and attributes
    cdef uint32_t open_flags    # FOPEN_* for every file
    cdef uint32_t dir_flags     # FOPEN_* for every directory
    cdef readonly Window window         # DAX window, or None
    cdef int session            # atomic: what INIT agreed on; see agreed()
    cdef bint may_not_open      # the guest may use files without OPEN (cache=always), if it supports that
    cdef int no_nowait          # atomic: the host's file system does not support RWF_NOWAIT

cdef inline bint agreed(Share share, int what) noexcept nogil:
    return flag_read(&share.session) & what != 0

cdef inline bint is_component(const uint8_t *name, uint64_t length, bint dots) noexcept nogil:
    # Whether it is one component of a path. `dots`: "." and ".." are allowed.
    if length == 0 or length > NAME_MAX or memchr(name, c'/', length) != NULL:
        return False
    return dots or name[0] != c'.' or (length > 1 and (length > 2 or name[1] != c'.'))

# Permissions of the thread.
cdef struct Credentials:
    bint reads_all              # it may read every file, whatever its mode
    bint writes_all
    bint switches               # it can act as the user of a request
    __user_cap_data_struct[2] full          # its capabilities, if it switches

cdef struct Counters:
    uint64_t requests
    uint64_t bad_requests       # malformed requests; an error is sent if there is room for it
    uint64_t bad_forgets        # FORGETs of unknown nodes, or above the look-up count
    uint64_t bytes_read
    uint64_t bytes_written
    uint64_t handed_over        # requests passed to a helper thread

cdef class FuseThread:
    cdef Share share
    cdef Table table
    cdef Counters counters
    cdef Credentials credentials
    cdef RateLimiter limiter
    cdef uint64_t paid          # bytes for which the limiter gave tokens before this request was begun
    cdef const int *ending      # atomic: the device stops, so unfinished work may be dropped
    cdef uint8_t *request       # copy of the request after its header, and a NUL
    cdef uint8_t *out           # the reply after its header
    cdef int inotify            # for same_inode; -1: not open yet
    cdef uint8_t *entries       # directory entries read ahead (dirent64); DIRENTS bytes
    cdef uint64_t entries_fh    # the handle from which they were read
    cdef uint32_t entries_listing       # Node.listings at that time
    cdef uint64_t entries_next  # directory offset of the next entry
    cdef uint32_t entries_at    # byte offset of the next entry in `entries`
    cdef uint32_t entries_have  # bytes in `entries`
    cdef const char *name       # validated path components, in `request`
    cdef const char *name2
    cdef uint64_t length        # bytes in `request`
    cdef uint64_t room          # most bytes of the reply after its header
    cdef bint may_wait          # may wait for the disk; False on a queue's thread while helpers are free
    cdef bint direct            # the reply's payload is already in guest memory
    cdef iovec *narrowed        # if direct: the first buffer of the payload; `before` is its original
    cdef iovec before
    cdef char[40] path          # path of a descriptor in /proc/self/fd
    cdef const char *path_format    # of `path`; the number alone if the working directory is /proc/self/fd

    cdef int enter(self) noexcept nogil         # call it on the thread, before it serves; returns 0 or an errno
    cdef int64_t bad_request(self, int64_t result) noexcept nogil
    cdef const char *path_of(self, int fd) noexcept nogil
    # `foreign`: as in Node
    cdef void fill_attr(self, fuse_attr *attr, const statx *st, bint foreign) noexcept nogil
    cdef void fill_entry(self, fuse_entry_out *entry, uint64_t nodeid, const statx *st, bint foreign) noexcept nogil
    cdef int become(self, uint32_t uid, uint32_t gid) noexcept nogil
    cdef int64_t lookup(self, const Node *parent, int dirfd, const char *name, fuse_entry_out *entry,
                        bint likely) noexcept nogil
    cdef int64_t adopt(self, const Node *parent, const char *name, int fd, fuse_entry_out *entry) noexcept nogil
