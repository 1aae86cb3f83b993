"""Weights in few bits: the released int8 and int4 rows, and bitsandbytes' int8 and nf4."""

import logging

# PEFT imports bitsandbytes wherever it is installed, which then warns of a CPU kernel it lacks; and
# its int8 warns of a rounding at every linear of every step.
for name in ("backends.cpu.ops", "autograd._functions"):
    logging.getLogger(f"bitsandbytes.{name}").setLevel(logging.ERROR)
