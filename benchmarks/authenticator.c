/* The cheapest authenticator that keeps the contract: it accepts everyone as `postgres` of one target.
 *
 * It verifies nothing, on purpose: the benchmark is about the gateway. It is linked statically, since the dynamic
 * loader would be most of its run. TARGET_HOST and TARGET_CRED are string literals given at compile time.
 */
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

int main(void) {
    static const char mapping[] =
        "_META_TARGET_HOST=" TARGET_HOST "\n_META_TARGET_CRED=" TARGET_CRED "\nuser=postgres\n";
    size_t have = 0, used, database_length = 0;
    ssize_t got;

    while (have < sizeof question - 1 && (got = read(0, question + have, sizeof question - 1 - have)) > 0)
        have += (size_t)got;

    used = append(0, mapping, sizeof mapping - 1);
    const char *database = find_line("database=", &database_length);
    if (database) {
        used = append(used, database, database_length);
        used = append(used, "\n", 1);
    }
    return write(1, answer, used) == (ssize_t)used ? 0 : 1;
}
