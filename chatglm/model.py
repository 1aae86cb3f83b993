"""ChatGLM-6B, the whole model, top to bottom.

What is odd about it, beside a usual decoder:
  - a prefix language model: the context sees itself in both directions (see positions.py)
  - 2-D rotary positions: half a head turns by text position, half by block position (rotary.py)
  - the residual branches off AFTER the layer norm, scaled by alpha = sqrt(2 * layers)
  - query, key and value stand side by side per head in one projection
  - scores overflow fp16 in deep layers: the released code divides q by the layer number and
    multiplies the scores back in fp32; scaled_dot_product_attention keeps them in fp32 throughout

Shapes: B batch, T query tokens, S key tokens, H heads, D head width, C hidden, V vocabulary,
P virtual tokens of a prefix. Tensor names of the state dict are the released ones.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from . import fused
from .cache import KVCache
from .chat import ChatMixin
from .configuration import ChatGLMConfig
from .errors import ToolkitError
from .kernels import cpu
from .loss import CHUNK, chunked_loss, learned_tokens, next_token_loss
from .packed import Packed
from .packed_attention import PackedAttention
from .positions import (
    ATTENTION_KERNELS,
    allowed_keys,
    find_context,
    mask_from_released,
    position_rows,
    token_index,
)
from .prefix import PrefixEncoder, own_gradient
from .quantization.linear import QuantizedEmbedding, QuantizedLinear
from .quantization.packing import PackingMixin
from .rotary import apply_rotary, rotary_for_positions
from .strict_files import StrictFilesMixin
from .tokenizer import ChatGLMTokenizer
from .tying import EMBEDDING, HEAD


def build_linear(config: ChatGLMConfig, in_features: int, out_features: int) -> nn.Module:
    """A linear of a block: plain, or over the released packed weights."""
    if config.quantization_bit:
        return QuantizedLinear(in_features, out_features, config.quantization_bit)
    return nn.Linear(in_features, out_features)


class LayerNorm(nn.LayerNorm):
    """Gives back the dtype it was given: autocast reckons norms in fp32 and would leave it so.

    A half-precision stream then stays one, at half the memory of its activations. is_fused: by a
    kernel, where it runs.
    """

    is_fused = True

    def forward(self, hidden: Tensor) -> Tensor:
        """(.., C) to (.., C)."""
        if fused.supports_norm(self, hidden):
            return fused.layer_norm(hidden, self)
        return super().forward(hidden).to(hidden.dtype)


class SelfAttention(nn.Module):
    """Attention over the cache, with rotary positions applied to q and k."""

    def __init__(self, config: ChatGLMConfig, layer_index: int):
        super().__init__()
        self.num_heads, self.layer_index = config.num_attention_heads, layer_index
        self.query_key_value = build_linear(config, config.hidden_size, 3 * config.hidden_size)
        self.dense = build_linear(config, config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        prefix: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        packed: PackedAttention | None = None,
    ) -> Tensor:
        """hidden (B, T, C) to (B, T, C); mask (B, 1, T, S), True where a key may be seen.

        packed: instead of rotary and mask, for sequences side by side in one row.
        """
        mixed = self.query_key_value(hidden)
        if packed is not None:
            return self.dense(packed(mixed, prefix))
        mixed = mixed.unflatten(-1, (self.num_heads, -1))
        q, k, v = mixed.transpose(1, 2).chunk(3, dim=-1)  # each (B, H, T, D)
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if prefix is not None:
            k, v = (
                torch.cat((own_gradient(p), x), dim=2) for p, x in zip(prefix, (k, v), strict=True)
            )
        if cache is not None:
            k, v = cache.update(k, v, self.layer_index)  # (B, H, S, D)
        # Gradient checkpointing comes back here without the caller's choice of kernels.
        with sdpa_kernel(ATTENTION_KERNELS) if torch.is_grad_enabled() else nullcontext():
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.dense(context.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linears around the tanh GELU, no gate."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.dense_h_to_4h = build_linear(config, config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = build_linear(config, config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden), approximate="tanh"))


class ChatGLMBlock(GradientCheckpointingLayer):
    """One layer; both residuals leave after their layer norm, times alpha.

    keeps_halves: what stands between the halves is kept for the backward pass, and all else of each
    is computed again, all but its last product.
    """

    def __init__(self, config: ChatGLMConfig, layer_index: int):
        super().__init__()
        self.alpha = (2 * config.num_layers) ** 0.5
        width, eps = config.hidden_size, config.layernorm_epsilon
        self.input_layernorm = LayerNorm(width, eps=eps)
        self.attention = SelfAttention(config, layer_index)
        self.post_attention_layernorm = LayerNorm(width, eps=eps)
        self.mlp = MLP(config)
        self.keeps_halves = False

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        prefix: tuple[Tensor, Tensor] | None,
        past_key_values: Cache | None,
        packed: PackedAttention | None = None,
    ) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        attend = functools.partial(
            self.attention, rotary=rotary, mask=mask, prefix=prefix, cache=past_key_values,
            packed=packed,
        )  # fmt: skip
        half = self._half
        is_read_once = past_key_values is None and torch.is_grad_enabled()
        if self.keeps_halves and self.training and is_read_once:
            half = functools.partial(checkpoint, self._half, use_reentrant=False)
        hidden = half(hidden, self.input_layernorm, attend)
        return half(hidden, self.post_attention_layernorm, self.mlp)

    def _half(self, hidden: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        if fused.supports(norm, hidden):
            return fused.half_block(hidden, norm, branch, self.alpha)
        normed = norm(hidden)
        return self.alpha * normed + branch(normed)


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to load, place and save the model."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = True


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Embeddings, blocks and the last layer norm: token ids to hidden states."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        config.check()
        if config.quantization_bit and config.quantization_embeddings:
            self.word_embeddings: nn.Module = QuantizedEmbedding(
                config.vocab_size, config.hidden_size, config.quantization_bit
            )
        else:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChatGLMBlock(config, i) for i in range(config.num_layers))
        self.final_layernorm = LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.prefix_encoder = PrefixEncoder(config) if config.pre_seq_len else None
        self.gradient_checkpointing = False
        self.is_fused = True
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.word_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        context_lengths: Tensor | None = None,
        mask_positions: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        packed: Packed | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, C); arguments as in ChatGLMForConditionalGeneration.forward."""
        hidden = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if packed is not None:
            beside = {"attention_mask": attention_mask, "position_ids": position_ids,
                      "past_key_values": past_key_values, "use_cache": use_cache or None,
                      "output_hidden_states": output_hidden_states or None}  # fmt: skip
            given = [name for name, value in beside.items() if value is not None]
            if given:
                raise ToolkitError(f"packed has no {', '.join(given)} beside it: leave it out")
            return BaseModelOutputWithPast(last_hidden_state=self._forward_packed(hidden, packed))
        if use_cache and past_key_values is None:
            past_key_values = KVCache(self.config.num_layers)
        started, offset = self._progress(past_key_values)
        if not isinstance(offset, Tensor):
            self._check_length(offset + hidden.shape[1])
        if context_lengths is None or mask_positions is None:
            found = self._find_context(input_ids, attention_mask, position_ids, started)
            context_lengths = found[0] if context_lengths is None else context_lengths
            mask_positions = found[1] if mask_positions is None else mask_positions
        rotary = rotary_for_positions(
            self._position_rows(
                hidden, attention_mask, position_ids, context_lengths, mask_positions, started
            ),
            max_length=self.config.max_sequence_length,
            head_width=self.config.head_width,
            half=self._computes_in_half(hidden),
        )
        mask = self._mask(attention_mask, context_lengths, hidden.shape[1], offset, past_key_values)
        prefixes = self._prefixes(len(hidden), hidden.dtype, started)
        states = []
        with sdpa_kernel(ATTENTION_KERNELS):
            for block, prefix in zip(self.layers, prefixes, strict=True):
                states.append(hidden)
                hidden = block(hidden, rotary, mask, prefix, past_key_values=past_key_values)
        hidden = self.final_layernorm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*states, hidden) if output_hidden_states else None,
        )

    def _forward_packed(self, hidden: Tensor, packed: Packed) -> Tensor:
        """(1, T, C) of a row of sequences, to the final norm's output."""
        self._check_length(packed.longest)
        if hidden.shape[:2] != (1, len(packed.sequence)):
            raise ToolkitError(
                f"packed is of a row of {len(packed.sequence)} tokens, and the input is of shape"
                f" {list(hidden.shape[:2])}"
            )
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        attention = PackedAttention(
            packed,
            self.config,
            half=self._computes_in_half(hidden),
            dtype=dtype,
            is_fused=self.is_fused,
        )
        prefixes = self._prefixes(len(packed.lengths), dtype, False)
        for block, prefix in zip(self.layers, prefixes, strict=True):
            hidden = block(hidden, None, None, prefix, past_key_values=None, packed=attention)
        return self.final_layernorm(hidden)

    def _progress(self, cache: Cache | None) -> tuple[bool, int | Tensor]:
        """Whether the cache holds tokens already, and how many, virtual ones not counted.

        A static cache counts on the device; its number is not read back.
        """
        if cache is None or not cache.is_initialized:
            return False, 0
        length = cache.get_seq_length()
        if isinstance(length, Tensor) or length == 0:  # 0: reset, with its room kept
            return isinstance(length, Tensor), length
        return True, length - (self.config.pre_seq_len or 0)

    def _prefixes(
        self, rows: int, dtype: torch.dtype, started: bool
    ) -> list[tuple[Tensor, Tensor] | None]:
        """Keys and values of the virtual tokens for each layer, each (B, H, P, D)."""
        if self.prefix_encoder is None or started:
            return [None] * self.config.num_layers
        both = self.prefix_encoder(rows, dtype)  # (2 * layers, B, H, P, D)
        each = both.unbind(0)
        return list(zip(each[0::2], each[1::2], strict=True))

    def _check_length(self, length: int) -> None:
        longest = self.config.max_sequence_length
        if length > longest:
            raise ToolkitError(
                f"a sequence of {length} tokens; this model reads at most max_sequence_length"
                f" {longest}: shorten the prompt or ask for fewer new tokens"
            )

    def _find_context(self, input_ids, attention_mask, position_ids, started):
        if started and (position_ids is None or position_ids.dim() != 3):
            raise ToolkitError(
                "continuing from a cache needs context_lengths and mask_positions, or position_ids"
                " of shape (B, 2, T)"
            )
        if input_ids is None:
            raise ToolkitError("inputs_embeds needs context_lengths and mask_positions beside it")
        if started:  # the context is all behind: what is new is causal
            nothing = input_ids.new_zeros(input_ids.shape[0])
            return nothing, nothing
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = mask_from_released(attention_mask)
        config = self.config
        return find_context(
            input_ids,
            attention_mask,
            bos_token_id=config.bos_token_id,
            gmask_token_id=config.gmask_token_id,
            mask_token_id=config.mask_token_id,
        )

    def _position_rows(
        self, hidden, attention_mask, position_ids, context_lengths, mask_positions, started
    ) -> Tensor:
        if position_ids is not None and position_ids.dim() == 3:
            return position_ids
        if position_ids is None:
            if started:
                raise ToolkitError("continuing from a cache needs position_ids")
            if attention_mask is not None and attention_mask.dim() == 4:
                attention_mask = mask_from_released(attention_mask)
            position_ids = token_index(hidden[..., 0], attention_mask)
        return position_rows(position_ids, context_lengths, mask_positions)

    def _mask(self, attention_mask, context_lengths, num_queries, offset, cache) -> Tensor | None:
        """(B, 1, T, P + S), True where a key may be seen; None where all may."""
        num_virtual = self.config.pre_seq_len or 0
        fixed_size = isinstance(offset, Tensor) or (cache is not None and cache.is_compileable)
        num_keys = (
            offset + num_queries if not fixed_size else cache.get_mask_sizes(num_queries, 0)[0]
        )
        if num_virtual and fixed_size:
            raise ToolkitError(
                "a cache of fixed size has no room for the virtual tokens of p-tuning: leave"
                " cache_implementation unset"
            )
        if attention_mask is not None and attention_mask.dim() == 4:
            mask = ~attention_mask.bool()
        elif num_queries == 1 and attention_mask is None and not fixed_size:
            return None  # the newest token sees everything
        else:
            mask = allowed_keys(
                attention_mask,
                context_lengths,
                num_queries=num_queries,
                num_keys=num_keys,
                offset=offset,
            )
        return F.pad(mask, (num_virtual, 0), value=True)

    def _computes_in_half(self, hidden: Tensor) -> bool:
        if torch.is_autocast_enabled(hidden.device.type):
            return True
        return hidden.dtype != torch.float32


class ChatGLMForConditionalGeneration(
    StrictFilesMixin, ChatGLMPreTrainedModel, GenerationMixin, ChatMixin, PackingMixin
):
    """The model with its head: loss, `generate`, `chat`, `quantize`, strict loading."""

    _tied_weights_keys = {HEAD: EMBEDDING}  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        bits, shape = config.quantization_bit, (config.hidden_size, config.vocab_size)
        if bits and config.quantization_embeddings:
            self.lm_head: nn.Module = QuantizedLinear(*shape, bits, bias=False)
        else:
            self.lm_head = nn.Linear(*shape, bias=False)
        self.post_init()

    def recompute(self, mode: Literal["none", "selective", "full"]) -> None:
        """What the backward pass computes again instead of keeping it.

        selective: what stands between two halves of a block is kept. full: what stands between
        two blocks; as transformers' gradient_checkpointing_enable.
        """
        for block in self.transformer.layers:
            block.keeps_halves = mode == "selective"
        if mode == "full":
            self.gradient_checkpointing_enable({"use_reentrant": False})
        elif self.is_gradient_checkpointing:
            self.gradient_checkpointing_disable()

    def use_fused_kernels(self, wanted: bool) -> None:
        """Whether training goes by the GPU kernels of its own where they run; at first it does."""
        for module in self.modules():
            if isinstance(module, LayerNorm | ChatGLMModel):
                module.is_fused = wanted

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        context_lengths: Tensor | None = None,
        mask_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        loss_only: bool = False,
        num_items_in_batch: Tensor | float | None = None,
        packed: Packed | None = None,
        learned: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and the mean loss if labels are given.

        input_ids (B, T). attention_mask (B, S) with 1 for real tokens, or the released
        (B, 1, T, S) with True where attention is forbidden. position_ids (B, T), the number of
        real tokens before each, or the released two rows (B, 2, T). context_lengths and
        mask_positions (B,): see positions.find_context; searched in input_ids if not given.
        labels (B, T), unshifted, -100 where nothing is learned. logits_to_keep: only the last so
        many positions, 0 for all. hidden_states: what enters each block, then the final norm's
        output. loss_only: the loss in little memory, without logits (loss.chunked_loss).
        num_items_in_batch: what the summed loss is divided by; None: its learned tokens. learned:
        loss.learned_tokens of the labels, if it is known. packed: how several sequences stand in
        the one row of input_ids and labels (1, T); masks, positions and lengths follow from it.

        Raises:
            ToolkitError: past max_sequence_length, or continuing from a cache without positions.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            context_lengths=context_lengths,
            mask_positions=mask_positions,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            packed=packed,
        )
        hidden = outputs.last_hidden_state
        if loss_only:
            assert labels is not None
            learned = learned_tokens(labels) if learned is None else learned
            # ZeRO-3 gathers the head at each call, and every rank must call it equally often.
            chunk = hidden.shape[:2].numel() if hasattr(self.lm_head.weight, "ds_id") else CHUNK
            loss = chunked_loss(
                hidden, learned, self.lm_head, num_items_in_batch, chunk=chunk,
                is_fused=self.transformer.is_fused,
            )  # fmt: skip
            return CausalLMOutputWithPast(loss=loss)
        kept = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        logits = cpu.apply_linear(self.lm_head, kept)
        return CausalLMOutputWithPast(
            loss=None if labels is None else next_token_loss(logits, labels, num_items_in_batch),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def generate(self, inputs=None, *args, **kwargs):
        """transformers' generate, with the context found once and a cache written in place."""
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if input_ids is None:
            raise ToolkitError("generate needs input_ids that end in [gMASK] <sop>")
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            kwargs["attention_mask"] = mask = mask_from_released(mask)
        if mask is None:
            # A prompt can't contain a pad: control tokens are never read out of text.
            kwargs["attention_mask"] = mask = (input_ids != self.config.pad_token_id).long()
        kwargs.pop("position_ids", None)  # follow from the mask and the context
        if "context_lengths" not in kwargs:
            kwargs["context_lengths"], kwargs["mask_positions"] = self.transformer._find_context(
                input_ids, mask, None, False
            )
        return super().generate(input_ids, *args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        plain = generation_config.cache_implementation is None and generation_config.use_cache
        if plain and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = KVCache(self.config.num_layers)
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        """The forward pass builds its own mask from this, static caches included."""
        return attention_mask


class _TokenizerKey(ChatGLMConfig):
    """Key of the tokenizer's registration, which is found by its class name.

    Were ChatGLMConfig itself the key, AutoTokenizer with trust_remote_code=True would prefer the
    dead code that the released folder brings.
    """


AutoTokenizer.register(_TokenizerKey, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)
AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
AutoModel.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
AutoModelForSeq2SeqLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
