"""Kernels of our own for CPUs: linear layers over packed weights and whole decoder stacks, the same bits for a row
whatever else is in the call.

The C++ sources in `source/` are compiled on first use (`build`), called through `ctypes` (`library`) on weights that
`packed` lays out, one matrix at a time (`packed.linear`) or a model at a time (`stack.stack_forward`).
"""
