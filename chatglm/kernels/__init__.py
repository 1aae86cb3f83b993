"""Kernels: products of a few rows with stored weights, attention over caches, and whole passes.

On NVIDIA cards compiler.py compiles and launches the CUDA C that stands beside it; products.py and
ops.py are its functions for decoding, passes.py those for training and for prompts. On a CPU cpu.py
does both for cpu.c.
"""
