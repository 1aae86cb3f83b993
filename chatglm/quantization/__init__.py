"""Weights in the released int8 and int4 formats."""
