"""One decoding step as a CUDA graph: a token for each row, with nothing for the host to do.

    sample     the token, its embedding, and the counts
    28 times   norm + query_key_value, attention over the cache, dense + residual,
               norm + dense_h_to_4h + GELU, dense_4h_to_h + residual
    head       norm + scores

Every number that changes from step to step stands on the GPU, so that a step is captured once and
replayed. Rows are as long as they are: the cache of each is filled from its beginning, and no key
of a pad is ever read. Models that this can't be done with (supported.py) have the plain loop in
decoding.py.
"""

import contextlib
import functools
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .capture import capture
from .errors import ToolkitError
from .kernels import ops, passes, products
from .positions import find_context
from .prefill import read_prompts
from .quantization.linear import QuantizedLinear
from .rotary import rotary_tables
from .sampling import GUARD_TOKEN, Sampling
from .step_cache import StepCache
from .supported import adapters_of, stored_linear

ROOM_STEP = 512
"""Room of a cache comes in steps of so many tokens; a graph is captured for each."""
NORM_ROWS = 8
"""Rows up to which a layer norm is part of the product after it."""
LIBRARY_ROWS = 8
"""Rows beyond which half-precision weights are multiplied by the library."""
POLL_SECONDS = 5e-5
SECONDS_BETWEEN_CHECKS = 1.0
KEPT_BYTES = 2 << 30
"""Of caches that stay for the next answer, those used last; the newest stays in any case."""


@dataclass
class Counts:
    """What a step goes by, of each row, int32 on the GPU. See ops.attention."""

    lengths: Tensor
    text_positions: Tensor
    first_blocks: Tensor
    steps: Tensor

    @classmethod
    def zeros(cls, rows: int, device: torch.device) -> "Counts":
        """For rows that have no prompt yet."""
        return cls(*(torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(4)))


class CapturedStep:
    """Buffers and graph of a step for `rows` rows with `room` tokens each, prompts included.

    A row is a sequence, and one token of it is read in a step; `sequences`: fewer of them, where
    several rows are tokens of one. `history` (room, rows) int32 is memory of the host that the GPU
    writes to: a step's tokens appear there, and UNWRITTEN until then.
    """

    UNWRITTEN = -1
    is_ring = False
    """See ops.sample."""
    table: Tensor | None = None
    """The rows' pages, where the cache is in pages; see ops.attention."""

    def __init__(
        self,
        model: Any,
        *,
        rows: int,
        room: int,
        cache_bits: int = 16,
        sequences: int | None = None,
    ):
        config, device, dtype = model.config, model.device, model.transformer.dtype
        self._model = weakref.ref(model)  # or steps that are kept would keep it
        self._on_device = functools.partial(torch.cuda.device, device)
        self.rows, self.room = rows, room
        self.sequences = rows if sequences is None else sequences
        heads, width = config.num_attention_heads, config.hidden_size
        self.cache: Any = self._make_cache(model, cache_bits)
        self.counts = Counts.zeros(rows, device)
        self.workspace = ops.AttentionWorkspace(rows, heads, device)
        positions = config.max_sequence_length + rows  # drafts may go past the end
        self.rotary = rotary_tables(positions, config.head_width // 2, half=True, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.int32, device=device)
        self.history = torch.full((room, rows), self.UNWRITTEN, dtype=torch.int32).pin_memory()
        self.draw = ops.Draw(
            seeds=torch.zeros(rows, 2, dtype=torch.int32, device=device),
            top_k=torch.ones(rows, dtype=torch.int32, device=device),
            rules=torch.ones(rows, 3, device=device),
            seen=torch.zeros(rows, config.vocab_size // 32, dtype=torch.int32, device=device),
        )
        self.hidden, self.normed, self.context = (
            torch.zeros(rows, width, dtype=dtype, device=device) for _ in range(3)
        )
        self.mixed = torch.empty(rows, 3 * width, dtype=dtype, device=device)
        self.inner = torch.empty(rows, config.inner_hidden_size, dtype=dtype, device=device)
        self.scores = torch.zeros(rows, config.vocab_size, dtype=dtype, device=device)
        self._norms_within = self._norm_fits(rows)
        self._adds_in_norm = passes.supports_norm(self.hidden, model.transformer.final_layernorm)
        self._unadded = 0.0
        """So many times the last normed vector are to be added to hidden before its next norm."""
        self.graph: torch.cuda.CUDAGraph | None = None

    def _norm_fits(self, rows: int) -> bool:
        width, device = self.hidden.shape[1], self.tokens.device
        return rows <= NORM_ROWS and products.supports_norm(rows, width, device)

    def _make_cache(self, model: Any, bits: int) -> Any:
        return StepCache(model, rows=self.sequences, room=self.room, bits=bits)

    @property
    def model(self) -> Any:
        """Whose step it is."""
        return self._model()

    @property
    def nbytes(self) -> int:
        """Of the cache, which is most of what a step keeps."""
        return self.cache.nbytes

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Read the prompts (B, T), padded on the right; scores are those of the first tokens."""
        with self._on_device():
            self._prefill(input_ids, attention_mask)

    def _prefill(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        model, config = self.model, self.model.config
        torch.cuda.current_stream().synchronize()  # steps told for an answer that was broken off
        self.history.fill_(self.UNWRITTEN)
        context, mask_positions = find_context(
            input_ids,
            attention_mask,
            bos_token_id=config.bos_token_id,
            gmask_token_id=config.gmask_token_id,
            mask_token_id=config.mask_token_id,
        )
        lengths = torch.full_like(context, input_ids.shape[1])
        if attention_mask is not None:
            lengths = attention_mask.sum(dim=1)
        hidden = read_prompts(
            model,
            input_ids,
            attention_mask,
            self.cache,
            self.rotary,
            context_lengths=context,
            mask_positions=mask_positions,
        )
        scores = model.lm_head(hidden)
        self.scores[: self.sequences].copy_(scores)
        virtual = config.pre_seq_len or 0
        self.counts.lengths.copy_(virtual + lengths - 1)  # the sampling of the first token adds 1
        self.counts.text_positions.copy_(mask_positions)
        self.counts.first_blocks.copy_(virtual + context - 1)
        self.counts.steps.zero_()

    def set_rules(self, sampling: Sampling, *, seed: int, so_far: Tensor) -> None:
        """How tokens are drawn; so_far (B, T): those that a repetition penalty holds against."""
        draw, device = self.draw, self.tokens.device
        draw.top_k.fill_(sampling.top_k if sampling.do_sample else 1)
        temperature = sampling.temperature if sampling.do_sample else 1.0
        rules = (sampling.top_p, 1 / temperature, sampling.repetition_penalty)
        draw.rules.copy_(torch.tensor(rules, device=device).expand(self.rows, 3))
        # The row's number is the stream: rows of one seed draw apart.
        draw.seeds.copy_(seed_words([(seed, row) for row in range(self.rows)]))
        draw.seen.zero_()
        if sampling.repetition_penalty != 1.0:
            draw.seen.copy_(token_bits(so_far, draw.seen.shape[1]))

    def first_token(self) -> None:
        """Choose a token of each row from the prompts' scores."""
        with self._on_device():
            self._sample()

    def next_token(self) -> None:
        """Replay the step, which is captured the first time."""
        with self._on_device():
            if self.graph is None:
                self.graph = self._capture()
            self.graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize()  # history is the host's: the first tokens may be on their way
        kept = [tensor.clone() for tensor in self._changing()]
        graph = capture(self._step)
        for tensor, before in zip(self._changing(), kept, strict=True):
            tensor.copy_(before)
        return graph

    def _changing(self) -> list[Tensor]:
        counts = self.counts
        return [
            counts.lengths,
            counts.steps,
            self.tokens,
            self.hidden,
            self.draw.seen,
            self.history,
        ]

    def wait_for(self, number: int) -> Tensor:
        """The tokens (rows,) in line `number` of the history, once they are there."""
        tokens = self.history[number]
        checked = time.monotonic()
        while (tokens == self.UNWRITTEN).any():
            time.sleep(POLL_SECONDS)
            if time.monotonic() - checked > SECONDS_BETWEEN_CHECKS:
                with self._on_device():
                    torch.cuda.current_stream().query()  # raises what went wrong on the GPU
                checked = time.monotonic()
        return tokens.long()

    def attend(self, number: int, mixed: Tensor, *, keys_are_new: bool = False) -> Tensor:
        """In a layer, (rows, H D) of the rows' query, key and value (rows, 3 H D).

        keys_are_new: see ops.attention.
        """
        keys, values, scales = self.cache.layer(number)
        return ops.attention(
            mixed,
            keys,
            values,
            self.rotary,
            lengths=self.counts.lengths,
            text_positions=self.counts.text_positions,
            first_blocks=self.counts.first_blocks,
            workspace=self.workspace,
            out=self.context,
            scales=scales,
            pages=self.table,
            keys_are_new=keys_are_new,
        )

    def _step(self) -> None:
        layers = self.model.transformer.layers
        for index, layer in enumerate(layers):
            attention, mlp = layer.attention, layer.mlp
            self._product(
                self.hidden, attention.query_key_value, self.mixed, norm=layer.input_layernorm
            )
            context = self.attend(index, self.mixed)
            self._product(context, attention.dense, self.hidden, alpha=layer.alpha)
            self._product(
                self.hidden,
                mlp.dense_h_to_4h,
                self.inner,
                gelu=True,
                norm=layer.post_attention_layernorm,
            )
            self._product(self.inner, mlp.dense_4h_to_h, self.hidden, alpha=layer.alpha)
        self._product(
            self.hidden,
            self.model.lm_head,
            self.scores,
            norm=self.model.transformer.final_layernorm,
        )
        self._sample()

    def _product(
        self,
        x: Tensor,
        linear: nn.Linear,
        out: Tensor,
        *,
        norm: nn.LayerNorm | None = None,
        gelu: bool = False,
        alpha: float | None = None,
    ) -> None:
        """out = what the linear makes of x, with what stands before and after it.

        alpha: so many times the last normed vector is added.
        """
        scale = linear.weight_scale if isinstance(linear, QuantizedLinear) else None
        most_rows = LIBRARY_ROWS if scale is None else products.MOST_ROWS
        if stored_linear(linear) is not linear or self.rows > most_rows:  # it has adapters, or
            self._library_product(x, linear, out, norm=norm, gelu=gelu, alpha=alpha)
            return
        if norm is not None and (not self._norms_within or self._unadded):
            x, norm = self._normalise(x, norm), None
        products.linear(
            x,
            linear.weight,
            scale=scale,
            bias=linear.bias,
            norm=products.Norm(norm.weight, norm.bias, norm.eps) if norm is not None else None,
            normed=self.normed if norm is not None else None,
            gelu=gelu,
            residual=self.normed if alpha is not None else None,
            alpha=alpha or 1.0,
            out=out,
        )

    def _library_product(self, x, linear, out, *, norm, gelu, alpha) -> None:
        if norm is not None:
            x = self._normalise(x, norm)
        is_plain, has_bias = type(linear) is nn.Linear, linear.bias is not None
        if is_plain and has_bias and gelu:
            products.library_gelu(x, linear, out=out)
            gelu = False
        elif is_plain and has_bias:
            torch.addmm(linear.bias, x, linear.weight.T, out=out)
        elif is_plain:
            torch.mm(x, linear.weight.T, out=out)
        else:
            out.copy_(linear(x))
        if gelu:
            torch.ops.aten.gelu.out(out, approximate="tanh", out=out)
        if alpha is not None and self._adds_in_norm:
            self._unadded = alpha
        elif alpha is not None:
            out.add_(self.normed, alpha=alpha)

    def _normalise(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        if not self._adds_in_norm:
            return self.normed.copy_(norm(x))
        alpha, self._unadded = self._unadded, 0.0
        residual = self.normed if alpha else None
        return passes.layer_norm(x, norm, residual=residual, alpha=alpha, out=self.normed)

    def _sample(self) -> None:
        ops.sample(
            self.scores,
            self.draw,
            tokens=self.tokens,
            lengths=self.counts.lengths,
            steps=self.counts.steps,
            history=self.history,
            embedding=self.model.transformer.word_embeddings.weight,
            hidden=self.hidden,
            guard_token=GUARD_TOKEN,
            is_ring=self.is_ring,
        )


_STEPS: weakref.WeakKeyDictionary[Any, OrderedDict] = weakref.WeakKeyDictionary()
"""Captured steps of each model that no answer is using, the one used last at the end."""


@contextlib.contextmanager
def lent_step(
    model: Any,
    *,
    rows: int,
    room: int,
    cache_bits: int = 16,
    kind: type[CapturedStep] = CapturedStep,
) -> Iterator[Any]:
    """The step for so many rows and at least so much room, for one answer; kept for the next.

    Made anew when a weight of the model stands elsewhere than when it was captured, or another
    adapter is in use.

    Raises:
        ToolkitError: for more room than the model has positions.
    """
    longest = model.config.max_sequence_length + (model.config.pre_seq_len or 0)
    if room > longest:
        raise ToolkitError(
            f"prompt and answer of {room} tokens; this model reads at most {longest}: shorten the"
            " prompt or ask for fewer new tokens"
        )
    room = min(-(-room // ROOM_STEP) * ROOM_STEP, -(-longest // 64) * 64)
    kept = _STEPS.setdefault(model, OrderedDict())
    state = (tuple(weight.data_ptr() for weight in model.parameters()), adapters_of(model))
    key = (kind, rows, room, cache_bits, state)
    for old in [old for old in kept if old[-1] != state]:
        del kept[old]
    step = kept.pop(key, None)
    if step is None:
        _forget_oldest(kept)
        step = kind(model, rows=rows, room=room, cache_bits=cache_bits)
    try:
        yield step
    finally:
        _forget_oldest(kept)
        kept[key] = step


def _forget_oldest(kept: OrderedDict) -> None:
    while kept and sum(step.nbytes for step in kept.values()) > KEPT_BYTES:
        kept.popitem(last=False)


def forget_steps() -> None:
    """Free the caches and graphs of all models."""
    _STEPS.clear()


def seed_words(pairs: list[tuple[int, int]]) -> Tensor:
    """(B, 2) int32 of seeds and streams, each 32 bits of any sign."""
    words = torch.tensor(pairs, dtype=torch.int64) % 2**32
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def token_bits(token_ids: Tensor, words: int) -> Tensor:
    """(B, words) int32 with a bit set for each of token_ids (B, T)."""
    marks = torch.zeros(len(token_ids), words * 32, dtype=torch.int64, device=token_ids.device)
    marks.scatter_(1, token_ids.clamp(max=words * 32 - 1), 1)
    powers = 2 ** torch.arange(32, device=token_ids.device)
    sums = (marks.view(len(token_ids), words, 32) * powers).sum(dim=-1)
    return torch.where(sums >= 2**31, sums - 2**32, sums).to(torch.int32)
