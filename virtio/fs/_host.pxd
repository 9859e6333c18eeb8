# SPDX-License-Identifier: Apache-2.0
# Host calls of the share's operations: system calls, and wrappers for those that glibc lacks.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from posix.fcntl cimport (
    AT_FDCWD, AT_REMOVEDIR, AT_SYMLINK_FOLLOW, AT_SYMLINK_NOFOLLOW, F_DUPFD_CLOEXEC, F_GETFL, O_ACCMODE, O_APPEND,
    O_CLOEXEC, O_CREAT, O_DIRECTORY, O_DSYNC, O_EXCL, O_NOCTTY, O_NONBLOCK, O_RDONLY, O_RDWR, O_SYNC, O_TRUNC,
    O_WRONLY, S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, fcntl, openat,
)
from posix.stat cimport fchmod, fchmodat, fstat, mkdirat, mknodat, struct_stat, timespec, utimensat
from posix.uio cimport RWF_APPEND, RWF_DSYNC, RWF_NOWAIT, RWF_SYNC, preadv, preadv2, pwritev, pwritev2
from posix.unistd cimport close, dup, fdatasync, fsync, ftruncate, lseek, read, truncate

cdef extern from "<linux/capability.h>" nogil:
    struct __user_cap_data_struct:
        uint32_t effective

cdef extern from "<sys/stat.h>" nogil:
    struct statx_timestamp:
        int64_t tv_sec
        uint32_t tv_nsec
    struct statx:
        uint32_t stx_mask, stx_blksize, stx_nlink, stx_uid, stx_gid
        uint32_t stx_mode
        uint64_t stx_ino, stx_size, stx_blocks, stx_mnt_id
        statx_timestamp stx_atime, stx_mtime, stx_ctime, stx_btime
        uint32_t stx_rdev_major, stx_rdev_minor, stx_dev_major, stx_dev_minor

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <linux/capability.h>
    #include <linux/fuse.h>
    #include <sched.h>
    #include <stdint.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    enum { OP_KNOWN = 1, OP_CHANGES = 2, OP_SLOW = 4, OP_SILENT = 8, OP_HANDLE = 16 };
    #define NO_REPLY (INT64_C(1) << 62)
    #define WOULD_WAIT (INT64_C(1) << 61)
    #define DIRECT_IO_ALLOW_MMAP (UINT64_C(1) << 36)    /* of FUSE 7.39, younger than the header that is assumed */
    #define OP(name, args, reply, names_, flags_) \
        [FUSE_##name] = { .in = (args), .out = (reply), .names = (names_), .flags = OP_KNOWN | (flags_) }
    #define IN(type) sizeof(struct fuse_##type##_in)
    #define OUT(type) sizeof(struct fuse_##type##_out)
    /* Minimum sizes of a request and of its reply, and the number of names (path components) after the fixed part. */
    struct fuse_op { uint16_t in, out; uint8_t names, flags; };
    __attribute__((unused)) static const struct fuse_op fuse_ops[FUSE_TMPFILE + 1] = {
        OP(LOOKUP, 0, OUT(entry), 1, 0),
        OP(FORGET, IN(forget), 0, 0, OP_SILENT),
        OP(GETATTR, IN(getattr), OUT(attr), 0, 0),
        OP(SETATTR, IN(setattr), OUT(attr), 0, OP_CHANGES),
        OP(READLINK, 0, 0, 0, 0),
        OP(SYMLINK, 0, OUT(entry), 1, OP_CHANGES),
        OP(MKNOD, IN(mknod), OUT(entry), 1, OP_CHANGES),
        OP(MKDIR, IN(mkdir), OUT(entry), 1, OP_CHANGES),
        OP(UNLINK, 0, 0, 1, OP_CHANGES),
        OP(RMDIR, 0, 0, 1, OP_CHANGES),
        OP(RENAME, IN(rename), 0, 2, OP_CHANGES),
        OP(LINK, IN(link), OUT(entry), 1, OP_CHANGES),
        OP(OPEN, IN(open), OUT(open), 0, 0),
        OP(READ, IN(read), 0, 0, OP_HANDLE),
        OP(WRITE, IN(write), OUT(write), 0, OP_CHANGES | OP_HANDLE),
        OP(STATFS, 0, OUT(statfs), 0, 0),
        OP(RELEASE, IN(release), 0, 0, 0),
        OP(FSYNC, IN(fsync), 0, 0, OP_SLOW | OP_HANDLE),
        OP(SETXATTR, FUSE_COMPAT_SETXATTR_IN_SIZE, 0, 0, OP_CHANGES),
        OP(GETXATTR, IN(getxattr), 0, 0, 0),
        OP(LISTXATTR, IN(getxattr), 0, 0, 0),
        OP(REMOVEXATTR, 0, 0, 0, OP_CHANGES),
        OP(FLUSH, IN(flush), 0, 0, OP_SLOW | OP_HANDLE),
        OP(INIT, 16, OUT(init), 0, 0),
        OP(OPENDIR, IN(open), OUT(open), 0, 0),
        OP(READDIR, IN(read), 0, 0, OP_HANDLE),
        OP(RELEASEDIR, IN(release), 0, 0, 0),
        OP(FSYNCDIR, IN(fsync), 0, 0, OP_SLOW | OP_HANDLE),
        OP(ACCESS, IN(access), 0, 0, 0),
        OP(CREATE, IN(create), OUT(entry) + OUT(open), 1, OP_CHANGES),
        OP(INTERRUPT, IN(interrupt), 0, 0, OP_SILENT),
        OP(DESTROY, 0, 0, 0, 0),
        OP(IOCTL, IN(ioctl), 0, 0, 0),
        OP(BATCH_FORGET, IN(batch_forget), 0, 0, OP_SILENT),
        OP(FALLOCATE, IN(fallocate), 0, 0, OP_CHANGES | OP_SLOW | OP_HANDLE),
        OP(READDIRPLUS, IN(read), 0, 0, OP_HANDLE),
        OP(RENAME2, IN(rename2), 0, 2, OP_CHANGES),
        OP(LSEEK, IN(lseek), OUT(lseek), 0, OP_HANDLE),
        OP(COPY_FILE_RANGE, IN(copy_file_range), OUT(write), 0, OP_CHANGES | OP_SLOW | OP_HANDLE),
        OP(SETUPMAPPING, IN(setupmapping), 0, 0, 0),
        OP(REMOVEMAPPING, IN(removemapping), 0, 0, 0),
        OP(SYNCFS, IN(syncfs), 0, 0, OP_SLOW),
        OP(TMPFILE, IN(create), OUT(entry) + OUT(open), 0, OP_CHANGES),
    };
    #undef OP
    #undef IN
    #undef OUT

    /* Raw system calls: in the kernel each thread has its own credentials, but glibc's functions change all threads. */
    static int fs_capget(struct __user_cap_data_struct *data) {
        struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
        return syscall(SYS_capget, &header, data);
    }
    /* The effective capabilities: those of `full` that are in `kept`, by their numbers. */
    #define CAPS_ALL UINT64_MAX
    #define CAPS_NO_FSETID (~(UINT64_C(1) << CAP_FSETID))       /* makes the host's kernel clear set-id bits */
    /* As a user creating a file: the guest's kernel has checked permissions; or also set-group-id bits. */
    #define CAPS_CREATE (UINT64_C(1) << CAP_DAC_OVERRIDE)
    #define CAPS_CREATE_SGID (CAPS_CREATE | UINT64_C(1) << CAP_FSETID)
    static int fs_capset(const struct __user_cap_data_struct *full, uint64_t kept) {
        struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
        struct __user_cap_data_struct data[2] = { full[0], full[1] };
        data[0].effective &= (uint32_t)kept;
        data[1].effective &= (uint32_t)(kept >> 32);
        return syscall(SYS_capset, &header, data);
    }
    static inline int fs_has(const struct __user_cap_data_struct *d, int cap) {
        return d[cap / 32].effective >> cap % 32 & 1;
    }
    static int fs_may_all(int reading) {
        struct __user_cap_data_struct data[2];
        return fs_capget(data) == 0
            && (fs_has(data, CAP_DAC_OVERRIDE) || (reading && fs_has(data, CAP_DAC_READ_SEARCH)));
    }
    static inline int fs_own(int proc_fd) {
        /* Give the thread its own umask and working directory; a container may refuse that. */
        if (unshare(CLONE_FS) < 0 || fchdir(proc_fd) < 0)
            return 0;
        umask(0);
        return 1;
    }
    static int fs_squash(uint32_t uid, uint32_t gid) {
        if (syscall(SYS_geteuid) != 0)
            return 0;                               /* the thread goes on after a hold: it is that user already */
        if (syscall(SYS_setgroups, 0, NULL) < 0 || syscall(SYS_setresgid, gid, gid, gid) < 0
                || syscall(SYS_setresuid, uid, uid, uid) < 0)
            return errno;
        return 0;
    }
    static int fs_prepare(struct __user_cap_data_struct *full) {
        if (syscall(SYS_geteuid) != 0 || fs_capget(full) < 0
                || !fs_has(full, CAP_SETUID) || !fs_has(full, CAP_SETGID))
            return 0;
        syscall(SYS_setgroups, 0, NULL);
        return 1;
    }
    static int fs_become(uint32_t uid, uint32_t gid, const struct __user_cap_data_struct *full, uint64_t kept) {
        if (uid == (uint32_t)-1 || gid == (uint32_t)-1)
            return EINVAL;                          /* -1 means "no change" to the kernel */
        if (syscall(SYS_setresgid, -1, gid, -1) < 0)
            return errno;
        if (uid && (syscall(SYS_setresuid, -1, uid, -1) < 0 || fs_capset(full, kept) < 0)) {
            int error = errno;
            syscall(SYS_setresuid, -1, 0, -1);
            syscall(SYS_setresgid, -1, 0, -1);
            return error;
        }
        return 0;
    }
    static void fs_return(uint32_t uid) {
        if (uid)
            syscall(SYS_setresuid, -1, 0, -1);      /* restores the effective capabilities */
        syscall(SYS_setresgid, -1, 0, -1);
    }
    """
    struct fuse_op:
        uint16_t size "in"
        uint16_t out
        uint8_t names
        uint8_t flags
    const fuse_op[52] fuse_ops
    int64_t NO_REPLY, WOULD_WAIT
    uint64_t DIRECT_IO_ALLOW_MMAP
    enum: OP_KNOWN, OP_CHANGES, OP_SLOW, OP_SILENT, OP_HANDLE
    uint64_t CAPS_ALL, CAPS_NO_FSETID, CAPS_CREATE, CAPS_CREATE_SGID
    int fs_capset(const __user_cap_data_struct *full, uint64_t kept) noexcept nogil
    bint fs_may_all(bint reading) noexcept nogil
    bint fs_own(int proc_fd) noexcept nogil
    int fs_squash(uint32_t uid, uint32_t gid) noexcept nogil
    bint fs_prepare(__user_cap_data_struct *full) noexcept nogil
    int fs_become(uint32_t uid, uint32_t gid, const __user_cap_data_struct *full, uint64_t kept) noexcept nogil
    void fs_return(uint32_t uid) noexcept nogil

cdef extern from "<dirent.h>" nogil:
    struct dirent64:
        uint64_t d_ino
        int64_t d_off
        uint16_t d_reclen
        uint8_t d_type
        char *d_name
    ssize_t getdents64(int fd, void *buffer, size_t size)

cdef extern from "<fcntl.h>" nogil:
    enum: O_NOFOLLOW, O_PATH, O_TMPFILE, AT_EMPTY_PATH, AT_NO_AUTOMOUNT
    enum: FALLOC_FL_PUNCH_HOLE, FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE
    int fallocate(int fd, int mode, int64_t offset, int64_t length)

cdef extern from "<sys/stat.h>" nogil:
    enum: STATX_BASIC_STATS, STATX_BTIME, UTIME_NOW, UTIME_OMIT
    # In C `statx` is both the structure above and this function, hence the other name.
    int statx_call "statx"(int dirfd, const char *path, int flags, unsigned int mask, statx *st)

cdef extern from "<sys/inotify.h>" nogil:
    enum: IN_NONBLOCK, IN_CLOEXEC, IN_MOVE_SELF
    int inotify_init1(int flags)
    int inotify_add_watch(int fd, const char *path, uint32_t mask)
    int inotify_rm_watch(int fd, int wd)

cdef extern from "<sys/sysmacros.h>" nogil:
    uint64_t makedev(unsigned int major, unsigned int minor)

cdef extern from "<sys/statfs.h>" nogil:
    struct host_statfs "statfs":
        long f_type, f_bsize, f_frsize, f_namelen
        uint64_t f_blocks, f_bfree, f_bavail, f_files, f_ffree
    int fstatfs(int fd, host_statfs *st)

cdef extern from "<sys/xattr.h>" nogil:
    ssize_t getxattr(const char *path, const char *name, void *value, size_t size)
    ssize_t listxattr(const char *path, char *names, size_t size)
    int setxattr(const char *path, const char *name, const void *value, size_t size, int flags)
    int removexattr(const char *path, const char *name)

cdef extern from "<stdio.h>" nogil:
    int renameat2(int olddir, const char *old, int newdir, const char *new, unsigned int flags)
    enum: RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT

cdef extern from "<unistd.h>" nogil:
    int syncfs(int fd)
    int fchownat(int dirfd, const char *path, uint32_t uid, uint32_t gid, int flags)
    int linkat(int olddir, const char *old, int newdir, const char *new, int flags)
    int symlinkat(const char *target, int newdir, const char *path)
    int unlinkat(int dirfd, const char *path, int flags)
    ssize_t readlinkat(int dirfd, const char *path, char *buffer, size_t size)
    ssize_t copy_file_range(int fd_in, int64_t *off_in, int fd_out, int64_t *off_out, size_t len, unsigned int flags)
