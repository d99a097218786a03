# cython: binding=False, embedsignature=True, embedsignature.format=clinic
"""Messages and settings as bytes: the format of `marshal` in version 0, for JSON's types alone.

`marshal` encodes every string to an object of its own first; here ASCII text is copied as it is.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_Next
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.object cimport PyObject
from libc.limits cimport INT_MAX
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy

from marshal import dumps

from tokcache.errors import RenderingRefused

cdef extern from "Python.h":
    bint PyDict_CheckExact(object o)
    bint PyFloat_CheckExact(object o)
    bint PyList_CheckExact(object o)
    bint PyLong_CheckExact(object o)
    bint PyTuple_CheckExact(object o)
    bint PyUnicode_CheckExact(object o)
    bint PyUnicode_IS_COMPACT_ASCII(object o)
    Py_ssize_t PyUnicode_GET_LENGTH(object o)
    void* PyUnicode_DATA(object o)
    bytes PyUnicode_AsEncodedString(object o, const char* encoding, const char* errors)
    long PyLong_AsLongAndOverflow(object o, int* overflow) except? -1

cdef enum:
    MAX_DEPTH = 100     # of values in values, as in the reference implementation
    FIRST_BYTES = 8192  # of a buffer; the messages of a short chat

cdef struct Buffer:
    uint8_t* data
    Py_ssize_t n_bytes
    Py_ssize_t size


cdef inline uint8_t* grown(Buffer* out, Py_ssize_t n_bytes) except NULL:
    """Return the place of the next `n_bytes`, which belong to the buffer from now on."""
    cdef uint8_t* data
    cdef Py_ssize_t size
    if n_bytes > out.size - out.n_bytes:
        size = 2 * out.size + n_bytes
        data = <uint8_t*> PyMem_Realloc(out.data, size)
        if data == NULL:
            raise MemoryError()
        out.data = data
        out.size = size
    out.n_bytes += n_bytes
    return out.data + out.n_bytes - n_bytes


cdef inline int put_number(Buffer* out, char kind, Py_ssize_t number) except -1:
    """Write a type and a number of 32 bits."""
    cdef uint8_t* place = grown(out, 5)
    cdef uint32_t value = <uint32_t> number
    cdef int index
    place[0] = <uint8_t> kind
    for index in range(4):
        place[1 + index] = <uint8_t> ((value >> (8 * index)) & 0xFF)
    return 0


cdef inline int put_size(Buffer* out, char kind, Py_ssize_t size) except -1:
    if size > INT_MAX:
        raise RenderingRefused("type")
    return put_number(out, kind, size)


cdef inline int put_bytes(Buffer* out, const void* data, Py_ssize_t n_bytes) except -1:
    memcpy(grown(out, n_bytes), data, n_bytes)
    return 0


cdef int put_str(Buffer* out, object text) except -1:
    cdef bytes encoded
    if PyUnicode_IS_COMPACT_ASCII(text):
        put_size(out, c"u", PyUnicode_GET_LENGTH(text))
        return put_bytes(out, PyUnicode_DATA(text), PyUnicode_GET_LENGTH(text))
    encoded = PyUnicode_AsEncodedString(text, "utf8", "surrogatepass")
    put_size(out, c"u", PyBytes_GET_SIZE(encoded))
    return put_bytes(out, PyBytes_AS_STRING(encoded), PyBytes_GET_SIZE(encoded))


cdef int put_dict(Buffer* out, dict value, int depth) except -1:
    cdef Py_ssize_t position = 0
    cdef PyObject* name = NULL
    cdef PyObject* item = NULL
    grown(out, 1)[0] = c"{"
    while PyDict_Next(value, &position, &name, &item):
        if not PyUnicode_CheckExact(<object> name):
            raise RenderingRefused("type")
        put_str(out, <object> name)
        put(out, <object> item, depth)
    grown(out, 1)[0] = c"0"
    return 0


cdef int put(Buffer* out, object value, int depth) except -1:
    """Write a value, within `depth` more values."""
    cdef int overflow = 0
    cdef long number
    cdef bytes other
    if PyUnicode_CheckExact(value):
        return put_str(out, value)
    if value is None or value is True or value is False:
        grown(out, 1)[0] = c"N" if value is None else c"T" if value is True else c"F"
        return 0
    if PyLong_CheckExact(value):
        number = PyLong_AsLongAndOverflow(value, &overflow)
        if not overflow and -INT_MAX - 1 <= number <= INT_MAX:
            return put_number(out, c"i", number)
    if PyLong_CheckExact(value) or PyFloat_CheckExact(value):
        other = dumps(value, 0)
        return put_bytes(out, PyBytes_AS_STRING(other), PyBytes_GET_SIZE(other))
    if depth == 0:
        raise RenderingRefused("type")
    if PyDict_CheckExact(value):
        return put_dict(out, value, depth - 1)
    if PyList_CheckExact(value):
        put_size(out, c"[", len(<list> value))
        for item in <list> value:
            put(out, item, depth - 1)
        return 0
    if PyTuple_CheckExact(value):
        put_size(out, c"(", len(<tuple> value))
        for item in <tuple> value:
            put(out, item, depth - 1)
        return 0
    raise RenderingRefused("type")


cdef int begin(Buffer* out) except -1:
    out.n_bytes = 0
    out.size = FIRST_BYTES
    out.data = <uint8_t*> PyMem_Malloc(FIRST_BYTES)
    if out.data == NULL:
        raise MemoryError()
    return 0


def freeze(value):
    """Return a value as bytes.

    Errors: RenderingRefused if it is not made of JSON's types and tuples.
    """
    cdef Buffer out
    begin(&out)
    try:
        put(&out, value, MAX_DEPTH)
        return PyBytes_FromStringAndSize(<char*> out.data, out.n_bytes)
    finally:
        PyMem_Free(out.data)


def freeze_messages(messages):
    """Return the messages of a chat, all dicts, as bytes, and where each ends.

    Errors: RenderingRefused if they are not made of JSON's types and tuples.
    """
    cdef Buffer out
    cdef list ends = []
    begin(&out)
    try:
        for message in messages:
            if not PyDict_CheckExact(message):
                raise RenderingRefused("type")
            put_dict(&out, message, MAX_DEPTH - 1)
            ends.append(out.n_bytes)
        return PyBytes_FromStringAndSize(<char*> out.data, out.n_bytes), tuple(ends)
    finally:
        PyMem_Free(out.data)
