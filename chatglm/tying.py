"""Head and embedding: two tensors in every file, one in memory where they are equal.

They are equal in the pretrained weights, 1.07 GB each in fp16. What only reads them, chat and the
training of adapters, can do with one. Full training as the released code does it moves them apart,
unless `tie_word_embeddings` makes them one parameter, which is transformers' own doing.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

HEAD, EMBEDDING = "lm_head.weight", "transformer.word_embeddings.weight"
ROWS_COMPARED = 8192
"""At once: on a GPU a comparison writes a byte for each value."""


def is_shared(model: Any) -> bool:
    """True if head and embedding are one tensor."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def share_head(model: Any) -> bool:
    """Let the embedding be the head too where both are equal; True if it is."""
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if head is not embedding and _equal(head, embedding):
        model.get_output_embeddings().weight = embedding
    return is_shared(model)


def _equal(head: Tensor, embedding: Tensor) -> bool:
    if head.dtype != embedding.dtype or head.shape != embedding.shape:
        return False
    if not head.is_floating_point():  # packed ones stay two: a quarter of the memory is at stake
        return False
    bits = torch.int16 if head.element_size() == 2 else torch.int32  # a fifth of fp16's time
    parts = zip(head.split(ROWS_COMPARED), embedding.split(ROWS_COMPARED), strict=True)
    return all(torch.equal(one.view(bits), other.view(bits)) for one, other in parts)


def part_head(model: Any) -> None:
    """Give the head a tensor of its own, of the same values; below an adapter too."""
    head = _below_adapters(model.get_output_embeddings())
    weight = head.weight
    head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def _below_adapters(head: Any) -> Any:
    """The linear itself."""
    return getattr(head, "base_layer", head)


@contextlib.contextmanager
def parted_head(model: Any) -> Iterator[None]:
    """While it lasts, a shared head is a copy: safetensors writes no tensor under two names."""
    head, shared = _below_adapters(model.get_output_embeddings()), is_shared(model)
    weight = head.weight
    if shared:
        head.weight = nn.Parameter(weight.detach().to("cpu", copy=True), requires_grad=False)
    try:
        yield
    finally:
        if shared:
            head.weight = weight


def parted_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same state dict, the head a copy if it is the embedding's memory."""
    head, embedding = state.get(HEAD), state.get(EMBEDDING)
    if head is None or embedding is None or head.data_ptr() != embedding.data_ptr():
        return state
    return {**state, HEAD: head.to("cpu", copy=True)}
