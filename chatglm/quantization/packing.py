"""`model.quantize(bits)`: the released way to int8 and int4, of a model that is loaded."""

import logging
from typing import Any

from ..errors import ToolkitError
from .bnb import is_bitsandbytes
from .linear import QuantizedEmbedding, QuantizedLinear, quantize_blocks

logger = logging.getLogger("chatglm")


class PackingMixin:
    """`quantize` and `quantized` for a model with blocks, an embedding and a head."""

    config: Any
    transformer: Any
    lm_head: Any

    @property
    def quantized(self) -> bool:
        """True if its weights are packed the released way."""
        return bool(self.config.quantization_bit)

    def quantize(self, bits: int, *, quantize_embeddings: bool = False):
        """Pack the linears of the blocks into 8 or 4 bits, in place, and give the model.

        Each is packed where it is, and its weight freed before the next: the most memory that is
        taken is little more than the model's own. quantize_embeddings: embedding and head as well,
        as in chatglm-6b-int4-qe.

        Raises:
            ToolkitError: for other bits, and for weights that are quantised otherwise or have an
                adapter on them.
        """
        self._check_packable(bits)
        more = quantize_embeddings and not self.config.quantization_embeddings
        if self.config.quantization_bit == bits and not more:
            logger.warning("quantize(%d): the weights are int%d already", bits, bits)
            return self
        quantize_blocks(self.transformer.layers, bits)
        if more:
            embedding, head = self.transformer.word_embeddings, self.lm_head
            self.lm_head = QuantizedLinear.from_linear(head, bits).train(head.training)
            packed = QuantizedEmbedding.from_embedding(embedding, bits)
            self.transformer.word_embeddings = packed.train(embedding.training)
            self.config.quantization_embeddings = True
            self.config.tie_word_embeddings = False  # packed, they are stored apart
        self.config.quantization_bit = bits
        return self

    def _check_packable(self, bits: int) -> None:
        held = self.config.quantization_bit
        if bits not in (4, 8):
            raise ToolkitError(f"quantize({bits!r}): allowed are 4 and 8 bits")
        if held not in (0, bits):
            raise ToolkitError(
                f"quantize({bits}): the weights are int{held} already; load the fp16 weights and"
                " quantise those"
            )
        if is_bitsandbytes(self):  # type: ignore[arg-type]  # a module beside being this
            raise ToolkitError(
                f"quantize({bits}): bitsandbytes holds these weights; load them without"
                " load_in_8bit and load_in_4bit"
            )
        if hasattr(self, "peft_config"):
            raise ToolkitError(
                f"quantize({bits}): there is an adapter on these weights; quantise first, then load"
                " the adapter, or merge it (merge_and_unload) and quantise the result"
            )
