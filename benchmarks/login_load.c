/* A PostgreSQL client that does nothing but log in, as cheaply as it can be done.
 *
 *   login_load logins PORT USER DATABASE PASSWORD TOUCH CLIENTS SECONDS MOST
 *       CLIENTS threads log in and leave, one login after the other, until SECONDS are over or MOST logins are
 *       done. Prints `LOGINS SECONDS P50 P99`, the last two in milliseconds from connecting to ReadyForQuery.
 *   login_load hold PORT USER DATABASE PASSWORD TOUCH
 *       For each number on standard input opens that many sessions more and prints how many are open. At end of
 *       file it closes them all.
 *
 * TOUCH 1 sends an empty query behind each login: a pooler in session mode logs in to its server only when the
 * first query comes. Answers trust, cleartext, MD5 and SCRAM-SHA-256, whose thousands of hashes are made once and not
 * for each login: they are no server's cost. One failed login ends the program with status 1. Speaks to 127.0.0.1 alone.
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
    MOST_CLIENTS = 1024,
    AUTH_OK = 0,
    AUTH_CLEARTEXT = 3,
    AUTH_MD5 = 5,
    AUTH_SASL = 10,
    AUTH_SASL_CONTINUE = 11,
    AUTH_SASL_FINAL = 12,
    MOST_TIMED = 4000000,
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

/* --- SHA-256, FIPS 180-4; HMAC, RFC 2104 ----------------------------------------------------------------- */

static const uint32_t sha256_constant[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t turn_right(uint32_t word, int by) { return word >> by | word << (32 - by); }

static void sha256_block(uint32_t state[8], const uint8_t *block) {
    uint32_t word[64], v[8];
    for (int i = 0; i < 16; i++)
        word[i] = (uint32_t)block[4 * i] << 24 | block[4 * i + 1] << 16 | block[4 * i + 2] << 8 | block[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t low = turn_right(word[i - 15], 7) ^ turn_right(word[i - 15], 18) ^ word[i - 15] >> 3;
        uint32_t high = turn_right(word[i - 2], 17) ^ turn_right(word[i - 2], 19) ^ word[i - 2] >> 10;
        word[i] = word[i - 16] + low + word[i - 7] + high;
    }
    memcpy(v, state, sizeof v);
    for (int i = 0; i < 64; i++) {
        uint32_t high = turn_right(v[4], 6) ^ turn_right(v[4], 11) ^ turn_right(v[4], 25);
        uint32_t low = turn_right(v[0], 2) ^ turn_right(v[0], 13) ^ turn_right(v[0], 22);
        uint32_t one = v[7] + high + ((v[4] & v[5]) ^ (~v[4] & v[6])) + sha256_constant[i] + word[i];
        uint32_t two = low + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += one;
        v[0] = one + two;
    }
    for (int i = 0; i < 8; i++)
        state[i] += v[i];
}

/* Of a message of at most two kilobytes. */
static void sha256(const void *message, size_t length, uint8_t digest[32]) {
    uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint8_t padded[2048 + 128] = {0};
    size_t whole = (length + 8) / 64 * 64 + 64;
    if (length > 2048)
        abort();
    memcpy(padded, message, length);
    padded[length] = 0x80;
    for (int i = 0; i < 8; i++)
        padded[whole - 1 - i] = (uint8_t)((uint64_t)length * 8 >> 8 * i);
    for (size_t at = 0; at < whole; at += 64)
        sha256_block(state, padded + at);
    for (int i = 0; i < 32; i++)
        digest[i] = state[i / 4] >> (24 - 8 * (i % 4)) & 0xff;
}

/* With a key of at most 64 bytes. */
static void hmac_sha256(const void *key, size_t key_length, const void *message, size_t length, uint8_t digest[32]) {
    uint8_t inner[64 + 1920] = {0}, outer[64 + 32] = {0};
    if (key_length > 64 || length > sizeof inner - 64)
        abort();
    memcpy(inner, key, key_length);
    memcpy(outer, key, key_length);
    for (int i = 0; i < 64; i++)
        inner[i] ^= 0x36, outer[i] ^= 0x5c;
    memcpy(inner + 64, message, length);
    sha256(inner, 64 + length, outer + 64);
    sha256(outer, sizeof outer, digest);
}

static const char base64_digit[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

static void base64_of(const uint8_t *bytes, size_t length, char *text) {
    for (size_t at = 0; at < length; at += 3) {
        size_t have = length - at < 3 ? length - at : 3;
        uint32_t three = (uint32_t)bytes[at] << 16 | (have > 1 ? bytes[at + 1] << 8 : 0) | (have > 2 ? bytes[at + 2] : 0);
        for (size_t i = 0; i < 4; i++)
            *text++ = i <= have ? base64_digit[three >> (18 - 6 * i) & 63] : '=';
    }
    *text = 0;
}

/* The number of bytes, or -1. */
static int from_base64(const char *text, size_t length, uint8_t *bytes, size_t room) {
    size_t used = 0;
    uint32_t held = 0;
    int bits = 0;
    for (size_t at = 0; at < length && text[at] != '='; at++) {
        const char *digit = text[at] ? strchr(base64_digit, text[at]) : NULL;
        if (!digit || (bits >= 2 && used == room))
            return -1;
        held = held << 6 | (uint32_t)(digit - base64_digit);
        bits += 6;
        if (bits >= 8)
            bytes[used++] = held >> (bits -= 8) & 0xff;
    }
    return (int)used;
}

/* --- SCRAM-SHA-256, RFC 5802 and 7677 -------------------------------------------------------------------- */

/* One server, one user: salt and iterations are the same each time. */
static struct {
    pthread_mutex_t lock;
    int known;
    uint8_t salt[64], salted[32];
    int salt_length, iterations;
} keys = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void salted_password(const uint8_t *salt, int salt_length, int iterations, uint8_t salted[32]) {
    pthread_mutex_lock(&keys.lock);
    if (!keys.known || keys.salt_length != salt_length || keys.iterations != iterations ||
        memcmp(keys.salt, salt, (size_t)salt_length) != 0) {
        uint8_t round[68];
        memcpy(round, salt, (size_t)salt_length);
        memcpy(round + salt_length, "\0\0\0\1", 4);
        hmac_sha256(password, strlen(password), round, (size_t)salt_length + 4, round);
        memcpy(keys.salted, round, 32);
        for (int i = 1; i < iterations; i++) {
            hmac_sha256(password, strlen(password), round, 32, round);
            for (int at = 0; at < 32; at++)
                keys.salted[at] ^= round[at];
        }
        memcpy(keys.salt, salt, (size_t)salt_length);
        keys.salt_length = salt_length, keys.iterations = iterations, keys.known = 1;
    }
    memcpy(salted, keys.salted, 32);
    pthread_mutex_unlock(&keys.lock);
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

static int send_sasl(int fd, const char *mechanism, const char *text) {
    uint8_t packet[1024];
    size_t named = mechanism ? strlen(mechanism) + 1 + 4 : 0, size = strlen(text);
    if (5 + named + size > sizeof packet)
        return fail("the SCRAM message is too long");
    packet[0] = 'p';
    put_u32(packet + 1, (uint32_t)(4 + named + size));
    if (mechanism) {
        memcpy(packet + 5, mechanism, named - 4);
        put_u32(packet + 5 + named - 4, (uint32_t)size);
    }
    memcpy(packet + 5 + named, text, size);
    return send_all(fd, packet, 5 + named + size);
}

/* The nonce is the same each time: what keeps an attacker off is of no use here. */
#define CLIENT_FIRST "n=,r=a-benchmark-needs-no-secret"

static int answer_scram(int fd, const uint8_t *body, size_t length) {
    char first[512], middle[768], last[1024], proof[48];
    uint8_t salt[64], salted[32], client_key[32], stored_key[32], signature[32];
    if (length >= sizeof first)
        return fail("the SCRAM challenge is too long");
    memcpy(first, body, length);
    first[length] = 0;
    const char *salt_text = strstr(first, ",s="), *iterations = strstr(first, ",i=");
    if (strncmp(first, "r=", 2) != 0 || !salt_text || !iterations || iterations < salt_text)
        return fail("no SCRAM challenge");
    int salt_length = from_base64(salt_text + 3, (size_t)(iterations - salt_text - 3), salt, sizeof salt);
    if (salt_length < 0)
        return fail("no SCRAM salt");
    int nonce = (int)(salt_text - first);
    snprintf(middle, sizeof middle, "c=biws,%.*s", nonce, first);
    int whole = snprintf(last, sizeof last, "%s,%s,%s", CLIENT_FIRST, first, middle);
    if (whole < 0 || (size_t)whole >= sizeof last)
        return fail("the SCRAM challenge is too long");
    salted_password(salt, salt_length, atoi(iterations + 3), salted);
    hmac_sha256(salted, 32, "Client Key", 10, client_key);
    sha256(client_key, 32, stored_key);
    hmac_sha256(stored_key, 32, last, (size_t)whole, signature);
    for (int i = 0; i < 32; i++)
        client_key[i] ^= signature[i];
    base64_of(client_key, 32, proof);
    snprintf(last, sizeof last, "%s,p=%s", middle, proof);
    return send_sasl(fd, NULL, last);
}

static int answer_authentication(int fd, const uint8_t *body, size_t length) {
    switch (length >= 4 ? get_u32(body) : UINT32_MAX) {
    case AUTH_OK: return 0;
    case AUTH_CLEARTEXT: return send_password(fd, password);
    case AUTH_MD5: return length >= 8 ? answer_md5(fd, body + 4) : fail("a short MD5 request");
    case AUTH_SASL: return send_sasl(fd, "SCRAM-SHA-256", "n,," CLIENT_FIRST);
    case AUTH_SASL_CONTINUE: return answer_scram(fd, body + 4, length - 4);
    case AUTH_SASL_FINAL: return 0;
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
static float milliseconds[MOST_TIMED];

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void *run_client(void *nothing) {
    (void)nothing;
    while (!broken && now() < deadline && atomic_fetch_sub(&logins_left, 1) > 0) {
        double begun = now();
        int fd = log_in();
        if (fd < 0) {
            broken = 1;
            break;
        }
        double took = now() - begun;
        leave(fd);
        long number = atomic_fetch_add(&logins_done, 1);
        if (number < MOST_TIMED)
            milliseconds[number] = (float)(took * 1e3);
    }
    return NULL;
}

static int by_size(const void *one, const void *other) {
    float a = *(const float *)one, b = *(const float *)other;
    return (a > b) - (a < b);
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
    double took = now() - begun;
    long timed = logins_done < MOST_TIMED ? logins_done : MOST_TIMED;
    qsort(milliseconds, (size_t)timed, sizeof *milliseconds, by_size);
    float median = timed ? milliseconds[timed / 2] : 0, late = timed ? milliseconds[timed * 99 / 100] : 0;
    printf("%ld %.6f %.4f %.4f\n", (long)logins_done, took, (double)median, (double)late);
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
