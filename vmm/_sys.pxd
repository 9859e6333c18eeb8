# SPDX-License-Identifier: Apache-2.0
# Host calls that several Cython loops share.
from libc.stdint cimport int64_t, uint32_t, uint64_t
from posix.unistd cimport close

cdef extern from *:
    """
    #include <errno.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <sys/mman.h>
    #include <sys/prctl.h>
    #include <time.h>
    static inline uint64_t clock_ns(clockid_t clock) {
        struct timespec t;
        clock_gettime(clock, &t);
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    }
    /* The kernel adds up to 50 us (the thread's timer slack). A signal ends it. */
    static inline void nap_ns(uint64_t ns) {
        struct timespec t = { (time_t)(ns / 1000000000u), (long)(ns % 1000000000u) };
        nanosleep(&t, NULL);
    }
    /* A large table, of which few pages are touched. malloc would fill it with zeros where a table before it was. */
    static inline void *table_alloc(size_t size) {
    #ifdef __SANITIZE_ADDRESS__
        return calloc(1, size);
    #else
        void *table = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        return table == MAP_FAILED ? NULL : table;
    #endif
    }
    static inline void table_free(void *table, size_t size) {
    #ifdef __SANITIZE_ADDRESS__
        free(table);
    #else
        if (table) munmap(table, size);
    #endif
    }
    static inline void set_errno(int number) { errno = number; }
    static inline void name_thread(const char *name) { prctl(PR_SET_NAME, name, 0, 0, 0); }
    /* A number that one thread counts up, or several one after the other, while any reads it. */
    static inline void counter_add(uint64_t *counter, int64_t n) {
        __atomic_store_n(counter, __atomic_load_n(counter, __ATOMIC_RELAXED) + (uint64_t)n, __ATOMIC_RELAXED);
    }
    static inline uint64_t counter_read(const uint64_t *counter) { return __atomic_load_n(counter, __ATOMIC_RELAXED); }
    static inline void counters_read(void *to, const void *from, size_t size) {
        for (size_t i = 0; i < size / sizeof(uint64_t); i++)
            ((uint64_t *)to)[i] = counter_read((const uint64_t *)from + i);
    }
    /* A number that one thread sets and others read. */
    static inline int flag_read(const int *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void flag_set(int *p, int v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    /* A register that several threads change. */
    static inline uint32_t load32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static inline void store32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    static inline void or32(uint32_t *p, uint32_t v) { __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }
    static inline void and32(uint32_t *p, uint32_t v) { __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); }
    """
    enum: CLOCK_MONOTONIC, CLOCK_MONOTONIC_COARSE, CLOCK_REALTIME
    uint64_t clock_ns(int clock) noexcept nogil
    void nap_ns(uint64_t ns) noexcept nogil
    void *table_alloc(size_t size) noexcept nogil           # zeros; NULL: the host has no memory left
    void table_free(void *table, size_t size) noexcept nogil
    void set_errno(int number) noexcept nogil
    void name_thread(const char *name) noexcept nogil       # the calling thread; truncated to 15 bytes
    void counter_add(uint64_t *counter, int64_t n) noexcept nogil
    uint64_t counter_read(const uint64_t *counter) noexcept nogil
    void counters_read(void *to, const void *source, size_t size) noexcept nogil    # a struct or array of them
    int flag_read(const int *p) noexcept nogil
    void flag_set(int *p, int value) noexcept nogil
    uint32_t load32(const uint32_t *p) noexcept nogil
    void store32(uint32_t *p, uint32_t v) noexcept nogil
    void or32(uint32_t *p, uint32_t v) noexcept nogil
    void and32(uint32_t *p, uint32_t v) noexcept nogil

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initval, int flags)
    int eventfd_write(int fd, uint64_t value)
    enum: EFD_CLOEXEC, EFD_NONBLOCK, EFD_SEMAPHORE

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
