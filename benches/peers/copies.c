/* SPDX-License-Identifier: Apache-2.0
 * The least that copies of a running guest cost on this host: the calls of KVM alone, in C.
 *
 * copies COUNT MIB
 *
 * RAM of MIB is in a memfd, all of it written. COUNT copies map it copy-on-write, one after the other: VM, memory slot,
 * interrupt controllers, vCPU, CPUID, registers, a thread, the first exit. All stay. For each, a line: its time in ms.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

static const char again[] = {(char)0xe6, (char)0x80, (char)0xeb, (char)0xfc}; /* 1: out 0x80, al; jmp 1b */
static struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entries[256]; } cpuid;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static int must(int result, const char *what) {
    if (result < 0) fail(what);
    return result;
}

static void *mapped(int fd, size_t size, int flags) {
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (at == MAP_FAILED) fail("mmap");
    return at;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

struct copy {
    int vcpu, exited;
    struct kvm_run *run;
};

static void *run(void *argument) {
    struct copy *copy = argument;
    must(ioctl(copy->vcpu, KVM_RUN, 0), "KVM_RUN");
    if (copy->run->exit_reason != KVM_EXIT_IO) fail("exit");
    __atomic_store_n(&copy->exited, 1, __ATOMIC_RELEASE);
    for (;;) pause();
    return NULL;
}

static void make(int kvm, int memfd, size_t size, size_t run_size) {
    struct copy *copy = calloc(1, sizeof *copy);
    void *ram = mapped(memfd, size, MAP_PRIVATE | MAP_NORESERVE);
    int vm = must(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    struct kvm_userspace_memory_region slot = {.memory_size = size, .userspace_addr = (unsigned long)ram};
    must(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
    must(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    copy->vcpu = must(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    copy->run = mapped(copy->vcpu, run_size, MAP_SHARED);
    must(ioctl(copy->vcpu, KVM_SET_CPUID2, &cpuid), "KVM_SET_CPUID2");
    struct kvm_sregs sregs;
    must(ioctl(copy->vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    sregs.cs.base = sregs.cs.selector = 0;
    must(ioctl(copy->vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    struct kvm_regs regs = {.rflags = 2};
    must(ioctl(copy->vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
    pthread_t thread;
    if (pthread_create(&thread, NULL, run, copy)) fail("pthread_create");
    while (!__atomic_load_n(&copy->exited, __ATOMIC_ACQUIRE)) nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    size_t size = (size_t)atoi(argv[2]) << 20;
    prctl(PR_SET_TIMERSLACK, 1);
    int kvm = must(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
    size_t run_size = must(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    cpuid.head.nent = 256;
    must(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), "KVM_GET_SUPPORTED_CPUID");
    int memfd = must(memfd_create("ram", MFD_CLOEXEC), "memfd_create");
    must(ftruncate(memfd, size), "ftruncate");
    char *ram = mapped(memfd, size, MAP_SHARED);
    memset(ram, 'x', size);
    memcpy(ram, again, sizeof again);
    munmap(ram, size);
    for (int i = 0; i < atoi(argv[1]); i++) {
        double begun = now();
        make(kvm, memfd, size, run_size);
        printf("%.4f\n", now() - begun);
    }
    return 0;
}
