/* A server that lets everybody in and does nothing else: what stands behind a gateway whose own cost is to be seen.
 *
 *   bare_target PORT
 *
 * A session costs it one descriptor and no memory. It asks for no password, greets as PostgreSQL does, answers an empty
 * query, and closes when the client does. A packet that does not come whole at once ends its session: what logs in here
 * are gateways and login_load, each of whose messages is one write. Serves 127.0.0.1 alone, until it is ended.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BACKLOG = 1024, MOST_EVENTS = 256, MOST_DESCRIPTORS = 1 << 20 };

#define STATUS(length, name, value) "S\0\0\0" length name "\0" value "\0"
static const char greeting[] = "R\0\0\0\x08\0\0\0\0"
    STATUS("\x18", "server_version", "18.0")
    STATUS("\x19", "client_encoding", "UTF8")
    "K\0\0\0\x0c\0\0\0\x01\0\0\0\x01"
    "Z\0\0\0\x05I";
static const char empty[] = "I\0\0\0\x04Z\0\0\0\x05I";

static uint8_t greeted[MOST_DESCRIPTORS];

static int give_up(const char *what) {
    perror(what);
    return 1;
}

/* 0 if the session is over. */
static int serve(int fd) {
    char bytes[16384];
    ssize_t got = recv(fd, bytes, sizeof bytes, 0);
    if (got < 5)
        return 0;
    const char *answer = greeted[fd] ? empty : greeting;
    size_t length = greeted[fd] ? sizeof empty - 1 : sizeof greeting - 1;
    if (greeted[fd] ? bytes[0] != 'Q' : bytes[0] != 0)
        return 0;
    greeted[fd] = 1;
    return send(fd, answer, length, MSG_NOSIGNAL) == (ssize_t)length;
}

int main(int count, char **words) {
    if (count != 2) {
        fprintf(stderr, "usage: bare_target PORT\n");
        return 2;
    }
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(words[1]))};
    int on = 1, listening = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), watch = epoll_create1(EPOLL_CLOEXEC);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(listening, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); /* What is accepted inherits it. */
    if (bind(listening, (struct sockaddr *)&address, sizeof address) < 0 || listen(listening, BACKLOG) < 0)
        return give_up("cannot listen");
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listening}, events[MOST_EVENTS];
    if (watch < 0 || epoll_ctl(watch, EPOLL_CTL_ADD, listening, &event) < 0)
        return give_up("cannot watch");
    for (;;) {
        int ready = epoll_wait(watch, events, MOST_EVENTS, -1);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd != listening) {
                if (!serve(fd))
                    close(fd);
                continue;
            }
            fd = accept4(listening, NULL, NULL, SOCK_CLOEXEC);
            if (fd < 0 || fd >= MOST_DESCRIPTORS)
                return give_up("no descriptor left");
            greeted[fd] = 0;
            event.events = EPOLLIN, event.data.fd = fd;
            if (epoll_ctl(watch, EPOLL_CTL_ADD, fd, &event) < 0)
                return give_up("cannot watch");
        }
    }
}
