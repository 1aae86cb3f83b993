"""Kernels for decoding, a few tokens at a time: products with stored weights, and attention.

On NVIDIA cards compiler.py compiles and launches the CUDA C that stands beside it; products.py and
ops.py are its functions. On a CPU cpu.py does both for cpu.c.
"""
