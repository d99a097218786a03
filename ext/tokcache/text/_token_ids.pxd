from cpython.object cimport PyObject


cdef class TokenIds:
    # The `base` of an owner is NULL; its ids follow the object in the same allocation.
    # The `base` of a slice is an owner; the slice begins at the owner's id `start`.
    cdef unsigned int n_tokens
    cdef unsigned int start
    cdef PyObject* base


cdef TokenIds new_owner(Py_ssize_t n_tokens)
cdef TokenIds owner_of(TokenIds ids)


cdef inline int* owner_data(TokenIds owner) noexcept:
    return <int*> (<char*> <PyObject*> owner + sizeof_token_ids())


cdef inline const int* ids_data(TokenIds ids) noexcept:
    if ids.base == NULL:
        return owner_data(ids)
    return <const int*> (<char*> ids.base + sizeof_token_ids()) + ids.start


cdef extern from *:
    """
    #define TOKCACHE_SIZEOF_TOKEN_IDS (sizeof(PyObject) + 16)
    """
    size_t SIZEOF_TOKEN_IDS "TOKCACHE_SIZEOF_TOKEN_IDS"


cdef inline size_t sizeof_token_ids() noexcept:
    return SIZEOF_TOKEN_IDS
