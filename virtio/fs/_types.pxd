# SPDX-License-Identifier: Apache-2.0
# The host file systems that may be shared with a guest, by f_type of statfs(2).
# Source: linux/magic.h, and for types that it lacks the file systems' own headers.
from libc.stdint cimport uint32_t

cdef extern from *:
    """
    #include <stdint.h>
    /* File systems that store files, local or remote. On other types a regular file may give access to the kernel, as
       /proc/PID/mem does. So this list has the allowed types, and an unknown type is refused. */
    enum { FS_LOCAL = 1, FS_REMOTE };
    static inline int fs_kind(uint32_t type) {
        switch (type) {
        case 0xEF53:        /* ext2, ext3, ext4 */
        case 0x58465342:    /* XFS */
        case 0x9123683E:    /* btrfs */
        case 0xF2F52010:    /* F2FS */
        case 0x2FC12FC1:    /* ZFS */
        case 0xCA451A4E:    /* bcachefs */
        case 0x01021994:    /* tmpfs; also devtmpfs, whose device nodes are never opened */
        case 0x858458F6:    /* ramfs */
        case 0x794C7630:    /* overlayfs */
        case 0x61756673:    /* aufs */
        case 0xF15F:        /* eCryptfs */
        case 0x73717368:    /* squashfs */
        case 0xE0F5E1E2:    /* EROFS */
        case 0x28CD3D45:    /* cramfs */
        case 0x7275:        /* romfs */
        case 0x9660:        /* ISO 9660 */
        case 0x15013346:    /* UDF */
        case 0x4D44:        /* FAT */
        case 0x2011BAB0:    /* exFAT */
        case 0x5346544E:    /* NTFS */
        case 0x7366746E:    /* ntfs3 */
        case 0x4244:        /* HFS */
        case 0x482B:        /* HFS+ */
        case 0x3153464A:    /* JFS */
        case 0x52654973:    /* ReiserFS */
        case 0x3434:        /* NILFS2 */
        case 0x72B6:        /* JFFS2 */
        case 0x24051905:    /* UBIFS */
        case 0x01161970:    /* GFS2 */
        case 0x7461636F:    /* OCFS2 */
            return FS_LOCAL;
        /* Here close() may fail, so FLUSH matters. */
        case 0x6969:        /* NFS */
        case 0xFF534D42:    /* CIFS */
        case 0xFE534D42:    /* SMB2 */
        case 0x65735546:    /* FUSE, virtio-fs */
        case 0x01021997:    /* 9p */
        case 0x00C36400:    /* Ceph */
        case 0x0BD00BD0:    /* Lustre */
        case 0x47504653:    /* GPFS */
        case 0x20030528:    /* OrangeFS */
        case 0x19830326:    /* BeeGFS */
        case 0x6B414653:    /* AFS, the kernel's */
        case 0x5346414F:    /* OpenAFS */
        case 0x786F4256:    /* VirtualBox's shared folders */
        case 0xBACBACBC:    /* VMware's */
        case 0x7C7C6673:    /* Parallels' */
            return FS_REMOTE;
        default:
            return 0;
        }
    }
    static inline int fs_is_overlay(uint32_t type) { return type == 0x794C7630; }
    """
    enum: FS_REMOTE
    int fs_kind(uint32_t type) noexcept nogil               # 0: it does not store files
    bint fs_is_overlay(uint32_t type) noexcept nogil
