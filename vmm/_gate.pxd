# SPDX-License-Identifier: Apache-2.0
# Where threads wait while they are held, without the GIL: vCPUs of a paused machine, and workers of its devices.

cdef extern from *:
    """
    #include <pthread.h>
    #include <time.h>

    struct gate {
        pthread_mutex_t lock;
        pthread_cond_t changed;
        int shut;               /* also read without the lock */
        int ended, waiting;
    };
    static int gate_init(struct gate *g)
    { return pthread_mutex_init(&g->lock, NULL) || pthread_cond_init(&g->changed, NULL); }
    static void gate_destroy(struct gate *g) { pthread_cond_destroy(&g->changed); pthread_mutex_destroy(&g->lock); }
    static inline int gate_is_shut(struct gate *g) { return __atomic_load_n(&g->shut, __ATOMIC_SEQ_CST); }
    static void gate_set(struct gate *g, int shut, int ended)
    {
        pthread_mutex_lock(&g->lock);
        __atomic_store_n(&g->shut, shut, __ATOMIC_SEQ_CST);
        g->ended |= ended;
        pthread_cond_broadcast(&g->changed);
        pthread_mutex_unlock(&g->lock);
    }
    /* Called by a thread that goes through it: wait until it opens. Returns whether gate_set ended it for good. */
    static int gate_pass(struct gate *g)
    {
        int ended;
        pthread_mutex_lock(&g->lock);
        g->waiting++;
        pthread_cond_broadcast(&g->changed);
        while (g->shut && !g->ended) pthread_cond_wait(&g->changed, &g->lock);
        g->waiting--;
        ended = g->ended;
        pthread_mutex_unlock(&g->lock);
        return ended;
    }
    /* Wait at most 50 ms. Returns whether `count` threads wait at the gate, or it was opened or ended. */
    static int gate_await(struct gate *g, int count)
    {
        struct timespec end;
        int late = 0, there;
        clock_gettime(CLOCK_REALTIME, &end);
        end.tv_nsec += 50000000;
        if (end.tv_nsec >= 1000000000) { end.tv_nsec -= 1000000000; end.tv_sec++; }
        pthread_mutex_lock(&g->lock);
        while (!(there = g->waiting >= count || g->ended || !g->shut) && !late)
            late = pthread_cond_timedwait(&g->changed, &g->lock, &end);
        pthread_mutex_unlock(&g->lock);
        return there;
    }
    """
    ctypedef struct gate_t "struct gate":
        bint ended
    int gate_init(gate_t *g) noexcept
    void gate_destroy(gate_t *g) noexcept
    bint gate_is_shut(gate_t *g) noexcept nogil
    void gate_set(gate_t *g, bint shut, bint ended) noexcept nogil
    bint gate_pass(gate_t *g) noexcept nogil
    bint gate_await(gate_t *g, int count) noexcept nogil
