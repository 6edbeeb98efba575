"""The stages of `make demo`, how they run, and the report."""
