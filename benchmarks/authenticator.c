/* The cheapest authenticator that keeps the contract: it accepts everyone, as themselves, at one target.
 *
 * It verifies nothing, on purpose: the benchmark is about the gateway. It is linked statically, since the dynamic
 * loader would be most of its run. With an argument it is a worker: it answers one question after the other. TARGET_HOST,
 * TARGET_CRED and VERIFIER (what clients prove themselves by in SCRAM) are string literals given at compile time; the
 * variable BENCHMARK_TARGET goes before TARGET_HOST.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char question[1 << 17];
static char answer[1 << 17];

static size_t append(size_t used, const char *text, size_t length) {
    if (length > sizeof answer - used)
        _exit(1);
    memcpy(answer + used, text, length);
    return used + length;
}

/* The line that begins with `key`, without its line feed; a NULL when there is none. */
static const char *find_line(const char *key, size_t *length) {
    for (const char *line = question; *line; line += strcspn(line, "\n"), line += *line == '\n')
        if (strncmp(line, key, strlen(key)) == 0) {
            *length = strcspn(line, "\n");
            return line;
        }
    return NULL;
}

/* The next question's lines, with a NUL behind them; 0 when there is none. */
static int read_question(int as_worker) {
    size_t have = 0;
    ssize_t got;
    while (have < sizeof question - 1 && (got = read(0, question + have, sizeof question - 1 - have)) > 0) {
        have += (size_t)got;
        if (as_worker && have >= 2 && memcmp(question + have - 2, "\n\n", 2) == 0)
            break;
    }
    question[have] = 0;
    return have > 0;
}

static size_t answer_question(void) {
    static const char mapping[] = "\n_META_TARGET_CRED=" TARGET_CRED "\n";
    static const char verifier[] = "_META_SOURCE_VERIFIER=" VERIFIER "\n";
    static const char *const passed_on[] = {"user=", "database="};
    const char *named = getenv("BENCHMARK_TARGET"), *host = named ? named : TARGET_HOST;
    size_t length, used = append(0, "_META_TARGET_HOST=", 18);
    used = append(used, host, strlen(host));
    used = append(used, mapping, sizeof mapping - 1);
    if (find_line("_SOURCE_METHOD=scram-sha-256", &length))
        used = append(used, verifier, sizeof verifier - 1);
    for (int i = 0; i < 2; i++) {
        const char *line = find_line(passed_on[i], &length);
        if (line) {
            used = append(used, line, length);
            used = append(used, "\n", 1);
        }
    }
    return used;
}

int main(int count, char **words) {
    (void)words;
    if (count < 2) {
        read_question(0);
        size_t used = answer_question();
        return write(1, answer, used) == (ssize_t)used ? 0 : 1;
    }
    while (read_question(1)) {
        size_t used = append(answer_question(), "\n", 1);
        if (write(1, answer, used) != (ssize_t)used)
            return 1;
    }
    return 0;
}
