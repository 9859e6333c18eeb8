/* SPDX-License-Identifier: Apache-2.0 */
/* In each extension of `make coverage`: when gcov writes its counts, at a process's end. A process with seccomp filters
 * (it has a handler for SIGSYS) would be killed for it, one that became another user would complain: both keep quiet. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <signal.h>
#include <unistd.h>

extern void __real___gcov_exit(void);
static uid_t user_of_import;

__attribute__((constructor)) static void note_user(void)
{
    user_of_import = geteuid();
}

/* ld --wrap=__gcov_exit */
void __wrap___gcov_exit(void)
{
    struct sigaction forbidden;
    if (!sigaction(SIGSYS, NULL, &forbidden) && forbidden.sa_handler == SIG_DFL && geteuid() == user_of_import)
        __real___gcov_exit();
}
