# Quick calls of methods with keyword-only arguments.
#
# Cython compares the keywords of a call with the names of all arguments, and takes a reference to
# each value. In a look-up that takes a tenth of a microsecond this is a quarter of the work. So a
# second function, in CPython's own calling convention, takes the method's calls: it compares names
# by address and borrows the values. All calls that it does not understand it passes on to the
# method, whose signature, defaults and errors therefore hold.

from cpython.object cimport PyObject

cdef extern from *:
    """
    typedef PyObject *(*tokcache_method)(
        PyObject *self, PyObject *const *args, Py_ssize_t n_args, PyObject *names);

    static int tokcache_divert(
        PyTypeObject *type, const char *name, tokcache_method quick, tokcache_method *method)
    {
        PyMethodDef *def = type->tp_methods;
        while (def->ml_name != NULL && strcmp(def->ml_name, name) != 0)
            def++;
        if (def->ml_name == NULL || def->ml_flags != (METH_FASTCALL | METH_KEYWORDS))
            return 0;
        if ((tokcache_method)(void (*)(void))def->ml_meth != quick) {
            *method = (tokcache_method)(void (*)(void))def->ml_meth;
            def->ml_meth = (PyCFunction)(void (*)(void))quick;  // CPython reads it at every call
        }
        return 1;
    }
    """
    ctypedef object (*Method "tokcache_method")(
        PyObject* self, PyObject* const* args, Py_ssize_t n_args, PyObject* names
    )
    # Have `quick` take the calls of a method, and set `method` to the function that took them
    # before; return 0 if the method's arguments are not passed in this convention.
    int divert "tokcache_divert"(
        type type, const char* name, Method quick, Method* method
    ) noexcept
    Py_ssize_t n_names "PyTuple_GET_SIZE"(PyObject* names) noexcept
    PyObject* name_at "PyTuple_GET_ITEM"(PyObject* names, Py_ssize_t i) noexcept
