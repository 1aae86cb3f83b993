"""Kernels for decoding, a few tokens at a time: products with stored weights, and attention.

compiler.py compiles and launches, ops.py is what the model calls; the CUDA C stands beside them.
"""
