"""Benchmarks, peers and the static model of the kernels."""

import train  # noqa: F401  it ends in one line where a file beside hides one of our packages
