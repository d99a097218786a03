# cython: binding=False, embedsignature=True, embedsignature.format=clinic
"""L0Cache: the exact-string cache, a thin class over two hash tables."""

cimport cython
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset

from operator import itemgetter
from os import urandom
from sys import getsizeof

from tokcache._validate import require_bool, require_int, require_scope, require_size
from tokcache.config import ADMIT_ONE_IN, LONG_CHARS, MAX_SAMPLE_SIZE
from tokcache.errors import InvalidText
from tokcache.stats import L0Stats

from tokcache.text._evictions cimport (
    EVICTED, N_WHY, NOT_KNOWN, Evictions, forget_all, forget_scope, note_eviction, text_digest,
    why_missing,
)
from tokcache.text._quick cimport (
    Descriptor, Method, divert, n_arguments, n_names, name_at, type_of,
)
from tokcache.text._table cimport (
    KIND_MASK, N_SECRETS, OWNER_MASK, OWNER_SHIFT, SCOPE_SHIFT, WHOLE, Crowd, Entry, Key, Table,
    bytes_to_grow, digest_of, fetch, fetch_home, find, find_crowd, insert, is_long, key_of,
    oldest_of, refined, release_arrays, remove, reserve, sampled_of, settle, table_bytes,
)
from tokcache.text._token_ids cimport TokenIds, owner_of, sizeof_token_ids

cdef extern from "Python.h":
    PyObject* Py_True
    PyObject* Py_False
    PyObject* Py_None
    bint PyUnicode_Check(object o)
    bint PyUnicode_CheckExact(object o)
    bint is_exact_str "PyUnicode_CheckExact"(PyObject* o)
    int PyUnicode_READY(PyObject* o) except -1
    void* PyUnicode_DATA(PyObject* o)
    int PyUnicode_KIND(PyObject* o)
    Py_ssize_t PyUnicode_GET_LENGTH(PyObject* o)
    bint PyUnicode_IS_COMPACT_ASCII(object o)
    object PyUnicode_FromKindAndData(int kind, const void* data, Py_ssize_t size)
    ctypedef struct PyASCIIObject:
        pass
    void* PyObject_Malloc(size_t n)
    void PyObject_Free(void* p)
    void decref "Py_DECREF"(PyObject* o)
    object attribute "PyObject_GenericGetAttr"(object o, object name)  # no __getattr__
    bint unlikely(bint condition)  # the other branch comes first, and this one is not inlined

cdef enum:
    # The owner of a key's bytes (in an entry's meta).
    STRING = 0  # an ASCII key is the caller's str; a look-up with the same object needs no compare
    COPY = 1    # other keys are copied, because a str can grow by caching its UTF-8 form

    NO_ROOM = 0  # outcomes of `fill_one`
    STORED = 1
    THERE = 2

    MAX_SCOPES = 1 << 24
    MAX_CLEARED = 1024  # scopes whose last clear is remembered individually
    SCOPE_BYTES = 100   # of a scope besides its name: places in a dict and two lists, two ints
    MAX_UNITS = 0xFFFFFFF0
    DIGESTED_BYTES = 1 << 14  # of longer evicted texts, the first and the last half of it
    SMALL_BYTES = 512   # up to this size CPython's own allocator is used, in steps of 16


cdef Py_ssize_t long_chars = LONG_CHARS
cdef Py_ssize_t admit_one_in = ADMIT_ONE_IN


ctypedef struct Scope:
    uint64_t n_entries
    uint64_t n_bytes   # of its name and of its places in the containers
    uint32_t next_free  # the number of another scope without entries, or 0


ctypedef struct Victim:
    Table* table       # NULL: the next entry evicts nothing
    uint32_t position


cdef inline uint64_t allocated(uint64_t n_bytes) noexcept:
    """Return the bytes that an allocation takes: a block of CPython's, or a malloc chunk."""
    if n_bytes <= SMALL_BYTES:
        return (n_bytes + 15) & ~<uint64_t> 15
    return (n_bytes + 8 + 15) & ~<uint64_t> 15


cdef inline uint64_t key_bytes(uint32_t owner, uint64_t n_bytes) noexcept:
    if owner == STRING:
        return allocated(sizeof(PyASCIIObject) + n_bytes + 1)
    return allocated(n_bytes)


cdef inline uint64_t value_bytes(uint64_t n_tokens) noexcept:
    return allocated(sizeof_token_ids() + n_tokens * sizeof(int))


@cython.final
cdef class L0Cache:
    """Caches the token ids of whole strings.

    Units:   `max_entries` strings and `max_bytes` bytes (keys, ids, overhead) over both maps;
             `max_bytes` may be a str such as "64M". The memory of evictions takes 65 KiB more.
    Errors:  InvalidConfig for a budget below 1 or a flag that is not a bool; InvalidText if the
             text is not a str; InvalidScope.
    Cost:    a look-up is one digest and one memcmp; nothing is allocated.
    Threads: safe under the interpreter lock.
    """

    cdef readonly Py_ssize_t max_entries
    cdef readonly Py_ssize_t max_bytes
    cdef readonly Py_ssize_t sample_size
    cdef Table[2] tables
    cdef uint64_t rng
    cdef uint32_t clock
    cdef uint64_t hits, misses, hit_tokens, insertions, evictions
    cdef dict refusals
    cdef dict scope_numbers   # name -> number (1 or more) of each scope that has an entry
    cdef list scope_names     # number -> name; it may be longer than `scopes`
    cdef Scope* scopes        # by number; in C, so that an eviction allocates nothing
    cdef uint32_t n_scopes    # numbers in use or free; number 0 is the shared scope
    cdef uint32_t scope_capacity
    cdef uint32_t free_scope  # a number that can be used again, or 0
    cdef uint64_t scope_bytes  # of all scopes
    # An encoding that began before its scope was cleared is not stored: `_put` checks this.
    cdef readonly uint64_t _n_clears  # number of clears, of one scope or of all
    cdef dict cleared         # hash of a scope -> _n_clears at its last clear
    cdef uint64_t cleared_all  # _n_clears at the last clear of all, or when `cleared` was full
    cdef Evictions evicted
    cdef uint64_t[N_WHY] misses_by_reason  # of those, NEW is not counted

    def __cinit__(self, *, max_entries=10_000, max_bytes="64M", sample_size=8):
        cdef bytes random = urandom(8 * N_SECRETS + 8)
        cdef const char* raw = random
        self.max_entries = require_int("max_entries", max_entries, 1)
        self.max_bytes = require_size("max_bytes", max_bytes)
        self.sample_size = require_int("sample_size", sample_size, 1, MAX_SAMPLE_SIZE)
        memset(self.tables, 0, sizeof(self.tables))
        memcpy(self.tables[0].secret, raw, 8 * N_SECRETS)
        memcpy(self.tables[1].secret, raw, 8 * N_SECRETS)
        memcpy(&self.rng, raw + 8 * N_SECRETS, 8)
        self.cleared = {}
        if self.max_entries < 1 << 30:
            self.tables[0].enough = self.tables[1].enough = self.max_entries * 3 // 2 + 2
        self.reset()

    def __init__(self, *, max_entries=10_000, max_bytes="64M", sample_size=8):
        pass

    def __dealloc__(self):
        self.empty()
        forget_all(&self.evicted)
        free(self.scopes)

    def get(self, text, *, add_special_tokens=True, scope=None):
        """Return the ids stored for `text` in `scope`, or None."""
        return self.look(<PyObject*> text, <PyObject*> add_special_tokens, <PyObject*> scope)

    def _get(self, text, add_special_tokens, scope):
        """Do the same as `get`, without the cost of keyword arguments."""
        return self.look(<PyObject*> text, <PyObject*> add_special_tokens, <PyObject*> scope)

    def _get_again(self, text, add_special_tokens, scope):
        """Look up a text that has just missed: another miss is not counted."""
        cdef uint64_t misses = self.misses
        cdef uint64_t[N_WHY] by_reason = self.misses_by_reason
        ids = self.look(<PyObject*> text, <PyObject*> add_special_tokens, <PyObject*> scope)
        if ids is None:
            self.misses = misses
            self.misses_by_reason = by_reason
        return ids

    cdef object look(self, PyObject* text, PyObject* add_special_tokens, PyObject* scope):
        # These are borrowed: Cython takes a reference to each object that it handles.
        cdef int which = map_of(add_special_tokens)
        if not is_exact_str(text):
            return self._get(
                exact_str(<object> text), <object> add_special_tokens, <object> scope
            )
        return self.look_in(which, text, scope)

    cdef inline object look_in(self, int which, PyObject* text, PyObject* scope):
        """Look an exact str up in one of the maps."""
        cdef Key key
        cdef Entry* entry
        cdef Table* table = &self.tables[which]
        key_from(text, &key)
        if scope != Py_None:
            key.scope = self.number_of(<object> scope)
            if unlikely(key.scope == 0):
                return self.miss(which, text, scope)
        entry = find(table, digest_of(table, &key), &key)
        if unlikely(entry == NULL):
            return self.miss(which, text, scope)
        self.hits += 1
        self.tick()
        table.ticks[entry - table.entries] = self.clock
        self.hit_tokens += (<TokenIds> entry.value).n_tokens
        return <TokenIds> entry.value

    cdef object miss(self, int which, PyObject* text, PyObject* scope):
        """Count a miss, by its reason; return None."""
        # It takes the text and not its Key, so that a hit need not store one in memory.
        cdef Key key
        cdef uint64_t tag
        cdef int why
        self.misses += 1
        if self.evicted.rows != NULL or self.evicted.is_lost:
            key_from(text, &key)
            tag = scope_tag(None if scope == Py_None else <object> scope)
            why = why_missing(&self.evicted, self.eviction_digest(which, &key, tag), tag)
            if why == EVICTED and key.n_bytes > DIGESTED_BYTES:
                why = NOT_KNOWN  # the evicted text may differ between the two halves
            self.misses_by_reason[why] += 1
        return None

    cdef uint64_t eviction_digest(self, int which, const Key* key, uint64_t tag) noexcept:
        cdef uint64_t seed = tag ^ <uint64_t> key.n_units << 4 ^ key.kind << 1 ^ <uint64_t> which
        cdef const uint64_t* secret = self.tables[0].secret
        if key.n_bytes <= DIGESTED_BYTES:
            return text_digest(key.data, key.n_bytes, seed, secret)
        seed = text_digest(key.data, DIGESTED_BYTES // 2, seed, secret)
        return text_digest(
            key.data + key.n_bytes - DIGESTED_BYTES // 2, DIGESTED_BYTES // 2, seed, secret
        )

    def put(self, text, ids, *, add_special_tokens=True, scope=None):
        """Store `ids` for `text` in `scope`; return False if the entry was refused."""
        return self.keep(<PyObject*> text, <PyObject*> add_special_tokens, ids, <PyObject*> scope)

    def _put(self, text, add_special_tokens, ids, scope, uint64_t since):
        """Do the same as `put`, unless the scope was cleared after `_n_clears` was `since`."""
        if type(ids) is not TokenIds:
            ids = TokenIds(ids)
        if scope is not None:
            scope = exact_scope(scope)
        # No other Python code runs between here and the insert.
        if since != self._n_clears and self.was_cleared(scope, since):
            return self.refuse("cleared")
        return self.keep(<PyObject*> text, <PyObject*> add_special_tokens, ids, <PyObject*> scope)

    cdef bint keep(
        self, PyObject* text, PyObject* add_special_tokens, object ids, PyObject* scope
    ) except -1:
        cdef TokenIds owner = owner_of(ids if type(ids) is TokenIds else TokenIds(ids))
        cdef Table* table = &self.tables[map_of(add_special_tokens)]
        cdef Key key
        cdef Entry entry
        cdef Entry* old
        cdef Victim victim
        if not is_exact_str(text):
            return self.put(
                exact_str(<object> text), owner, add_special_tokens=<object> add_special_tokens,
                scope=<object> scope,
            )
        if PyUnicode_GET_LENGTH(text) > MAX_UNITS:
            return self.refuse("oversize")
        key_from(text, &key)
        if scope != Py_None:
            key.scope = self.enter_scope(exact_scope(<object> scope))
            if key.scope == 0:
                return self.refuse("scopes")
        entry.digest = digest_of(table, &key)
        fetch_home(table, entry.digest)
        victim = self.choose_victim()
        old = find(table, entry.digest, &key)
        if old != NULL:
            self.drop(table, <uint32_t> (old - table.entries))
        reason = self.admit(table, &key, <str> text, owner, victim, &entry)
        if reason is not None:
            if key.scope:
                self.leave_scope(key.scope)
            return self.refuse(reason)
        self.tick()
        insert(table, &entry, self.clock)
        self.insertions += 1
        return True

    def clear(self, *, scope=None):
        """Remove every entry and set the counters to zero, or remove the entries of `scope` only.

        Errors: InvalidScope.
        Cost:   a pass over the table.
        """
        if scope is not None:
            self.clear_scope(exact_scope(scope))
            return
        self._n_clears += 1
        self.cleared_all = self._n_clears
        self.cleared = {}
        self.reset()

    def held(self):
        """Return (text, add_special_tokens, ids, scope) of every entry, most recently used first.

        Cost: a copy of every text that is not ASCII.
        """
        cdef list columns = []
        cdef uint32_t i
        cdef int which
        cdef Py_ssize_t n = 0
        cdef const Entry* entry
        while not columns or len(columns[0]) != len(self):  # an allocation may run other code
            columns = []
            for _ in range(5):
                columns.append([None] * len(self))
        ages, texts, specials, ids, scopes = columns
        for which in range(2):
            for i in range(self.tables[which].capacity):
                entry = &self.tables[which].entries[i]
                if entry.value == NULL:
                    continue
                ages[n] = <uint32_t> (self.clock - self.tables[which].ticks[i])
                texts[n] = text_of(entry)
                specials[n] = bool(which)
                ids[n] = <TokenIds> entry.value
                scopes[n] = self.scope_names[entry.meta >> SCOPE_SHIFT]
                n += 1
        return list(map(itemgetter(slice(1, None)), sorted(zip(*columns), key=itemgetter(0))))

    def fill(self, rows):
        """Store entries in the form that `held` returns, without evicting any.

        They count as older than all present entries. Return the number stored, and the number that
        were already present.
        """
        cdef uint32_t age = self.greatest_age()
        cdef Py_ssize_t[3] n  # by outcome
        memset(n, 0, sizeof(n))
        for text, add_special_tokens, ids, scope in rows:
            age += 2 if age + 1 == self.clock else 1  # tick 0 marks an empty place
            n[self.fill_one(
                exact_str(text), add_special_tokens, owner_of(TokenIds(ids)), scope, age
            )] += 1
        return n[STORED], n[THERE]

    def __len__(self):
        return self.tables[0].n + self.tables[1].n

    def __bool__(self):
        return True  # an empty cache must not be taken for a missing one

    def __repr__(self):
        return (
            f"<L0Cache: {len(self):,} of {self.max_entries:,} entries, "
            f"{self.n_bytes():,} of {self.max_bytes:,} bytes>"
        )

    def memory_usage(self):
        """Return the bytes held: keys, ids and overhead."""
        return self.n_bytes()

    def stats(self):
        """Return a copy of the counters."""
        return L0Stats(
            hits=self.hits,
            misses=self.misses,
            misses_by_reason={
                "new": self.misses - self.misses_by_reason[EVICTED]
                - self.misses_by_reason[NOT_KNOWN],
                "evicted": self.misses_by_reason[EVICTED],
                "not_known": self.misses_by_reason[NOT_KNOWN],
            },
            insertions=self.insertions,
            evictions=self.evictions,
            refusals=dict(self.refusals),
            hit_tokens=self.hit_tokens,
            n_entries=len(self),
            n_bytes=self.n_bytes(),
        )

    def _check(self):
        """Verify every invariant; for tests."""
        check_table(&self.tables[0])
        check_table(&self.tables[1])
        assert len(self) <= self.max_entries
        assert self.n_bytes() <= <uint64_t> self.max_bytes
        counts = [0] * self.n_scopes
        for table in range(2):
            for i in range(self.tables[table].capacity):
                if self.tables[table].entries[i].value != NULL:
                    counts[self.tables[table].entries[i].meta >> SCOPE_SHIFT] += 1
        n_bytes = 0
        numbers = set()
        for name, number in self.scope_numbers.items():
            assert self.scope_names[number] == name and counts[number] > 0
            assert self.scopes[number].n_bytes == getsizeof(name) + SCOPE_BYTES
            assert self.scopes[number].n_entries == counts[number]
            n_bytes += self.scopes[number].n_bytes
            numbers.add(number)
        assert self.scope_bytes == n_bytes
        number = self.free_scope
        while number:
            assert number not in numbers and counts[number] == 0
            numbers.add(number)
            number = self.scopes[number].next_free
        assert numbers == set(range(1, self.n_scopes))
        assert self.n_scopes <= max(<uint32_t> 1, self.scope_capacity)

    # ---- inside

    cdef int fill_one(
        self, str text, bint add_special_tokens, TokenIds ids, scope, uint32_t age
    ) except -1:
        cdef Table* table = &self.tables[add_special_tokens]
        cdef Key key
        cdef Entry entry
        cdef Victim nobody
        cdef int outcome = STORED
        nobody.table = NULL
        nobody.position = 0
        if PyUnicode_GET_LENGTH(<PyObject*> text) > MAX_UNITS:
            return NO_ROOM
        key_from(<PyObject*> text, &key)
        if scope is not None:
            key.scope = self.enter_scope(exact_scope(scope))
            if key.scope == 0:
                return NO_ROOM
        entry.digest = digest_of(table, &key)
        if find(table, entry.digest, &key) != NULL:
            outcome = THERE
        elif not self.has_room(table, &key, text, ids) or self.admit(
            table, &key, text, ids, nobody, &entry
        ) is not None:
            outcome = NO_ROOM
        if outcome == STORED:
            insert(table, &entry, self.clock - age or 1)
            self.insertions += 1
        elif key.scope:
            self.leave_scope(key.scope)
        return outcome

    cdef bint has_room(self, Table* table, const Key* key, str text, TokenIds ids) noexcept:
        """Return whether one more entry fits without an eviction."""
        cdef uint32_t owner = STRING if PyUnicode_IS_COMPACT_ASCII(text) else COPY
        return self.tables[0].n + <Py_ssize_t> self.tables[1].n < self.max_entries and (
            self.n_bytes() + key_bytes(owner, key.n_bytes) + value_bytes(ids.n_tokens)
            + bytes_to_grow(table, key) <= <uint64_t> self.max_bytes
        )

    cdef uint32_t greatest_age(self) noexcept:
        cdef uint32_t i, greatest = 0
        cdef int which
        for which in range(2):
            for i in range(self.tables[which].capacity):
                if self.tables[which].entries[i].value != NULL:
                    greatest = max(greatest, self.clock - self.tables[which].ticks[i])
        return greatest

    cdef inline void tick(self) noexcept:
        self.clock += 1
        if self.clock == 0:  # tick 0 marks an empty place
            self.clock = 1

    cdef uint32_t number_of(self, object scope) except? 0:
        """Return the number of a scope, 0 if it has no entry."""
        return self.scope_numbers.get(exact_scope(scope), 0)

    cdef int clear_scope(self, str scope) except -1:
        cdef uint32_t number = self.scope_numbers.get(scope, 0), i, capacity
        cdef uint64_t n_left = self.scopes[number].n_entries if number else 0
        cdef Table* table
        cdef int which
        self._n_clears += 1
        if len(self.cleared) < MAX_CLEARED:
            self.cleared[hash(scope)] = self._n_clears
        else:
            self.cleared_all = self._n_clears
            self.cleared = {}
        forget_scope(&self.evicted, scope_tag(scope))
        for which in range(2):
            table = &self.tables[which]
            i, capacity = 0, table.capacity
            while n_left and i < capacity:
                if table.entries[i].value == NULL or (
                    table.entries[i].meta >> SCOPE_SHIFT != number
                ):
                    i += 1
                    continue
                self.drop(table, i)  # an entry that was pushed past it may be here now
                n_left -= 1
                if table.capacity != capacity:
                    i, capacity = 0, table.capacity
        return 0

    cdef bint was_cleared(self, object scope, uint64_t since) except -1:
        """Return whether a scope was cleared after `_n_clears` was `since`."""
        return self.cleared_all > since or (
            scope is not None and self.cleared.get(hash(scope), 0) > since
        )

    cdef void empty(self) noexcept:
        cdef int which
        cdef uint32_t i
        for which in range(2):
            for i in range(self.tables[which].capacity):
                if self.tables[which].entries[i].value != NULL:
                    release(&self.tables[which].entries[i])
            release_arrays(&self.tables[which])

    cdef int reset(self) except -1:
        """Remove every entry and set the counters to zero; without memory nothing changes."""
        cdef dict refusals = {}, scope_numbers = {}
        cdef list scope_names = [None]
        self.empty()
        forget_all(&self.evicted)
        self.hits = self.misses = self.hit_tokens = self.insertions = self.evictions = 0
        memset(self.misses_by_reason, 0, sizeof(self.misses_by_reason))
        self.refusals = refusals
        self.scope_numbers = scope_numbers
        self.scope_names = scope_names
        free(self.scopes)
        self.scopes = NULL
        self.scope_capacity = self.free_scope = 0
        self.n_scopes = 1
        self.scope_bytes = 0
        return 0

    cdef uint64_t fixed_bytes(self) noexcept:
        return table_bytes(&self.tables[0]) + table_bytes(&self.tables[1])

    cdef uint64_t n_bytes(self) noexcept:
        return (
            self.tables[0].n_item_bytes + self.tables[1].n_item_bytes + self.fixed_bytes()
            + self.scope_bytes
        )

    cdef bint refuse(self, str reason) except -1:
        self.refusals[reason] = self.refusals.get(reason, 0) + 1
        return False

    cdef str admit(
        self, Table* table, const Key* key, str text, TokenIds ids, Victim victim, Entry* entry
    ):
        """Make room and fill `entry`; return None, or the reason if it was refused."""
        cdef uint32_t owner = STRING if PyUnicode_IS_COMPACT_ASCII(text) else COPY
        cdef uint64_t n_bytes = key_bytes(owner, key.n_bytes) + value_bytes(ids.n_tokens)
        if not self.make_room(table, key, n_bytes, victim):
            return "oversize"
        if not reserve(table):
            return "memory"
        entry.key = key.data
        if owner == COPY:
            entry.key = <const uint8_t*> PyObject_Malloc(key.n_bytes)
            if entry.key == NULL:
                return "memory"
            memcpy(<void*> entry.key, key.data, key.n_bytes)
        if not settle(table, key, &entry.digest):
            if owner == COPY:
                PyObject_Free(<void*> entry.key)
            return "memory"
        entry.meta = key.kind | owner << OWNER_SHIFT | key.scope << SCOPE_SHIFT
        entry.n_units = key.n_units
        entry.value = <void*> ids
        Py_INCREF(ids)
        if owner == STRING:
            Py_INCREF(text)
        table.n_item_bytes += n_bytes
        return None

    cdef Victim choose_victim(self) noexcept:
        """Choose the entry that the next one evicts, if any, and prefetch it."""
        cdef Table* a = &self.tables[0]
        cdef Table* b = &self.tables[1]
        cdef Victim victim
        victim.table = NULL
        victim.position = 0
        if a.n + <Py_ssize_t> b.n >= self.max_entries:
            victim.table = a if a.n > b.n else b
            victim.position = oldest_of(
                victim.table, &self.rng, <uint32_t> self.sample_size, self.clock
            )
            fetch(&victim.table.entries[victim.position])
        return victim

    cdef bint make_room(
        self, Table* table, const Key* key, uint64_t n_bytes, Victim victim
    ) except -1:
        """Evict until one more entry of `n_bytes` fits in `table`; return False if it can't fit."""
        cdef Table* a = &self.tables[0]
        cdef Table* b = &self.tables[1]
        cdef uint64_t budget = self.max_bytes
        if self.n_bytes() + n_bytes + bytes_to_grow(table, key) <= budget:  # almost always
            if a.n + <Py_ssize_t> b.n >= self.max_entries:
                self.evict_at(victim.table, victim.position)
            return True
        # Compare with the bytes that remain after evicting all others, so that the loops below end.
        if n_bytes + self.fixed_bytes() + self.own_scope_bytes(key.scope) + (
            bytes_to_grow(table, key) if table.n == 0 else 0
        ) > budget:
            return False
        if a.n + <Py_ssize_t> b.n >= self.max_entries:
            self.evict_at(victim.table, victim.position)
        while self.n_bytes() + n_bytes > budget:
            self.evict(a if a.n_item_bytes > b.n_item_bytes else b)
        while self.n_bytes() + n_bytes + bytes_to_grow(table, key) > budget:
            if table.n:
                self.evict(table)
            elif a.n or b.n:
                self.evict(a if a.n else b)
            else:
                return False
        return True

    cdef int evict(self, Table* table) except -1:
        return self.evict_at(
            table, oldest_of(table, &self.rng, <uint32_t> self.sample_size, self.clock)
        )

    cdef int evict_at(self, Table* table, uint32_t position) except -1:
        cdef Key key = key_of(&table.entries[position])
        cdef uint64_t tag = scope_tag(self.scope_names[key.scope] if key.scope else None)
        cdef int which = table == &self.tables[1]
        self.evictions += 1
        note_eviction(&self.evicted, self.eviction_digest(which, &key, tag), tag)
        return self.drop(table, position)

    cdef int drop(self, Table* table, uint32_t position) except -1:
        fetch(table.entries[position].value)
        fetch(table.entries[position].key - sizeof(PyASCIIObject))
        cdef Entry gone = remove(table, position)
        table.n_item_bytes -= entry_bytes(&gone)
        if gone.meta >> SCOPE_SHIFT:
            self.leave_scope(gone.meta >> SCOPE_SHIFT)
        release(&gone)
        return 0

    cdef uint32_t enter_scope(self, str scope) except? 0:
        """Count one entry more in a scope; return its number, 0 if there are too many scopes."""
        cdef uint32_t number = self.scope_numbers.get(scope, 0)
        cdef uint64_t n_bytes = 0
        if number == 0:
            n_bytes = getsizeof(scope) + SCOPE_BYTES
            number = self.scope_numbers.get(scope, 0)  # that call may have run other code
        if number == 0:
            number = self.free_scope or self.n_scopes
            if number == MAX_SCOPES:
                return 0
            # All that may fail comes before the first change.
            if number >= self.scope_capacity:
                self.grow_scopes()
            if number == <uint32_t> len(self.scope_names):
                self.scope_names.append(None)
            self.scope_numbers[scope] = number
            self.scope_names[number] = scope
            if number == self.n_scopes:
                self.n_scopes += 1
            else:
                self.free_scope = self.scopes[number].next_free
            self.scopes[number].n_entries = 0
            self.scopes[number].n_bytes = n_bytes
            self.scope_bytes += n_bytes
        self.scopes[number].n_entries += 1
        return number

    cdef int grow_scopes(self) except -1:
        cdef uint32_t capacity = max(<uint32_t> 8, 2 * self.scope_capacity)
        cdef void* grown = realloc(self.scopes, capacity * sizeof(Scope))
        if grown == NULL:
            raise MemoryError
        self.scopes = <Scope*> grown
        self.scope_capacity = capacity
        return 0

    cdef uint64_t own_scope_bytes(self, uint32_t number) noexcept:
        return self.scopes[number].n_bytes if number else 0

    cdef int leave_scope(self, uint32_t number) except -1:
        """Count one entry less in a scope; the number of an empty scope can be used again."""
        self.scopes[number].n_entries -= 1
        if self.scopes[number].n_entries == 0:
            self.scope_bytes -= self.scopes[number].n_bytes
            del self.scope_numbers[self.scope_names[number]]
            self.scope_names[number] = None
            self.scopes[number].next_free = self.free_scope
            self.free_scope = number
        return 0


cdef inline bint has_known_names(
    PyObject* const* values, PyObject* names, PyObject** add_special_tokens, PyObject** scope
) noexcept:
    """Assign the keyword arguments of a call or their defaults; return False if it has others."""
    cdef Py_ssize_t i
    add_special_tokens[0] = Py_True
    scope[0] = Py_None
    if names == NULL:
        return True
    for i in range(n_names(names)):
        if name_at(names, i) == <PyObject*> "add_special_tokens":
            add_special_tokens[0] = values[i]
        elif name_at(names, i) == <PyObject*> "scope":
            scope[0] = values[i]
        else:
            return False
    return True


cdef object quick_get(PyObject* self, PyObject* const* args, Py_ssize_t n_args, PyObject* names):
    """Take the calls of `L0Cache.get`."""
    cdef PyObject* add_special_tokens
    cdef PyObject* scope
    if n_args == 1 and has_known_names(args + 1, names, &add_special_tokens, &scope):
        if is_exact_str(args[0]) and is_bool(add_special_tokens):
            return (<L0Cache> self).look_in(add_special_tokens == Py_True, args[0], scope)
    return method_get(self, args, n_args, names)


cdef object quick_get_descriptor(
    PyObject* descriptor, PyObject* const* args, size_t n_args, PyObject* names
):
    """Take the calls of the descriptor of `L0Cache.get`, whose first argument is the cache."""
    cdef PyObject* add_special_tokens
    cdef PyObject* scope
    if n_arguments(n_args) == 2 and type_of(args[0]) == <PyObject*> L0Cache:
        if has_known_names(args + 2, names, &add_special_tokens, &scope):
            if is_exact_str(args[1]) and is_bool(add_special_tokens):
                return (<L0Cache> args[0]).look_in(add_special_tokens == Py_True, args[1], scope)
    return descriptor_get(descriptor, args, n_args, names)


cdef object quick_put(PyObject* self, PyObject* const* args, Py_ssize_t n_args, PyObject* names):
    """Take the calls of `L0Cache.put`."""
    cdef PyObject* add_special_tokens
    cdef PyObject* scope
    if n_args == 2 and has_known_names(args + 2, names, &add_special_tokens, &scope):
        return (<L0Cache> self).keep(args[0], add_special_tokens, <object> args[1], scope)
    return method_put(self, args, n_args, names)


cdef object quick_put_descriptor(
    PyObject* descriptor, PyObject* const* args, size_t n_args, PyObject* names
):
    """Take the calls of the descriptor of `L0Cache.put`, whose first argument is the cache."""
    if n_arguments(n_args) == 3 and type_of(args[0]) == <PyObject*> L0Cache:
        return quick_put(args[0], args + 1, 2, names)
    return descriptor_put(descriptor, args, n_args, names)


cdef Method method_get
cdef Method method_put
cdef Descriptor descriptor_get
cdef Descriptor descriptor_put
has_quick_calls = bool(
    divert(L0Cache, b"get", quick_get, &method_get, quick_get_descriptor, &descriptor_get)
    and divert(L0Cache, b"put", quick_put, &method_put, quick_put_descriptor, &descriptor_put)
)


@cython.binding(True)
def token_ids(self, text, *, add_special_tokens=True, scope=None):
    """Return the token ids of `text`, from the cache if it holds them.

    Shapes: int32[n_tokens], read-only, shared with the cache.
    Cost:   a hit is one look-up; a text that many ask for at once is encoded once.
    """
    # WrappedTokenizer.token_ids: CPython calls a function with keyword-only arguments the slow way.
    if scope is None:
        scope = attribute(self, "_tokcache_scope")
    core = attribute(self, "_tokcache")
    ids = core.get(text, add_special_tokens, scope)
    if ids is not None:
        return ids
    if scope is not None or not PyUnicode_CheckExact(text):
        return core.miss(text, add_special_tokens, scope)
    # Most texts that L0 does not have are put together from cached segments: without a Python frame
    # that takes a tenth less time. `miss` does the same.
    generation = core._generation
    l1 = generation.l1
    look = None if l1 is None else l1.look
    if look is None:
        return core.miss(text, add_special_tokens, None, generation)
    # A clear after this number was read keeps the text out of L0, and its segments out of L1.
    since = generation.l0._n_clears
    found = look(text, add_special_tokens, 0, since)
    if type(found) is not TokenIds:
        return core.miss(text, add_special_tokens, None, generation, found, since)
    if PyUnicode_GET_LENGTH(<PyObject*> text) > long_chars:
        n_long = core._n_long + 1
        core._n_long = n_long
        if n_long % admit_one_in:
            return found
    generation.put(text, add_special_tokens, found, None, since)
    return found


cdef object text_of(const Entry* entry):
    """Return the text of an entry: the caller's str, or a new one from the copied bytes."""
    if (entry.meta & OWNER_MASK) >> OWNER_SHIFT == STRING:
        return <object> <PyObject*> (entry.key - sizeof(PyASCIIObject))
    return PyUnicode_FromKindAndData(entry.meta & KIND_MASK, entry.key, entry.n_units)


cdef uint64_t entry_bytes(const Entry* entry) noexcept:
    return key_bytes(
        (entry.meta & OWNER_MASK) >> OWNER_SHIFT, key_of(entry).n_bytes
    ) + value_bytes((<TokenIds> entry.value).n_tokens)


cdef void release(const Entry* entry) noexcept:
    """Release the key and the value of an entry that was removed from its table."""
    cdef uint32_t owner = (entry.meta & OWNER_MASK) >> OWNER_SHIFT
    if owner == STRING:  # the bytes of a compact ASCII str follow its header
        decref(<PyObject*> (entry.key - sizeof(PyASCIIObject)))
    else:
        PyObject_Free(<void*> entry.key)
    decref(<PyObject*> entry.value)


cdef inline int key_from(PyObject* text, Key* key) except -1:
    PyUnicode_READY(text)
    key.data = <const uint8_t*> PyUnicode_DATA(text)
    key.n_units = <uint32_t> PyUnicode_GET_LENGTH(text)
    key.kind = PyUnicode_KIND(text)
    key.n_bytes = <size_t> PyUnicode_GET_LENGTH(text) * key.kind
    key.scope = 0
    return 0


cdef inline bint is_bool(PyObject* o) noexcept:
    return o == Py_True or o == Py_False


cdef inline int map_of(PyObject* add_special_tokens) except -1:
    """Return the index of the map for texts with or without special tokens."""
    if add_special_tokens == Py_True:
        return 1
    if add_special_tokens == Py_False:
        return 0
    return require_bool("add_special_tokens", <object> add_special_tokens)


cdef str exact_str(object text):
    if not PyUnicode_Check(text):
        raise InvalidText(f"text must be a str, not {type(text).__name__}; decode bytes first")
    return str.__str__(text)  # a subclass of str becomes a plain str


cdef uint64_t scope_tag(object scope) except? 0:
    """Return the number that stands for a scope in the memory of evictions.

    None has one that no hash has: the hash of "" is 0, and none is -1.
    """
    return <uint64_t> <Py_ssize_t> (-1 if scope is None else hash(scope))


cdef str exact_scope(object scope):
    return scope if PyUnicode_CheckExact(scope) else require_scope(scope)


cdef int check_table(Table* table) except -1:
    cdef uint32_t i, n = 0
    cdef uint64_t n_bytes = 0
    cdef Entry* entry
    cdef Key key
    behind = {}
    for i in range(table.capacity):
        entry = &table.entries[i]
        assert (entry.value == NULL) == (table.ticks[i] == 0)
        if entry.value == NULL:
            continue
        key = key_of(entry)
        assert entry.digest == digest_of(table, &key)
        assert find(table, entry.digest, &key) == entry
        if is_long(&key):
            count_crowds(table, &key, behind)
        n += 1
        n_bytes += entry_bytes(entry)
    assert n == table.n
    assert 3 * n <= 2 * table.capacity
    assert n_bytes == table.n_item_bytes
    assert table.n_crowds == len(behind)
    for i in range(table.crowd_capacity):
        assert table.crowds[i].n_entries == behind.get(table.crowds[i].digest, 0) or (
            table.crowds[i].n_entries == 0
        )
    assert sum(behind.values()) == sum(
        [table.crowds[i].n_entries for i in range(table.crowd_capacity)]
    )
    return 0


cdef int count_crowds(Table* table, const Key* key, dict behind) except -1:
    cdef uint64_t here = sampled_of(table, key)
    cdef Crowd* crowd = find_crowd(table, here)
    while crowd != NULL:
        behind[here] = behind.get(here, 0) + 1
        here = refined(table, here, crowd.offset, key)
        crowd = NULL if crowd.offset == WHOLE else find_crowd(table, here)
    return 0
