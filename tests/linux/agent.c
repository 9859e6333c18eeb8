// SPDX-License-Identifier: Apache-2.0
// The first process of a guest that is reached only by vsock. Each line sent to port 1024 is a shell command. Its
// output comes back as one line, with '|' between the original lines.
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <unistd.h>

enum { PORT = 1024, LINE = 4096 };

static void serve(int fd)
{
    static char line[LINE], answer[16 * LINE];
    FILE *in = fdopen(fd, "r");
    while (fgets(line, sizeof line, in)) {
        FILE *output = popen(line, "r");
        size_t length = output ? fread(answer, 1, sizeof answer - 1, output) : 0;
        if (output)
            pclose(output);
        while (length && answer[length - 1] == '\n')
            length--;
        for (size_t i = 0; i < length; i++)
            if (answer[i] == '\n')
                answer[i] = '|';
        answer[length++] = '\n';
        for (size_t at = 0; at < length;) {
            ssize_t done = write(fd, answer + at, length - at);
            if (done <= 0)
                return;
            at += done;
        }
    }
}

int main(void)
{
    setenv("PATH", "/bin", 1);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sys", "/sys", "sysfs", 0, NULL);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    mount("tmp", "/tmp", "tmpfs", 0, NULL);
    system("for file in /lib/modules/*.ko; do [ -e \"$file\" ] && insmod \"$file\"; done; ip link set lo up");
    signal(SIGPIPE, SIG_IGN);
    int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_port = PORT, .svm_cid = VMADDR_CID_ANY};
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 16))
        perror("agent: vsock");
    puts("agent: ready");
    fflush(stdout);
    signal(SIGCHLD, SIG_IGN);
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0) {
            sleep(1);
            continue;
        }
        if (!fork()) {
            signal(SIGCHLD, SIG_DFL);
            serve(fd);
            _exit(0);
        }
        close(fd);
    }
}
