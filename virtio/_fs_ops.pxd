# SPDX-License-Identifier: Apache-2.0
# The FUSE operations of a share: one request in, one reply out, for any thread that has a Server of its own.
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from virtio._fs_dax cimport Window
from virtio._fs_host cimport __user_cap_data_struct, statx
from virtio._fs_table cimport Handle, Node, Table
from virtio._fuse cimport fuse_attr, fuse_entry_out, fuse_in_header, fuse_open_out
from vmm._fastpath cimport DescChain, iovec

cdef class Share:
    cdef Table table
    cdef int proc_fd            # /proc/self/fd, from which descriptors are opened anew
    cdef bint read_only
    cdef bint writeback         # the guest may keep what it writes (cache=always)
    cdef bint flush_matters     # close() of the host's file system may fail, as NFS's does
    cdef bint squash
    cdef uint32_t uid           # with squash: whose every access is
    cdef uint32_t gid
    cdef uint64_t valid         # seconds that the guest may believe what it was told
    cdef uint32_t open_flags    # FOPEN_* of every file
    cdef uint32_t dir_flags     # and of every directory
    cdef readonly Window window         # of DAX, or None
    cdef int initialised        # atomic: INIT was answered
    cdef bint dax_inodes        # the guest maps files that FUSE_ATTR_DAX marks

# What the thread may do as whom.
cdef struct Credentials:
    bint switches               # it can take on the user that the guest names
    __user_cap_data_struct[2] full
    __user_cap_data_struct[2] create        # of that user, while a file is made: the guest's kernel has judged
    __user_cap_data_struct[2] no_fsetid     # so that the host's kernel clears set-id bits

cdef struct Counters:
    uint64_t requests
    uint64_t bad_requests       # malformed; answered with an error where there is room for one
    uint64_t bad_forgets        # of what the guest was not told, or more often than it was told
    uint64_t bytes_read
    uint64_t bytes_written
    uint64_t handed_over        # to a helper thread

cdef class Server:
    cdef Share share
    cdef Table table
    cdef Counters counters
    cdef Credentials credentials
    cdef uint8_t *request       # what follows the header, and a 0
    cdef uint8_t *out           # what follows the reply's header
    cdef const char *name       # components that were judged
    cdef const char *name2
    cdef uint64_t length        # bytes in request
    cdef uint64_t room          # bytes that a reply may have after its header
    cdef bint direct            # the payload is in the guest's memory already
    cdef iovec *narrowed        # with direct: the first buffer of the payload, and what it was
    cdef iovec before
    cdef char[40] path          # of a descriptor in /proc/self/fd
    cdef uint32_t path_start    # where its number goes

    cdef int enter(self) noexcept nogil         # once on the thread; 0 or an errno
    # The bytes written to the guest, for the used ring.
    cdef uint32_t answer(self, const fuse_in_header *header, DescChain *chain) noexcept nogil

    cdef int64_t judge(self, const fuse_in_header *header, DescChain *chain) noexcept nogil
    cdef int64_t dispatch(self, const fuse_in_header *h, DescChain *chain) noexcept nogil
    cdef const char *path_of(self, int fd) noexcept nogil
    cdef void fill_attr(self, fuse_attr *attr, const statx *st) noexcept nogil
    cdef void fill_entry(self, fuse_entry_out *entry, uint64_t nodeid, const statx *st) noexcept nogil
    cdef int64_t lookup(self, int dirfd, const char *name, fuse_entry_out *entry, bint likely) noexcept nogil
    cdef int64_t adopt(self, int fd, fuse_entry_out *entry) noexcept nogil
    cdef int64_t open_node(self, Node *node, uint32_t wanted, bint kill, fuse_open_out *out) noexcept nogil
    cdef int host_flags(self, uint32_t wanted) noexcept nogil

    cdef int64_t op_init(self) noexcept nogil
    cdef int64_t op_lookup(self, Node *node) noexcept nogil
    cdef int64_t op_forget(self, uint64_t nodeid) noexcept nogil
    cdef int64_t op_batch_forget(self) noexcept nogil
    cdef int64_t op_getattr(self, Node *node) noexcept nogil
    cdef int64_t op_setattr(self, Node *node, uint64_t nodeid) noexcept nogil
    cdef int64_t op_readlink(self, Node *node) noexcept nogil
    cdef int64_t op_make(self, Node *node, const fuse_in_header *h) noexcept nogil
    cdef int64_t op_remove(self, Node *node, int flags) noexcept nogil
    cdef int64_t op_rename(self, Node *node, const fuse_in_header *h) noexcept nogil
    cdef int64_t op_link(self, Node *node) noexcept nogil
    cdef int64_t op_opendir(self, Node *node, uint64_t nodeid) noexcept nogil
    cdef int64_t op_create(self, Node *node, const fuse_in_header *h) noexcept nogil
    cdef int64_t op_statfs(self, Node *node) noexcept nogil
    cdef int64_t op_access(self, Node *node, const fuse_in_header *h) noexcept nogil
    cdef int64_t op_xattr(self, Node *node, uint32_t opcode) noexcept nogil
    cdef int64_t op_setupmapping(self, Node *node) noexcept nogil
    cdef int64_t op_removemapping(self) noexcept nogil
    cdef int64_t op_syncfs(self, Node *node) noexcept nogil
    cdef int64_t op_read(self, Handle *handle, DescChain *chain) noexcept nogil
    cdef int64_t op_write(self, Handle *handle, DescChain *chain) noexcept nogil
    cdef int64_t op_readdir(self, Handle *handle, uint64_t nodeid, bint plus) noexcept nogil
    cdef int64_t op_file(self, Handle *handle, uint32_t opcode) noexcept nogil
    cdef int64_t on_handle(self, const fuse_in_header *h, DescChain *chain) noexcept nogil
    cdef int64_t on_node(self, const fuse_in_header *h) noexcept nogil

# Copy bytes between a chain and a buffer; the counts were judged before.
cdef uint64_t chain_gather(DescChain *chain, uint64_t skip, void *to, uint64_t size) noexcept nogil
cdef bint is_slow(uint32_t opcode) noexcept nogil
