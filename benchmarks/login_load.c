/* A PostgreSQL client that does nothing but log in, as cheaply as it can be done.
 *
 *   login_load logins PORT USER DATABASE PASSWORD TOUCH CLIENTS SECONDS MOST
 *       CLIENTS threads log in and leave, one login after the other, until SECONDS are over or MOST logins are
 *       done. Prints `LOGINS SECONDS`.
 *   login_load hold PORT USER DATABASE PASSWORD TOUCH
 *       For each number on standard input opens that many sessions more and prints how many are open. At end of
 *       file it closes them all.
 *
 * TOUCH 1 sends an empty query behind each login: a pooler in session mode logs in to its server only when the
 * first query comes. Answers trust, cleartext and MD5. One failed login ends the program with status 1.
 * Speaks to 127.0.0.1 alone.
 */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum {
    PROTOCOL_3_0 = 196608,
    READ_TIMEOUT_SECONDS = 30,
    MOST_CLIENTS = 256,
    AUTH_OK = 0,
    AUTH_CLEARTEXT = 3,
    AUTH_MD5 = 5,
};

static uint16_t port;
static const char *user, *database, *password;
static int touch;

/* --- MD5, RFC 1321; for messages of at most one kilobyte ------------------------------------------------- */

static const uint8_t md5_shift[4][4] = {{7, 12, 17, 22}, {5, 9, 14, 20}, {4, 11, 16, 23}, {6, 10, 15, 21}};
static const uint32_t md5_sine[64] = {
    0xd76aa478, 0xe8c7b756, 0x242070db, 0xc1bdceee, 0xf57c0faf, 0x4787c62a, 0xa8304613, 0xfd469501,
    0x698098d8, 0x8b44f7af, 0xffff5bb1, 0x895cd7be, 0x6b901122, 0xfd987193, 0xa679438e, 0x49b40821,
    0xf61e2562, 0xc040b340, 0x265e5a51, 0xe9b6c7aa, 0xd62f105d, 0x02441453, 0xd8a1e681, 0xe7d3fbc8,
    0x21e1cde6, 0xc33707d6, 0xf4d50d87, 0x455a14ed, 0xa9e3e905, 0xfcefa3f8, 0x676f02d9, 0x8d2a4c8a,
    0xfffa3942, 0x8771f681, 0x6d9d6122, 0xfde5380c, 0xa4beea44, 0x4bdecfa9, 0xf6bb4b60, 0xbebfbc70,
    0x289b7ec6, 0xeaa127fa, 0xd4ef3085, 0x04881d05, 0xd9d4d039, 0xe6db99e5, 0x1fa27cf8, 0xc4ac5665,
    0xf4292244, 0x432aff97, 0xab9423a7, 0xfc93a039, 0x655b59c3, 0x8f0ccc92, 0xffeff47d, 0x85845dd1,
    0x6fa87e4f, 0xfe2ce6e0, 0xa3014314, 0x4e0811a1, 0xf7537e82, 0xbd3af235, 0x2ad7d2bb, 0xeb86d391};

static void md5_block(uint32_t state[4], const uint8_t *block) {
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3], word[16];
    for (int i = 0; i < 16; i++)
        word[i] = block[4 * i] | block[4 * i + 1] << 8 | block[4 * i + 2] << 16 | (uint32_t)block[4 * i + 3] << 24;
    for (int i = 0; i < 64; i++) {
        uint32_t mixed;
        int take;
        switch (i / 16) {
        case 0: mixed = (b & c) | (~b & d); take = i; break;
        case 1: mixed = (d & b) | (~d & c); take = (5 * i + 1) % 16; break;
        case 2: mixed = b ^ c ^ d; take = (3 * i + 5) % 16; break;
        default: mixed = c ^ (b | ~d); take = (7 * i) % 16; break;
        }
        uint32_t turned = a + mixed + md5_sine[i] + word[take];
        int shift = md5_shift[i / 16][i % 4];
        a = d, d = c, c = b;
        b += turned << shift | turned >> (32 - shift);
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
}

static void md5_hex(const void *message, size_t length, char hex[33]) {
    uint8_t padded[1024 + 128] = {0};
    uint32_t state[4] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476};
    size_t whole = (length + 8) / 64 * 64 + 64;
    if (length > 1024)
        abort();
    memcpy(padded, message, length);
    padded[length] = 0x80;
    for (int i = 0; i < 8; i++)
        padded[whole - 8 + i] = (uint8_t)((uint64_t)length * 8 >> 8 * i);
    for (size_t at = 0; at < whole; at += 64)
        md5_block(state, padded + at);
    for (int i = 0; i < 16; i++)
        sprintf(hex + 2 * i, "%02x", state[i / 4] >> 8 * (i % 4) & 0xff);
}

/* --- The wire --------------------------------------------------------------------------------------------- */

struct reader {
    int fd;
    size_t at, have;
    uint8_t bytes[16384];
};

static uint32_t get_u32(const uint8_t *at) {
    uint32_t value;
    memcpy(&value, at, 4);
    return ntohl(value);
}

static void put_u32(uint8_t *at, uint32_t value) {
    value = htonl(value);
    memcpy(at, &value, 4);
}

static int send_all(int fd, const uint8_t *bytes, size_t length) {
    return send(fd, bytes, length, MSG_NOSIGNAL) == (ssize_t)length ? 0 : -1;
}

static int fail(const char *what) {
    fprintf(stderr, "login_load: %s\n", what);
    return -1;
}

/* The next whole message: its type, its body and the body's length. A login's messages all fit the buffer. */
static int next_message(struct reader *in, uint8_t *type, const uint8_t **body, size_t *length) {
    for (;;) {
        size_t here = in->have - in->at;
        if (here >= 5) {
            size_t whole = 1 + (size_t)get_u32(in->bytes + in->at + 1);
            if (whole < 5 || whole > sizeof in->bytes)
                return fail("a message of impossible length");
            if (here >= whole) {
                *type = in->bytes[in->at];
                *body = in->bytes + in->at + 5;
                *length = whole - 5;
                in->at += whole;
                return 0;
            }
        }
        memmove(in->bytes, in->bytes + in->at, here);
        in->at = 0;
        ssize_t got = recv(in->fd, in->bytes + here, sizeof in->bytes - here, 0);
        if (got <= 0)
            return fail(got == 0 ? "the server closed during login" : "no answer during login");
        in->have = here + (size_t)got;
    }
}

static int send_startup(int fd) {
    uint8_t packet[1024];
    size_t length = 8;
    put_u32(packet + 4, PROTOCOL_3_0);
    const char *texts[] = {"user", user, "database", database};
    for (int i = 0; i < 4; i++) {
        size_t size = strlen(texts[i]) + 1;
        if (length + size > sizeof packet - 1)
            return fail("the names are too long");
        memcpy(packet + length, texts[i], size);
        length += size;
    }
    packet[length++] = 0;
    put_u32(packet, (uint32_t)length);
    return send_all(fd, packet, length);
}

static int send_password(int fd, const char *text) {
    uint8_t packet[1024];
    size_t size = strlen(text) + 1;
    if (size + 5 > sizeof packet)
        return fail("the password is too long");
    packet[0] = 'p';
    put_u32(packet + 1, (uint32_t)(size + 4));
    memcpy(packet + 5, text, size);
    return send_all(fd, packet, size + 5);
}

static int answer_md5(int fd, const uint8_t salt[4]) {
    char joined[1024], answer[36] = "md5", stored[33];
    int length = snprintf(joined, sizeof joined, "%s%s", password, user);
    if (length < 0 || (size_t)length >= sizeof joined)
        return fail("the password is too long");
    md5_hex(joined, (size_t)length, stored);
    memcpy(joined, stored, 32);
    memcpy(joined + 32, salt, 4);
    md5_hex(joined, 36, answer + 3);
    return send_password(fd, answer);
}

static int answer_authentication(int fd, const uint8_t *body, size_t length) {
    switch (length >= 4 ? get_u32(body) : UINT32_MAX) {
    case AUTH_OK: return 0;
    case AUTH_CLEARTEXT: return send_password(fd, password);
    case AUTH_MD5: return length >= 8 ? answer_md5(fd, body + 4) : fail("a short MD5 request");
    default: return fail("asked for an authentication that is not spoken here");
    }
}

/* Prints the fields of an ErrorResponse, each behind its letter. */
static int fail_with_error(const uint8_t *body, size_t length) {
    fprintf(stderr, "login_load: refused:");
    for (size_t at = 0; at < length && body[at]; at += strnlen((const char *)body + at, length - at) + 1)
        fprintf(stderr, " %.*s", (int)strnlen((const char *)body + at, length - at), (const char *)body + at);
    fputc('\n', stderr);
    return -1;
}

static int pump_login(int fd) {
    static const uint8_t empty_query[] = {'Q', 0, 0, 0, 5, 0};
    struct reader in = {.fd = fd};
    int ready_wanted = touch ? 2 : 1;
    uint8_t type;
    const uint8_t *body;
    size_t length;

    if (send_startup(fd) < 0)
        return -1;
    for (;;) {
        if (next_message(&in, &type, &body, &length) < 0)
            return -1;
        if (type == 'R' && answer_authentication(fd, body, length) < 0)
            return -1;
        if (type == 'E')
            return fail_with_error(body, length);
        if (type == 'Z' && --ready_wanted == 0)
            return 0;
        if (type == 'Z' && send_all(fd, empty_query, sizeof empty_query) < 0)
            return -1;
    }
}

static int log_in(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct timeval patience = {.tv_sec = READ_TIMEOUT_SECONDS};
    int on = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0)
        return fail("no descriptor left");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0) {
        close(fd);
        return fail("cannot connect");
    }
    if (pump_login(fd) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

static void leave(int fd) {
    static const uint8_t terminate[] = {'X', 0, 0, 0, 4};
    send_all(fd, terminate, sizeof terminate); /* Whether it arrives is nobody's concern: the socket closes. */
    close(fd);
}

/* --- What it is asked for --------------------------------------------------------------------------------- */

static atomic_long logins_left, logins_done;
static atomic_int broken;
static double deadline;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void *run_client(void *nothing) {
    (void)nothing;
    while (!broken && now() < deadline && atomic_fetch_sub(&logins_left, 1) > 0) {
        int fd = log_in();
        if (fd < 0) {
            broken = 1;
            break;
        }
        leave(fd);
        atomic_fetch_add(&logins_done, 1);
    }
    return NULL;
}

static int run_logins(int clients, double seconds, long most) {
    pthread_t threads[MOST_CLIENTS];
    if (clients < 1 || clients > MOST_CLIENTS)
        return fail("impossible number of clients");
    logins_left = most;
    double begun = now();
    deadline = begun + seconds;
    for (int i = 0; i < clients; i++)
        if (pthread_create(&threads[i], NULL, run_client, NULL) != 0)
            return fail("cannot start a thread");
    for (int i = 0; i < clients; i++)
        pthread_join(threads[i], NULL);
    printf("%ld %.6f\n", (long)logins_done, now() - begun);
    return broken ? -1 : 0;
}

static int hold_sessions(void) {
    static int sessions[65536];
    size_t open = 0;
    char line[32];
    while (fgets(line, sizeof line, stdin)) {
        for (long more = strtol(line, NULL, 10); more > 0; more--) {
            if (open == sizeof sessions / sizeof *sessions)
                return fail("too many sessions");
            if ((sessions[open] = log_in()) < 0)
                return -1;
            open++;
        }
        printf("%zu\n", open);
        fflush(stdout);
    }
    while (open > 0)
        leave(sessions[--open]);
    return 0;
}

int main(int count, char **words) {
    int logins = count == 10 && strcmp(words[1], "logins") == 0;
    if (!logins && !(count == 7 && strcmp(words[1], "hold") == 0)) {
        fail("usage: logins PORT USER DATABASE PASSWORD TOUCH CLIENTS SECONDS MOST | hold PORT USER DATABASE PASSWORD TOUCH");
        return 2;
    }
    port = (uint16_t)strtoul(words[2], NULL, 10);
    user = words[3], database = words[4], password = words[5];
    touch = strcmp(words[6], "1") == 0;
    if (logins)
        return run_logins((int)strtol(words[7], NULL, 10), strtod(words[8], NULL), strtol(words[9], NULL, 10)) < 0;
    return hold_sessions() < 0;
}
