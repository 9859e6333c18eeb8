// SPDX-License-Identifier: Apache-2.0
// Boot, from the initramfs to the image's root: drivers, the image's layers with a writable one on top, file systems,
// network. And the update of a sandbox that was restored from a snapshot.
#include "agent.h"
#include "libc.h"
#include <linux/random.h>
#include <linux/reboot.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>

static char cmdline[4096];

static void die(const char *what)
{
    say(what, errno);
    CALL(reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_RESTART, NULL);
    _exit(1);
}

// The value of NAME= on the kernel's command line, or "".
static const char *parameter(const char *name, char *to, size_t room)
{
    size_t length = strlen(name);
    to[0] = 0;
    for (const char *at = cmdline; at; at = strchr(at, ' ')) {
        at += *at == ' ';
        if (strncmp(at, name, length) || at[length] != '=')
            continue;
        size_t i = 0;
        for (at += length + 1; *at && *at != ' ' && *at != '\n' && i + 1 < room; at++)
            to[i++] = *at;
        to[i] = 0;
        break;
    }
    return to;
}

static int attach(const char *source, const char *place, const char *type, unsigned long flags, const char *data)
{
    CALL(mkdir, place, 0755);
    return (int)CALL(mount, source, place, type, flags, data);
}

// Load kernel modules with the initramfs's busybox. /lib/modules/order lists those for every machine; it is absent or
// empty if the kernel has no modules.
static void load_modules(void)
{
    static char *const insmod =
        "while read -r name; do insmod /lib/modules/$name; done </lib/modules/order;"
        "modprobe -qa vmw_vsock_virtio_transport overlay virtio_net virtiofs virtio_rng virtio_balloon; :";
    struct stat status;
    if (look(AT_FDCWD, "/lib/modules/order", 0, &status) || !status.st_size)
        return;
    long child = CALL(fork);
    if (!child) {
        char *argv[] = {"sh", "-c", insmod, NULL}, *env[] = {"PATH=/usr/sbin:/usr/bin:/sbin:/bin", NULL};
        CALL(execve, "/bin/busybox", argv, env);
        _exit(127);
    }
    CALL(wait4, child, NULL, 0, NULL);
}

static int mount_layer(const char *device, const char *place)
{
    static const char *const types[] = {"ext4", "squashfs", "erofs"};
    for (int tries = 0; tries < 200; tries++) { // a device may take a moment to appear
        for (size_t i = 0; i < sizeof types / sizeof *types; i++)
            if (!attach(device, place, types[i], MS_RDONLY, i ? NULL : "noload") || errno == EBUSY)
                return 0;
        if (errno != ENOENT && errno != ENXIO)
            return -1;
        struct timespec moment = {0, 10000000};
        CALL(nanosleep, &moment, NULL);
    }
    return -1;
}

static void mount_root(void)
{
    char digits[24], options[1024], device[] = "/dev/vda", lower[512] = "", place[32];
    long layers = number(parameter("pyvmm.layers", options, sizeof options), 1);
    attach("layers", "/l", "tmpfs", 0, "mode=0755");
    for (long i = 0; i < layers && i < 24; i++, device[7]++) {
        char below[512];
        join(place, sizeof place, "/l/", decimal((unsigned long)i, digits), NULL);
        if (mount_layer(device, place))
            die("cannot mount a disk of the image");
        join(below, sizeof below, lower, NULL); // the last disk is the uppermost layer
        join(lower, sizeof lower, place, *below ? ":" : "", below, NULL);
    }
    parameter("pyvmm.room", options, sizeof options);
    join(place, sizeof place, "mode=0755,size=", *options ? options : "75%", NULL);
    if (attach("upper", "/u", "tmpfs", 0, place))
        die("cannot mount tmpfs");
    CALL(mkdir, "/u/upper", 0755);
    CALL(mkdir, "/u/work", 0755);
    join(options, sizeof options, "lowerdir=", lower, ",upperdir=/u/upper,workdir=/u/work", NULL);
    if (attach("root", "/r", "overlay", 0, options))
        die("cannot mount the root");
}

static void mount_rest(void)
{
    attach("proc", "/r/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    attach("sys", "/r/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    attach("dev", "/r/dev", "devtmpfs", MS_NOSUID, NULL);
    attach("devpts", "/r/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=666");
    attach("shm", "/r/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, NULL);
    attach("run", "/r/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755");
    attach("cgroup2", "/r/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    CALL(mkdir, "/r/tmp", 01777);
    CALL(chmod, "/r/tmp", 01777);
    CALL(mkdir, "/r/root", 0700);
    CALL(symlink, "/proc/self/fd", "/r/dev/fd");
    CALL(symlink, "/proc/self/fd/0", "/r/dev/stdin");
    CALL(symlink, "/proc/self/fd/1", "/r/dev/stdout");
    CALL(symlink, "/proc/self/fd/2", "/r/dev/stderr");
    if (CALL(chdir, "/r") || CALL(mount, ".", "/", NULL, MS_MOVE, NULL) || CALL(chroot, ".") || CALL(chdir, "/"))
        die("cannot change to the root");
}

static uint32_t ipv4(const char **at)
{
    uint32_t address = 0;
    for (int i = 0; i < 4; i++) {
        address |= (uint32_t)(digits(at) & 255) << 8 * i;
        *at += **at == '.';
    }
    return address;
}

static void set_address(struct ifreq *request, uint32_t address)
{
    struct sockaddr_in inet = {.sin_family = AF_INET, .sin_addr = {address}};
    memcpy(&request->ifr_addr, &inet, sizeof inet);
}

static void up(int fd, const char *name, uint32_t address, long bits)
{
    struct ifreq request = {0};
    join(request.ifr_name, IFNAMSIZ, name, NULL);
    if (address) {
        set_address(&request, address);
        CALL(ioctl, fd, SIOCSIFADDR, &request);
        set_address(&request, __builtin_bswap32(bits ? ~0u << (32 - bits) : 0));
        CALL(ioctl, fd, SIOCSIFNETMASK, &request);
    }
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    if (CALL(ioctl, fd, SIOCSIFFLAGS, &request))
        say(name, errno);
}

// pyvmm.net=ADDRESS/BITS,GATEWAY,NAMESERVER
static void bring_network_up(void)
{
    char text[128], server[64];
    const char *at = parameter("pyvmm.net", text, sizeof text);
    int fd = (int)CALL(socket, AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    up(fd, "lo", 0, 0);
    if (*at) {
        uint32_t address = ipv4(&at);
        at += *at == '/';
        up(fd, "eth0", address, digits(&at));
        at += *at == ',';
        struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY};
        struct sockaddr_in gateway = {.sin_family = AF_INET, .sin_addr = {ipv4(&at)}};
        memcpy(&route.rt_gateway, &gateway, sizeof gateway);
        route.rt_dst.sa_family = route.rt_genmask.sa_family = AF_INET;
        if (CALL(ioctl, fd, SIOCADDRT, &route))
            say("default route", errno);
        at += *at == ',';
    }
    if (*at) {
        join(server, sizeof server, "nameserver ", at, "\n", NULL);
        CALL(unlink, "/etc/resolv.conf");
        spit("/etc/resolv.conf", server);
    }
    close(fd);
}

static unsigned long least; // KiB that the kernel keeps free by default
static int reserve = -1;

// Keep RESERVE more free, or with 0 let the agent and commands have that. The descriptor stays open, because opening a
// file takes memory.
void keep_free(int more)
{
    char digits[24];
    const char *text = decimal(least + (more ? RESERVE : 0), digits);
    CALL(pwrite64, reserve, text, strlen(text), 0);
}

// The number in a file, or `otherwise`.
static long number_in(const char *path, long otherwise)
{
    char text[24];
    const char *at = text;
    return slurp(path, text, sizeof text) > 0 ? digits(&at) : otherwise;
}

static void make_reserve(void)
{
    long kept = number_in("/proc/sys/vm/min_free_kbytes", -1);
    if (kept < 0)
        return;
    least = (unsigned long)kept;
    reserve = open_file(AT_FDCWD, "/proc/sys/vm/min_free_kbytes", O_WRONLY, 0);
    keep_free(1);
}

int commands = -1;

// Commands and what they start are a cgroup that may have three quarters of the kernel's processes. One that makes
// processes without end leaves the others for the kernel and the agent. And as the scheduler shares the CPU between
// that cgroup and each process outside it, the agent has its turn.
static void limit_processes(void)
{
    static const char group[] = "/sys/fs/cgroup/commands";
    long threads = number_in("/proc/sys/kernel/threads-max", 0), ids = number_in("/proc/sys/kernel/pid_max", threads);
    char digits[24];
    spit("/sys/fs/cgroup/cgroup.subtree_control", "+pids");
    spit("/sys/fs/cgroup/cgroup.subtree_control", "+cpu");
    CALL(mkdir, group, 0755);
    if (spit("/sys/fs/cgroup/commands/pids.max", decimal((unsigned long)(threads < ids ? threads : ids) / 4 * 3, digits)))
        say("the number of processes has no limit: no pids controller", errno);
    else
        commands = open_file(AT_FDCWD, group, O_PATH | O_DIRECTORY, 0);
}

void boot(void)
{
    struct stat status;
    attach("proc", "/proc", "proc", 0, NULL);
    attach("sys", "/sys", "sysfs", 0, NULL);
    attach("dev", "/dev", "devtmpfs", 0, NULL);
    slurp("/proc/cmdline", cmdline, sizeof cmdline);
    load_modules();
    mount_root();
    mount_rest();
    // Root writes files to directories that users can write to. It must not follow a link, or open a pipe or a file,
    // that a user has put there.
    spit("/proc/sys/fs/protected_symlinks", "1");
    spit("/proc/sys/fs/protected_hardlinks", "1");
    spit("/proc/sys/fs/protected_fifos", "2");
    spit("/proc/sys/fs/protected_regular", "2");
    make_reserve();
    limit_processes();
    char name[65];
    parameter("pyvmm.name", name, sizeof name);
    CALL(sethostname, *name ? name : "sandbox", strlen(*name ? name : "sandbox"));
    CALL(mkdir, "/etc", 0755);
    if (look(AT_FDCWD, "/etc/hosts", 0, &status) || !status.st_size)
        spit("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n");
    bring_network_up();
    CALL(umask, 022);
}

// Verb "wake", for a new or restored sandbox: time (nanoseconds since 1970), name (of the host), random (64 bytes in
// hexadecimal).
void wake(const struct request *request)
{
    struct {
        struct rand_pool_info info;
        unsigned char bytes[64];
    } pool = {.info = {512, 64}};
    const char *name = value(request, "name"), *random = value(request, "random");
    long now = number(value(request, "time"), 0);
    if (now) {
        struct timespec time = {now / 1000000000, now % 1000000000};
        CALL(clock_settime, CLOCK_REALTIME, &time);
    }
    if (name)
        CALL(sethostname, name, strlen(name));
    if (random && strlen(random) == 128) {
        for (int i = 0; i < 128; i++) {
            int digit = random[i] <= '9' ? random[i] - '0' : random[i] - 'a' + 10;
            pool.bytes[i / 2] = (unsigned char)(pool.bytes[i / 2] << 4 | digit);
        }
        int fd = open_file(AT_FDCWD, "/dev/urandom", O_WRONLY, 0);
        CALL(ioctl, fd, RNDADDENTROPY, &pool);
        CALL(ioctl, fd, RNDRESEEDCRNG, 0);
        close(fd);
    }
    send_ok();
}

// Verb "mount", for a shared directory: tag, path, ro.
void mount_share(const struct request *request)
{
    const char *tag = value(request, "tag"), *path = value(request, "path");
    unsigned long flags = MS_NOSUID | MS_NODEV | (value(request, "ro") ? MS_RDONLY : 0);
    if (!tag || !path)
        send_failed(EINVAL, path ? path : "mount");
    else if (make_directory(path) || CALL(mount, tag, path, "virtiofs", flags, NULL))
        send_failed(errno, path);
    else
        send_ok();
}

// Verb "read-only": make the root read-only. The directories in `writable` stay as they are, with what is in them.
void make_read_only(const struct request *request)
{
    const char *path;
    for (int i = 0; (path = next_value(request, "writable", &i));) {
        if (make_directory(path) || CALL(mount, path, path, NULL, MS_BIND, NULL)) {
            send_failed(errno, path);
            return;
        }
    }
    if (CALL(mount, NULL, "/", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL))
        send_failed(errno, "/");
    else
        send_ok();
}
