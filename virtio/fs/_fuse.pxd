# SPDX-License-Identifier: Apache-2.0
# FUSE 7.38 from the kernel's header, so that the compiler knows every layout. Source: linux/fuse.h.
from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t

cdef extern from "<linux/fuse.h>" nogil:
    enum:
        FUSE_LOOKUP, FUSE_FORGET, FUSE_GETATTR, FUSE_SETATTR, FUSE_READLINK, FUSE_SYMLINK, FUSE_MKNOD, FUSE_MKDIR
        FUSE_UNLINK, FUSE_RMDIR, FUSE_RENAME, FUSE_LINK, FUSE_OPEN, FUSE_READ, FUSE_WRITE, FUSE_STATFS, FUSE_RELEASE
        FUSE_FSYNC, FUSE_SETXATTR, FUSE_GETXATTR, FUSE_LISTXATTR, FUSE_REMOVEXATTR, FUSE_FLUSH, FUSE_INIT
        FUSE_OPENDIR, FUSE_READDIR, FUSE_RELEASEDIR, FUSE_FSYNCDIR, FUSE_ACCESS, FUSE_CREATE, FUSE_INTERRUPT
        FUSE_DESTROY, FUSE_IOCTL, FUSE_BATCH_FORGET, FUSE_FALLOCATE, FUSE_READDIRPLUS, FUSE_RENAME2, FUSE_LSEEK
        FUSE_COPY_FILE_RANGE, FUSE_SETUPMAPPING, FUSE_REMOVEMAPPING, FUSE_SYNCFS, FUSE_TMPFILE
    # INIT flags
    enum:
        FUSE_ASYNC_READ, FUSE_ATOMIC_O_TRUNC, FUSE_BIG_WRITES, FUSE_AUTO_INVAL_DATA, FUSE_DO_READDIRPLUS
        FUSE_READDIRPLUS_AUTO, FUSE_ASYNC_DIO, FUSE_WRITEBACK_CACHE, FUSE_PARALLEL_DIROPS, FUSE_MAX_PAGES
        FUSE_CACHE_SYMLINKS, FUSE_NO_OPEN_SUPPORT, FUSE_NO_OPENDIR_SUPPORT, FUSE_MAP_ALIGNMENT
        FUSE_HANDLE_KILLPRIV_V2, FUSE_INIT_EXT, FUSE_SUBMOUNTS, FUSE_EXPORT_SUPPORT
    unsigned long long FUSE_HAS_INODE_DAX
    enum:
        FATTR_MODE, FATTR_UID, FATTR_GID, FATTR_SIZE, FATTR_ATIME, FATTR_MTIME, FATTR_FH, FATTR_ATIME_NOW
        FATTR_MTIME_NOW, FATTR_CTIME, FATTR_KILL_SUIDGID
        FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE, FOPEN_CACHE_DIR, FOPEN_PARALLEL_DIRECT_WRITES
        FUSE_OPEN_KILL_SUIDGID, FUSE_WRITE_KILL_SUIDGID, FUSE_WRITE_CACHE, FUSE_FSYNC_FDATASYNC, FUSE_ATTR_DAX
        FUSE_ATTR_SUBMOUNT
        FUSE_SETUPMAPPING_FLAG_WRITE, FUSE_SETUPMAPPING_FLAG_READ

    struct fuse_in_header:
        uint32_t len
        uint32_t opcode
        uint64_t unique
        uint64_t nodeid
        uint32_t uid
        uint32_t gid
    struct fuse_out_header:
        uint32_t len
        int32_t error
        uint64_t unique
    struct fuse_attr:
        uint64_t ino
        uint64_t size
        uint64_t blocks
        uint64_t atime
        uint64_t mtime
        uint64_t ctime
        uint32_t atimensec
        uint32_t mtimensec
        uint32_t ctimensec
        uint32_t mode
        uint32_t nlink
        uint32_t uid
        uint32_t gid
        uint32_t rdev
        uint32_t blksize
        uint32_t flags
    struct fuse_entry_out:
        uint64_t nodeid
        uint64_t generation
        uint64_t entry_valid
        uint64_t attr_valid
        uint32_t entry_valid_nsec
        uint32_t attr_valid_nsec
        fuse_attr attr
    struct fuse_attr_out:
        uint64_t attr_valid
        uint32_t attr_valid_nsec
        fuse_attr attr
    struct fuse_open_out:
        uint64_t fh
        uint32_t open_flags
    struct fuse_init_in:
        uint32_t major
        uint32_t minor
        uint32_t max_readahead
        uint32_t flags
        uint32_t flags2
    struct fuse_init_out:
        uint32_t major
        uint32_t minor
        uint32_t max_readahead
        uint32_t flags
        uint16_t max_background
        uint16_t congestion_threshold
        uint32_t max_write
        uint32_t time_gran
        uint16_t max_pages
        uint16_t map_alignment
        uint32_t flags2
    struct fuse_forget_in:
        uint64_t nlookup
    struct fuse_forget_one:
        uint64_t nodeid
        uint64_t nlookup
    struct fuse_batch_forget_in:
        uint32_t count
    struct fuse_setattr_in:
        uint32_t valid
        uint64_t fh
        uint64_t size
        uint64_t atime
        uint64_t mtime
        uint32_t atimensec
        uint32_t mtimensec
        uint32_t mode
        uint32_t uid
        uint32_t gid
    struct fuse_mknod_in:
        uint32_t mode
        uint32_t rdev
    struct fuse_mkdir_in:
        uint32_t mode
    struct fuse_rename2_in:
        uint64_t newdir
        uint32_t flags
    struct fuse_link_in:
        uint64_t oldnodeid
    struct fuse_open_in:
        uint32_t flags
        uint32_t open_flags
    struct fuse_create_in:
        uint32_t flags
        uint32_t mode
        uint32_t open_flags
    struct fuse_release_in:
        uint64_t fh
    struct fuse_read_in:
        uint64_t fh
        uint64_t offset
        uint32_t size
    struct fuse_write_in:
        uint64_t fh
        uint64_t offset
        uint32_t size
        uint32_t write_flags
        uint32_t flags
    struct fuse_write_out:
        uint32_t size
        uint32_t padding
    struct fuse_kstatfs:
        uint64_t blocks
        uint64_t bfree
        uint64_t bavail
        uint64_t files
        uint64_t ffree
        uint32_t bsize
        uint32_t namelen
        uint32_t frsize
    struct fuse_statfs_out:
        fuse_kstatfs st
    struct fuse_fsync_in:
        uint32_t fsync_flags
    struct fuse_setxattr_in:
        uint32_t size
        uint32_t flags
    struct fuse_getxattr_in:
        uint32_t size
    struct fuse_getxattr_out:
        uint32_t size
    struct fuse_access_in:
        uint32_t mask
    struct fuse_fallocate_in:
        uint64_t offset
        uint64_t length
        uint32_t mode
    struct fuse_lseek_in:
        uint64_t offset
        uint32_t whence
    struct fuse_lseek_out:
        uint64_t offset
    struct fuse_copy_file_range_in:
        uint64_t off_in
        uint64_t nodeid_out
        uint64_t fh_out
        uint64_t off_out
        uint64_t len
    struct fuse_dirent:
        uint64_t ino
        uint64_t off
        uint32_t namelen
        uint32_t type
    struct fuse_setupmapping_in:
        uint64_t foffset
        uint64_t len
        uint64_t flags
        uint64_t moffset
    struct fuse_removemapping_in:
        uint32_t count
    struct fuse_removemapping_one:
        uint64_t moffset
        uint64_t len
