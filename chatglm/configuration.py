"""The shape of a ChatGLM-6B and its token ids, as the released config.json names them."""

from transformers import PreTrainedConfig

from .errors import ToolkitError

OLD_VOCABULARY = 150528
"""Rows of the first weights (April 2023), whose first 20000 ids are image tokens."""

_SIZES = (
    "vocab_size",
    "hidden_size",
    "inner_hidden_size",
    "num_layers",
    "num_attention_heads",
    "max_sequence_length",
)


class ChatGLMConfig(PreTrainedConfig):
    """Settings of one checkpoint. The defaults are the released ChatGLM-6B v1.1."""

    model_type = "chatglm"
    attribute_map = {  # noqa: RUF012 (transformers reads it from the class)
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "max_sequence_length",
        "intermediate_size": "inner_hidden_size",
    }
    SHAPE = (*_SIZES, "layernorm_epsilon", "position_encoding_2d")
    """Keys that the weights decide."""
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 130528,
        hidden_size: int = 4096,
        num_layers: int = 28,
        num_attention_heads: int = 32,
        layernorm_epsilon: float = 1e-5,
        use_cache: bool = True,
        bos_token_id: int = 130004,
        eos_token_id: int = 130005,
        mask_token_id: int = 130000,
        gmask_token_id: int = 130001,
        pad_token_id: int = 3,
        max_sequence_length: int = 2048,
        inner_hidden_size: int = 16384,
        position_encoding_2d: bool = True,
        quantization_bit: int = 0,
        quantization_embeddings: bool = False,
        pre_seq_len: int | None = None,
        prefix_projection: bool = False,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_attention_heads = num_attention_heads
        self.layernorm_epsilon = layernorm_epsilon
        self.use_cache = use_cache
        self.mask_token_id = mask_token_id
        self.gmask_token_id = gmask_token_id
        self.max_sequence_length = max_sequence_length
        self.inner_hidden_size = inner_hidden_size
        self.position_encoding_2d = position_encoding_2d
        self.quantization_bit = quantization_bit
        self.quantization_embeddings = quantization_embeddings
        self.pre_seq_len = pre_seq_len
        self.prefix_projection = prefix_projection
        self.initializer_range = initializer_range
        super().__init__(  # type: ignore[call-arg]  # a dataclass only from the outside
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **{"tokenizer_class": "ChatGLMTokenizer", **kwargs},
        )

    @property
    def head_width(self) -> int:
        """D, the width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def check(self) -> None:
        """Refuse shapes that this model is not.

        Raises:
            ToolkitError: for the older vocabulary, one-dimensional positions, heads that do not
                divide the hidden width into fours, or a bit count without a released format.
        """
        for name in _SIZES:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ToolkitError(f"{name} {getattr(self, name)!r}: expected a number above 0")
        if self.vocab_size == OLD_VOCABULARY:
            raise ToolkitError(
                f"vocab_size {OLD_VOCABULARY} is the first ChatGLM-6B (ids from 150000, 20000 image"
                " tokens first); this toolkit reads v1.1 (vocab_size 130528): take the current"
                " weights and their tokenizer together"
            )
        if not self.position_encoding_2d:
            raise ToolkitError("position_encoding_2d false is not ChatGLM-6B; it must be true")
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ToolkitError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 times"
                f" num_attention_heads {self.num_attention_heads}"
            )
        if self.quantization_bit not in (0, 4, 8):
            raise ToolkitError(f"quantization_bit {self.quantization_bit}: allowed are 0, 4 and 8")
        if self.quantization_bit and self.quantization_embeddings and self.tie_word_embeddings:
            raise ToolkitError("quantization_embeddings stores head and embedding apart: set"
                               " tie_word_embeddings to false")  # fmt: skip
