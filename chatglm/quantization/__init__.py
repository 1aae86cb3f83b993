"""Weights in few bits: the released int8 and int4 rows, and bitsandbytes' int8 and nf4."""

import logging

# PEFT imports bitsandbytes wherever it is installed, which then warns of a CPU kernel it lacks.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
