"""Samples as batches, packed or padded, in an order that the seed and the epoch alone decide.

Nothing is drawn while batches are made, so a run that was cut off goes on with the batch it would
have had; and the samples of an optimizer step are the same for any number of processes.
A packed batch is one row of the same samples (packed.py), and its loss that of the padded one. Pads
stand on the right: what stands after <eop> is never seen by a real token, so no padding mask is
needed.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .errors import ToolkitError
from .loss import IGNORE, learned_tokens
from .packed import Packed
from .records import RecordFolder
from .strategies import Sample

FILLER = -1
"""Stands for a sample where a process has none left in the last step of an epoch."""


@dataclass(frozen=True)
class Item:
    """One sample of a batch; `tokens_per_batch` is what the batch's summed loss is divided by."""

    index: int
    tokens_per_batch: float


@dataclass(frozen=True)
class Entry:
    """Samples that follow one another and have one weight: an entry of train_file."""

    num_samples: int
    weight: float = 1.0

    @property
    def times(self) -> int:
        """How often each of them comes in an epoch."""
        return math.floor(self.weight)

    @property
    def num_drawn(self) -> int:
        """How many of them, drawn anew, come once more."""
        return round((self.weight - self.times) * self.num_samples)

    @property
    def per_epoch(self) -> int:
        """The samples that an epoch has of them."""
        return self.times * self.num_samples + self.num_drawn


class BatchPlan(Sampler[list[Item]]):
    """The batches of one process (`rank` of `world_size`) in an epoch.

    learned: for every sample of the training set, then of the mixed-in one, its learned tokens.
    entries: of the training set; empty: an epoch has each of its samples once.
    num_mixed: how many samples at the end of `learned` are mixed in; an epoch has all others, by
    their weights, and of these a fresh draw, so that they are `mix_ratio` of it.
    drop_last: leave out what does not fill the last step.

    A loss summed over an optimizer step (`accumulate` batches of every process) and divided by all
    its learned tokens is the same however the step is cut into batches; so tokens_per_batch is
    those tokens over the number of batches, since the gradients of the batches are averaged. The
    last step of an epoch has as many batches as any other; those left without samples get a filler.

    Raises:
        ToolkitError: if an epoch has no step.
    """

    def __init__(
        self,
        learned: np.ndarray,
        *,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        shuffle_seed: int | None = None,
        entries: Sequence[Entry] = (),
        num_mixed: int = 0,
        mix_ratio: float = 0.0,
        drop_last: bool = False,
    ):
        self.learned, self.num_own = learned, len(learned) - num_mixed
        self.num_mixed, self.batch_size, self.accumulate = num_mixed, batch_size, accumulate
        self.rank, self.world_size, self.shuffle_seed = rank, world_size, shuffle_seed
        self.entries = entries or [Entry(self.num_own)]
        assert sum(entry.num_samples for entry in self.entries) == self.num_own
        assert shuffle_seed is not None or not (entries or num_mixed)  # which are drawn
        own = sum(entry.per_epoch for entry in self.entries)
        self.num_drawn = round(own * mix_ratio / (1 - mix_ratio)) if num_mixed else 0
        self.num_samples, step = own + self.num_drawn, batch_size * world_size * accumulate
        whole, rest = divmod(self.num_samples, step)
        self.num_left_out = rest if drop_last else 0
        self.num_steps = whole if drop_last or not rest else whole + 1
        self.epoch, self.start_batch = 0, 0
        if entries and not own:
            raise ToolkitError("train_file_weights leave no sample to an epoch: raise them")
        if drop_last and not whole:
            raise ToolkitError(
                f"drop_last leaves nothing of the {self.num_samples:,} samples of an epoch: a step"
                f" takes {step:,} (train_batch_size {batch_size} x gradient_accumulation_steps"
                f" {accumulate} x {world_size} devices); make it smaller or leave drop_last off"
            )

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_steps * self.accumulate

    def order(self) -> np.ndarray:
        """The sample indices of this epoch, those that drop_last leaves out at the end."""
        if self.shuffle_seed is None:
            return np.arange(self.num_own)
        generator = np.random.default_rng((self.shuffle_seed, self.epoch))
        drawn = generator.choice(
            self.num_mixed, self.num_drawn, replace=self.num_drawn > self.num_mixed
        ) if self.num_drawn else np.empty(0, dtype=int)  # fmt: skip
        return generator.permutation(np.concatenate([self._own(generator), drawn + self.num_own]))

    def _own(self, generator: np.random.Generator) -> np.ndarray:
        """The samples of the training set, each as often as its weight says."""
        parts, first = [], 0
        for entry in self.entries:
            samples = np.arange(first, first + entry.num_samples)
            parts += [samples] * entry.times
            if entry.num_drawn:
                parts.append(generator.choice(samples, entry.num_drawn, replace=False))
            first += entry.num_samples
        return np.concatenate(parts)

    def __iter__(self) -> Iterator[list[Item]]:
        order, together = self.order(), self.batch_size * self.world_size
        start, self.start_batch = self.start_batch, 0  # the next epoch starts at its beginning
        for number in range(start, len(self)):
            first = number - number % self.accumulate
            step = order[first * together : (first + self.accumulate) * together]
            tokens = self.learned[step].sum() / (self.accumulate * self.world_size)
            batch = order[number * together : (number + 1) * together]
            own = np.array_split(batch, self.world_size)[self.rank].tolist()
            yield [Item(index, float(tokens)) for index in own or [FILLER]]


class SampleDataset(Dataset):
    """The samples that a plan names, out of one record folder or of two, one after the other."""

    def __init__(self, *records: RecordFolder):
        self.records = records

    def __getitem__(self, items: list[Item]):
        return [(item, self._sample(max(item.index, 0))) for item in items]

    def _sample(self, index: int) -> Sample:
        for records in self.records:
            if index < len(records):
                return records[index]
            index -= len(records)
        raise IndexError(index)


_INPUTS = ("input_ids", "labels", "context_lengths", "mask_positions", "packed", "learned")


def model_inputs(batch: dict[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """What the model takes of a batch; on the device, if one is given."""

    def moved(value: Any) -> Any:
        return tuple(map(moved, value)) if isinstance(value, tuple) else value.to(device)

    inputs = {name: batch[name] for name in _INPUTS if name in batch}
    return inputs if device is None else {name: moved(value) for name, value in inputs.items()}


def collate(items, *, pad_token_id: int, packing: bool = False) -> dict[str, Any]:
    """A batch of (item, sample).

    input_ids and labels (B, T): -100 up to and including <sop>, and on pads. context_lengths and
    mask_positions (B,): the [gMASK] is the last context token. packing: instead, input_ids and
    labels (1, T) of one row without pads, and how it is packed. learned: loss.learned_tokens.
    sample_index (B,). num_tokens and learned_tokens (), pads not counted. num_items_in_batch, a
    number: see BatchPlan.
    """
    batch = _packed(items) if packing else _padded(items, pad_token_id)
    learned = learned_tokens(batch["labels"])
    return batch | {
        "learned": learned,
        "sample_index": torch.tensor([item.index for item, _ in items]),
        "num_tokens": torch.tensor(sum(len(sample.input_ids) for _, sample in items)),
        "learned_tokens": torch.tensor(len(learned[0])),
        "num_items_in_batch": items[0][0].tokens_per_batch,
    }


def _padded(items, pad_token_id: int) -> dict[str, Any]:
    longest = max(len(sample.input_ids) for _, sample in items)
    input_ids = torch.full((len(items), longest), pad_token_id, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORE)
    for row, (item, sample) in enumerate(items):
        length = len(sample.input_ids)
        input_ids[row, :length] = torch.tensor(sample.input_ids)
        labels[row, :length] = torch.tensor(_labels(item, sample))
    context_lengths = torch.tensor([sample.context_length for _, sample in items])
    return {
        "input_ids": input_ids,
        "labels": labels,
        "context_lengths": context_lengths,
        "mask_positions": context_lengths - 1,
    }


def _packed(items) -> dict[str, Any]:
    samples = [sample for _, sample in items]
    packed = Packed.of(
        [sample.context_length for sample in samples], [len(s.input_ids) for s in samples]
    )
    return {
        "input_ids": packed.row([sample.input_ids for sample in samples])[None],
        "labels": packed.row([_labels(item, sample) for item, sample in items])[None],
        "packed": packed,
    }


def _labels(item: Item, sample: Sample) -> np.ndarray:
    labels = np.array(sample.input_ids, dtype=np.int64)
    labels[: None if item.index == FILLER else sample.context_length + 1] = IGNORE
    return labels


def build_loader(
    dataset: SampleDataset, plan: BatchPlan, *, pad_token_id: int, packing: bool = False
) -> DataLoader:
    """The plan's batches."""
    return DataLoader(
        dataset,
        batch_size=None,  # the plan gives whole batches
        sampler=plan,
        collate_fn=lambda items: collate(items, pad_token_id=pad_token_id, packing=packing),
    )


def longest_batch(
    dataset: SampleDataset,
    tokens: np.ndarray,
    *,
    batch_size: int,
    pad_token_id: int,
    packing: bool = False,
) -> dict[str, Any]:
    """The batch that takes the most memory: the `batch_size` longest samples."""
    longest = np.argsort(-tokens, kind="stable")[:batch_size].tolist()
    items = dataset[[Item(index, 1.0) for index in longest]]
    return collate(items, pad_token_id=pad_token_id, packing=packing)
