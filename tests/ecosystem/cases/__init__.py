"""The cases, a module a kind of library; each imports its library when it runs."""
