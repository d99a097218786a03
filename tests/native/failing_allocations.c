/* Allocations that fail on request, for LD_PRELOAD.
 *
 * During failing_call the n-th allocation of the calling thread returns NULL, and with `forever`
 * every later one, too. Run Python with PYTHONMALLOC=malloc: then its own allocators come here as
 * well. `failing_live` returns the number of blocks that were allocated and not yet freed.
 */

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>

/* The names under which glibc exports its own functions. */
void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);
void __libc_free(void *);

/* Python's, in the process that loads this. */
__attribute__((weak)) void *PyObject_CallNoArgs(void *);
__attribute__((weak)) void Py_DecRef(void *);

static atomic_long n_live;
static __thread long left = -1; /* allocations until the one that fails; below 0: none fails */
static __thread int goes_on, n_failed, is_armed;

static int fails(void) {
    if (!is_armed || left < 0)
        return 0;
    if (left > 0) {
        left--;
        return 0;
    }
    n_failed++;
    if (!goes_on)
        left = -1;
    errno = ENOMEM;
    return 1;
}

static void *counted(void *made) {
    if (made != NULL)
        atomic_fetch_add_explicit(&n_live, 1, memory_order_relaxed);
    return made;
}

/* Calls a Python function while the n-th allocation fails. Its exception stays set. */
void failing_call(long n, int forever, void *function) {
    void *result;
    left = n;
    goes_on = forever;
    n_failed = 0;
    is_armed = 1;
    result = PyObject_CallNoArgs(function);
    is_armed = 0;
    Py_DecRef(result);
}

/* Returns how many allocations failed in the last call. */
int failing_count(void) { return n_failed; }

long failing_live(void) { return atomic_load_explicit(&n_live, memory_order_relaxed); }

void *malloc(size_t n) { return fails() ? NULL : counted(__libc_malloc(n)); }

void *calloc(size_t n, size_t size) { return fails() ? NULL : counted(__libc_calloc(n, size)); }

void *realloc(void *old, size_t n) {
    if (fails())
        return NULL;
    if (old == NULL)
        return counted(__libc_malloc(n));
    if (n == 0) {
        free(old);
        return NULL;
    }
    return __libc_realloc(old, n);
}

void free(void *old) {
    if (old == NULL)
        return;
    atomic_fetch_sub_explicit(&n_live, 1, memory_order_relaxed);
    __libc_free(old);
}

void *memalign(size_t alignment, size_t n) {
    return fails() ? NULL : counted(__libc_memalign(alignment, n));
}

void *aligned_alloc(size_t alignment, size_t n) { return memalign(alignment, n); }

int posix_memalign(void **made, size_t alignment, size_t n) {
    void *block = memalign(alignment, n);
    if (block == NULL)
        return ENOMEM;
    *made = block;
    return 0;
}
