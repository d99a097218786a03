/* The object-free tables in threads, for ThreadSanitizer.
 *
 * races MODE: "locked" has writers and readers under one read-write lock, as a caller
 * must provide it: look-ups may run at the same time, because they write nothing. "apart" gives each
 * thread tables of its own: there is no hidden state that they share. "planted" writes without the
 * lock, a race that the sanitizer must report.
 */

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void *tables_new(uint64_t seed);
void tables_put(void *tables, const uint8_t *data, size_t n, uint32_t scope, uint32_t max_entries);
int tables_get(const void *tables, const uint8_t *data, size_t n, uint32_t scope);
void tables_free(void *tables);

enum { N_THREADS = 4, N_STEPS = 6000, N_KEYS = 500, MAX_ENTRIES = 300 };

static pthread_rwlock_t lock = PTHREAD_RWLOCK_INITIALIZER;
static void *shared;
static int is_apart, is_planted;
static long n_hits;

/* Fills in a key: short ones fit both tables, long ones differ in one byte in the middle. */
static size_t make_key(uint32_t number, uint8_t *key) {
    size_t n = number % 3 ? 4 + number % 20 : 1500;
    memset(key, 'a', n);
    key[0] = (uint8_t)(number % 200);
    memcpy(key + n / 2 - 1, &number, 2);
    return n;
}

static void *work(void *argument) {
    uint32_t draw = (uint32_t)(size_t)argument * 2654435761u + 1;
    void *tables = is_apart ? tables_new(draw) : shared;
    uint8_t key[1500];
    long hits = 0;
    for (int step = 0; step < N_STEPS; step++) {
        draw = draw * 1664525u + 1013904223u;
        const uint32_t number = (draw >> 8) % N_KEYS, scope = number % 4;
        const size_t n = make_key(number, key);
        if (draw >> 30 == 0) {
            if (!is_apart && !is_planted)
                pthread_rwlock_wrlock(&lock);
            tables_put(tables, key, n, scope, MAX_ENTRIES);
        } else {
            if (!is_apart)
                pthread_rwlock_rdlock(&lock);
            const int found = tables_get(tables, key, n, scope);
            if (found != -1 && found != key[0]) {
                printf("key %u has the value %d\n", number, found);
                exit(3);
            }
            hits += found >= 0;
        }
        if (!is_apart && !(is_planted && draw >> 30 == 0))
            pthread_rwlock_unlock(&lock);
    }
    __atomic_fetch_add(&n_hits, hits, __ATOMIC_RELAXED);
    if (is_apart)
        tables_free(tables);
    return NULL;
}

int main(int n_arguments, char **arguments) {
    pthread_t threads[N_THREADS];
    is_apart = n_arguments > 1 && strcmp(arguments[1], "apart") == 0;
    is_planted = n_arguments > 1 && strcmp(arguments[1], "planted") == 0;
    shared = tables_new(1);
    for (size_t i = 0; i < N_THREADS; i++)
        pthread_create(&threads[i], NULL, work, (void *)i);
    for (size_t i = 0; i < N_THREADS; i++)
        pthread_join(threads[i], NULL);
    tables_free(shared);
    printf("%ld hits\n", n_hits);
    return n_hits > N_THREADS * N_STEPS / 8 ? 0 : 4;
}
