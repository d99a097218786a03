"""The cases, one module per kind of library; each case imports its library when it runs."""
