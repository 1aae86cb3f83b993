"""Samples as padded batches for training.

Pads stand on the right: what stands after <eop> is never seen by a real token, so no padding mask
is needed.
"""

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .loss import IGNORE
from .records import RecordFile


class SampleDataset(Dataset):
    """Indexed samples of a record file."""

    def __init__(self, records: RecordFile):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int):
        return index, self.records[index]


def collate(items, *, pad_token_id: int) -> dict[str, Tensor]:
    """A batch of (index, sample).

    input_ids and labels (B, T): -100 up to and including <sop>, and on pads. context_lengths and
    mask_positions (B,): the [gMASK] is the last context token. sample_index (B,). num_tokens (),
    pads not counted.
    """
    longest = max(len(sample.input_ids) for _, sample in items)
    input_ids = torch.full((len(items), longest), pad_token_id, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORE)
    for row, (_, sample) in enumerate(items):
        ids = torch.tensor(sample.input_ids)
        input_ids[row, : len(ids)] = ids
        learned_from = sample.context_length + 1
        labels[row, learned_from : len(ids)] = ids[learned_from:]
    context_lengths = torch.tensor([sample.context_length for _, sample in items])
    return {
        "input_ids": input_ids,
        "labels": labels,
        "context_lengths": context_lengths,
        "mask_positions": context_lengths - 1,
        "sample_index": torch.tensor([index for index, _ in items]),
        "num_tokens": torch.tensor(sum(len(sample.input_ids) for _, sample in items)),
    }


def build_loader(
    records: RecordFile, *, batch_size: int, pad_token_id: int, shuffle_seed: int | None
) -> DataLoader:
    """Batches in random order from a seed, or in file order when it is None."""
    generator = None
    if shuffle_seed is not None:
        generator = torch.Generator().manual_seed(shuffle_seed)
    return DataLoader(
        SampleDataset(records),
        batch_size=batch_size,
        shuffle=shuffle_seed is not None,
        generator=generator,
        collate_fn=lambda items: collate(items, pad_token_id=pad_token_id),
    )
