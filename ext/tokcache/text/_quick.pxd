# Quick calls of methods with keyword-only arguments.
#
# Cython compares the keywords of a call with the names of all arguments, and takes a reference to
# each value. In a look-up that takes a tenth of a microsecond this is a quarter of the work. So
# functions in CPython's own calling conventions take the method's calls: they compare names by
# address and borrow the values. All calls that they do not understand they pass on to the method,
# whose signature, defaults and errors therefore hold.
#
# There are two, because CPython has two ways to a method. A call without keywords that has run a
# few times calls the function in the method's definition. A call with keywords goes through the
# method's descriptor, which checks the object's type and the depth of recursion first.

from cpython.object cimport PyObject

cdef extern from *:
    """
    typedef PyObject *(*tokcache_method)(
        PyObject *self, PyObject *const *args, Py_ssize_t n_args, PyObject *names);

    static int tokcache_divert(
        PyTypeObject *type, const char *name, tokcache_method quick, tokcache_method *method,
        vectorcallfunc quick_descriptor, vectorcallfunc *descriptor)
    {
        PyMethodDescrObject *found = (PyMethodDescrObject *)PyObject_GetAttrString(
            (PyObject *)type, name);
        PyMethodDef *def;
        if (found == NULL) {
            PyErr_Clear();
            return 0;
        }
        def = Py_IS_TYPE(found, &PyMethodDescr_Type) ? found->d_method : NULL;
        Py_DECREF(found);  /* the type keeps it alive */
        if (def == NULL || def->ml_flags != (METH_FASTCALL | METH_KEYWORDS))
            return 0;
        if ((tokcache_method)(void (*)(void))def->ml_meth != quick) {
            *method = (tokcache_method)(void (*)(void))def->ml_meth;
            def->ml_meth = (PyCFunction)(void (*)(void))quick;  /* CPython reads it at each call */
        }
        if (found->vectorcall != quick_descriptor) {
            *descriptor = found->vectorcall;
            found->vectorcall = quick_descriptor;
        }
        return 1;
    }
    """
    ctypedef object (*Method "tokcache_method")(
        PyObject* self, PyObject* const* args, Py_ssize_t n_args, PyObject* names
    )
    ctypedef object (*Descriptor "vectorcallfunc")(
        PyObject* descriptor, PyObject* const* args, size_t n_args, PyObject* names
    )
    # Have `quick` take the calls of a method and `quick_descriptor` those of its descriptor, and
    # set `method` and `descriptor` to the functions that took them before; return 0 if the method's
    # arguments are not passed in this convention.
    int divert "tokcache_divert"(
        type type, const char* name, Method quick, Method* method,
        Descriptor quick_descriptor, Descriptor* descriptor,
    ) noexcept
    Py_ssize_t n_arguments "PyVectorcall_NARGS"(size_t n_args) noexcept
    PyObject* type_of "(PyObject *)Py_TYPE"(PyObject* o) noexcept
    Py_ssize_t n_names "PyTuple_GET_SIZE"(PyObject* names) noexcept
    PyObject* name_at "PyTuple_GET_ITEM"(PyObject* names, Py_ssize_t i) noexcept
