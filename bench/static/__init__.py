"""What compiled kernels cost, modelled from their machine code: see :mod:`bench.static.__main__`."""
