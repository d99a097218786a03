# cython: binding=False, embedsignature=True, embedsignature.format=clinic
"""TokenIds: an immutable int32 sequence over one allocation."""

cimport cython
from cpython.buffer cimport (
    PyBUF_FORMAT, PyBUF_ND, PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_Release, PyObject_CheckBuffer,
    PyObject_GetBuffer, PyBUF_FULL_RO,
)
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE, PyList_New
from cpython.long cimport PyLong_AsLongAndOverflow
from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject, PyTypeObject
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from libc.limits cimport INT_MAX, INT_MIN
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcmp, memcpy, strcmp

import operator
from collections.abc import Sequence
from os import urandom

from tokcache.errors import InvalidTokens

from tokcache.text._digest cimport N_SECRETS, full_digest

cdef extern from "Python.h":
    void* PyObject_Malloc(size_t n)
    PyObject* PyObject_Init(PyObject* op, PyTypeObject* type)
    PyObject* long_from "PyLong_FromLong"(long number)
    void incref "Py_INCREF"(PyObject* item)
    ctypedef struct PyListObject:
        PyObject** ob_item
    bint PyLong_CheckExact(object o)
    bint PyList_CheckExact(object o)
    bint PySlice_Check(object o)
    int PySlice_Unpack(
        object slice, Py_ssize_t* start, Py_ssize_t* stop, Py_ssize_t* step
    ) except -1
    Py_ssize_t PySlice_AdjustIndices(
        Py_ssize_t length, Py_ssize_t* start, Py_ssize_t* stop, Py_ssize_t step
    ) noexcept

cdef extern from *:
    """
    #define tokcache_prefetch(p) __builtin_prefetch((const void *)(p), 1)
    """
    void prefetch "tokcache_prefetch"(const void* p) noexcept

cdef enum:
    MAX_TOKENS = 2_000_000_000  # ids in one sequence
    AHEAD = 12                  # items that tolist() prefetches
    MAX_INTERNED = 1 << 19      # ids whose int objects are kept: at most 4 MiB of pointers

cdef Py_ssize_t ITEM_BYTES = sizeof(int)
cdef char* FORMAT = "i"
cdef PyObject** interned = NULL   # the int object of each id seen by tolist(), or NULL
cdef Py_ssize_t n_interned = 0
cdef uint64_t[N_SECRETS] hash_secret

cdef bytes _random = urandom(8 * N_SECRETS)
memcpy(&hash_secret[0], <const char*> _random, 8 * N_SECRETS)


@cython.final
@cython.no_gc
cdef class TokenIds:
    """An immutable sequence of int32 token ids.

    Shapes: int32[n_tokens]; slices share the memory, a slice with a step is a copy.
    Errors: InvalidTokens if an id is not an int32.
    Threads: safe, because it is immutable.
    """

    def __cinit__(self, ids=()):
        cdef TokenIds owner = owner_from(ids)
        self.n_tokens = owner.n_tokens
        self.start = 0
        Py_INCREF(owner)
        self.base = <PyObject*> owner

    def __init__(self, ids=()):
        pass

    def __dealloc__(self):
        Py_XDECREF(self.base)

    def __len__(self):
        return self.n_tokens

    def __bool__(self):
        return self.n_tokens > 0

    def __getitem__(self, index):
        if PySlice_Check(index):
            return slice_of(self, index)
        cdef Py_ssize_t i = operator.index(index)
        if i < 0:
            i += self.n_tokens
        if i < 0 or i >= self.n_tokens:
            raise IndexError(f"index out of range: {self.n_tokens} tokens")
        return ids_data(self)[i]

    def __iter__(self):
        return iter(self.tolist())

    def __contains__(self, value):
        return value in self.tolist()

    def __eq__(self, other):
        cdef TokenIds ids
        if type(other) is TokenIds:
            ids = <TokenIds> other
            return self.n_tokens == ids.n_tokens and (
                memcmp(ids_data(self), ids_data(ids), self.n_tokens * sizeof(int)) == 0
            )
        return self.tolist() == other if isinstance(other, list) else NotImplemented

    def __hash__(self):
        cdef uint64_t digest = full_digest(
            <const uint8_t*> ids_data(self), self.n_tokens * sizeof(int), 0, hash_secret
        )
        return <Py_hash_t> (digest >> 1)  # never negative, so never -1

    def __repr__(self):
        return f"TokenIds({self.tolist()!r})"

    def __reduce__(self):
        from tokcache.text._pickling import unpickle
        return unpickle, (self.tobytes(),)

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def __sizeof__(self):
        return sizeof_token_ids() + (
            0 if self.base else self.n_tokens * sizeof(int)
        )

    def __getbuffer__(self, Py_buffer* view, int flags):
        if flags & PyBUF_WRITABLE:
            raise BufferError("TokenIds are read-only; copy them: array('i', ids)")
        view.internal = NULL
        view.shape = NULL
        if flags & PyBUF_ND:
            view.shape = <Py_ssize_t*> PyMem_Malloc(sizeof(Py_ssize_t))
            if view.shape == NULL:
                raise MemoryError
            view.shape[0] = self.n_tokens
        view.buf = <void*> ids_data(self)
        view.obj = self
        view.len = self.n_tokens * sizeof(int)
        view.readonly = True
        view.itemsize = sizeof(int)
        view.format = FORMAT if flags & PyBUF_FORMAT else NULL
        view.ndim = 1
        view.strides = &ITEM_BYTES if (flags & PyBUF_STRIDES) == PyBUF_STRIDES else NULL
        view.suboffsets = NULL

    def __releasebuffer__(self, Py_buffer* view):
        PyMem_Free(view.shape)

    def tolist(self):
        """Return a new list of the ids."""
        return list_of(ids_data(self), self.n_tokens)

    def tobytes(self):
        """Return the ids as bytes in native order."""
        return PyBytes_FromStringAndSize(
            <const char*> ids_data(self), self.n_tokens * sizeof(int)
        )

    def numpy(self):
        """Return a read-only int32[n_tokens] view, no copy."""
        import numpy
        return numpy.frombuffer(self, numpy.int32)

    def count(self, value):
        """Return how often `value` occurs."""
        return self.tolist().count(value)

    def index(self, value, start=0, stop=MAX_TOKENS):
        """Return the first position of `value`; raise ValueError if there is none."""
        return self.tolist().index(value, start, stop)


Sequence.register(TokenIds)
assert TokenIds.__basicsize__ == sizeof_token_ids()


cdef TokenIds new_owner(Py_ssize_t n_tokens):
    """Return an owner with room for `n_tokens` ids."""
    if n_tokens > MAX_TOKENS:
        raise InvalidTokens(f"{n_tokens:,} tokens are more than the {MAX_TOKENS:,} one can hold")
    cdef PyObject* raw = <PyObject*> PyObject_Malloc(
        sizeof_token_ids() + n_tokens * sizeof(int)
    )
    if raw == NULL:
        raise MemoryError
    PyObject_Init(raw, <PyTypeObject*> TokenIds)
    cdef TokenIds owner = <TokenIds> raw
    Py_DECREF(owner)  # `owner` has taken over the reference that PyObject_Init returned
    owner.n_tokens = <unsigned int> n_tokens
    owner.start = 0
    owner.base = NULL
    return owner


cdef TokenIds owner_of(TokenIds ids):
    """Return an owner of exactly these ids: `ids` itself, its base, or a copy."""
    if ids.base == NULL:
        return ids
    cdef TokenIds base = <TokenIds> ids.base
    if base.n_tokens == ids.n_tokens:
        return base
    cdef TokenIds copy = new_owner(ids.n_tokens)
    memcpy(owner_data(copy), ids_data(ids), ids.n_tokens * sizeof(int))
    return copy


cdef TokenIds owner_from(object ids):
    if type(ids) is TokenIds:
        return owner_of(<TokenIds> ids)
    if PyList_CheckExact(ids):
        return owner_from_list(ids)
    if isinstance(ids, (str, bytes, bytearray)):
        raise InvalidTokens(f"token ids must be integers, not {type(ids).__name__}")
    if PyObject_CheckBuffer(ids):
        owner = owner_from_buffer(ids)
        if owner is not None:
            return owner
    try:
        return owner_from_list(list(ids))
    except TypeError as error:
        raise InvalidTokens(f"token ids must be a sequence of integers: {error}") from None


cdef TokenIds owner_from_buffer(object ids):
    """Return a copy of a one-dimensional int32 buffer, or None for any other buffer."""
    cdef Py_buffer view
    cdef TokenIds owner
    PyObject_GetBuffer(ids, &view, PyBUF_FULL_RO)
    try:
        if view.ndim != 1 or view.format == NULL or strcmp(view.format, "i") != 0:
            return None
        if view.strides != NULL and view.strides[0] != ITEM_BYTES and view.len:
            return None
        owner = new_owner(view.len // ITEM_BYTES)
        memcpy(owner_data(owner), view.buf, view.len)
        return owner
    finally:
        PyBuffer_Release(&view)


cdef TokenIds owner_from_list(list ids):
    cdef Py_ssize_t i, n = PyList_GET_SIZE(ids)
    cdef TokenIds owner = new_owner(n)
    cdef int* data = owner_data(owner)
    for i in range(n):
        if i >= PyList_GET_SIZE(ids):  # the __index__ of an item may shorten the list
            raise InvalidTokens("the list of token ids changed while it was read")
        data[i] = int32_of(<object> PyList_GET_ITEM(ids, i))
    return owner


cdef int int32_of(object value) except? -1:
    cdef int overflow = 0
    if not PyLong_CheckExact(value):
        try:
            value = operator.index(value)
        except TypeError:
            raise InvalidTokens(f"a token id must be an integer, not {value!r}") from None
    cdef long number = PyLong_AsLongAndOverflow(value, &overflow)
    if overflow or number < INT_MIN or number > INT_MAX:
        raise InvalidTokens(f"token id {value} does not fit into an int32")
    return <int> number


cdef object slice_of(TokenIds ids, object key):
    cdef Py_ssize_t start, stop, step, i, n
    cdef TokenIds part
    PySlice_Unpack(key, &start, &stop, &step)
    n = PySlice_AdjustIndices(ids.n_tokens, &start, &stop, step)
    if step != 1:
        part = new_owner(n)
        for i in range(n):
            owner_data(part)[i] = ids_data(ids)[start + i * step]
        return part
    if n == ids.n_tokens:
        return ids
    part = new_owner(0)
    cdef TokenIds base = ids if ids.base == NULL else <TokenIds> ids.base
    part.n_tokens = <unsigned int> n
    part.start = <unsigned int> (start + (0 if ids.base == NULL else ids.start))
    Py_INCREF(base)
    part.base = <PyObject*> base
    return part


cdef list list_of(const int* data, Py_ssize_t n):
    """Return a list of the ids; most int objects come from the table, for a pointer copy each."""
    cdef list result = PyList_New(n)
    cdef PyObject** items = (<PyListObject*> result).ob_item
    cdef PyObject** table
    cdef PyObject* item
    cdef unsigned int together = 0
    cdef Py_ssize_t i, n_ahead = 0
    for i in range(n):
        together |= <unsigned int> data[i]
    if together >= n_interned:
        grow_interned(together)
    table = interned
    if together < n_interned:  # n_interned is a power of two, so every id is below it
        n_ahead = n - AHEAD
    for i in range(n_ahead):
        prefetch(table[data[i + AHEAD]])  # the int objects are scattered over memory
        item = table[data[i]]
        if item == NULL:
            item = new_int(data[i])
        else:
            incref(item)
        items[i] = item
    for i in range(max(n_ahead, 0), n):
        item = table[data[i]] if <unsigned int> data[i] < n_interned else NULL
        if item == NULL:
            item = new_int(data[i])
            table = interned
        else:
            incref(item)
        items[i] = item
    return result


cdef PyObject* new_int(int number) except NULL:
    """Return a new reference to an int; the table keeps one, too, for ids below MAX_INTERNED."""
    cdef PyObject* item = long_from(number)
    if item == NULL:
        raise MemoryError
    if <unsigned int> number >= n_interned:
        grow_interned(<unsigned int> number)
    if <unsigned int> number < n_interned:
        interned[<unsigned int> number] = item
        incref(item)
    return item


cdef void grow_interned(unsigned int highest) noexcept:
    """Grow the table for ids up to `highest`; do nothing above MAX_INTERNED or without memory."""
    global interned, n_interned
    cdef Py_ssize_t n = max(n_interned, 1024)
    cdef PyObject** grown
    if highest >= MAX_INTERNED:
        return
    while n <= <Py_ssize_t> highest:
        n *= 2
    grown = <PyObject**> PyMem_Calloc(n, sizeof(PyObject*))
    if grown == NULL:
        return
    if interned != NULL:
        memcpy(grown, interned, n_interned * sizeof(PyObject*))
        PyMem_Free(interned)
    interned = grown
    n_interned = n
