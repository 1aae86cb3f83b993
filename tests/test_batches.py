"""Padded batches: what is learned, in which order, and that neither pads nor the cut matter."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatglm.batches import (
    FILLER,
    BatchPlan,
    Entry,
    Item,
    SampleDataset,
    build_loader,
    collate,
    longest_batch,
    model_inputs,
)
from chatglm.configuration import ChatGLMConfig
from chatglm.errors import ToolkitError
from chatglm.model import ChatGLMForConditionalGeneration
from chatglm.records import RecordFolder
from chatglm.strategies import Sample, SpecialTokens, truncate

from .tiny_records import write_folder

PAD, GMASK, SOP, EOP = 3, 6, 7, 8
LENGTHS = ((4, 3), (0, 5), (9, 1), (2, 8), (1, 2), (3, 9), (5, 1), (2, 4), (7, 6), (1, 1), (0, 7))
INPUTS = ("input_ids", "labels", "context_lengths", "mask_positions")


def sample(prompt, answer):
    return truncate(
        [10 + i for i in range(prompt)],
        [40 + i for i in range(answer)],
        SpecialTokens(GMASK, SOP, EOP),
        max_seq_length=64,
        ensure_answer_min_length=1,
    )


SAMPLES = [sample(*lengths) for lengths in LENGTHS]
LEARNED = np.array([len(one.input_ids) - one.context_length - 1 for one in SAMPLES])
ITEMS = [(Item(index, 1.0), one) for index, one in enumerate(SAMPLES[:4])]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ChatGLMConfig(
        vocab_size=64, hidden_size=32, inner_hidden_size=64, num_layers=2, num_attention_heads=4,
        max_sequence_length=64, bos_token_id=SOP, eos_token_id=EOP, mask_token_id=4,
        gmask_token_id=GMASK, pad_token_id=PAD, initializer_range=0.3,
    )  # fmt: skip
    return ChatGLMForConditionalGeneration(config).eval()


def loss(model, items):
    batch = collate(items, pad_token_id=PAD)
    with torch.no_grad():
        return model(**{name: batch[name] for name in INPUTS}, use_cache=False).loss


def plan(number, **options):
    return BatchPlan(np.ones(number, dtype=int), **{"shuffle_seed": 0, **options})


def indices(batches):
    return [[item.index for item in batch] for batch in batches]


def together(number, *, world_size, **options):
    """The batches of all processes, one list of sample indices for each number of batch."""
    ranks = [
        indices(plan(number, rank=rank, world_size=world_size, **options))
        for rank in range(world_size)
    ]
    return [
        [index for rank in same for index in rank if index != FILLER]
        for same in zip(*ranks, strict=True)
    ]


# What a batch holds.


def test_nothing_is_learned_up_to_sop_nor_on_pads():
    batch = collate(ITEMS, pad_token_id=PAD)
    for ids, labels, (_, one) in zip(batch["input_ids"], batch["labels"], ITEMS, strict=True):
        length, first = len(one.input_ids), one.context_length + 1
        assert ids[first - 1] == SOP and ids[one.context_length - 1] == GMASK
        assert (labels[:first] == -100).all() and (labels[length:] == -100).all()
        assert labels[first:length].tolist() == one.input_ids[first:].tolist()
        assert ids[:length].tolist() == one.input_ids.tolist() and (ids[length:] == PAD).all()


def test_positions_indices_and_counts_are_those_of_the_samples():
    batch = collate(ITEMS, pad_token_id=PAD)
    assert batch["context_lengths"].tolist() == [one.context_length for _, one in ITEMS]
    found = batch["input_ids"].gather(1, batch["mask_positions"][:, None])
    assert (found == GMASK).all()
    assert batch["sample_index"].tolist() == [0, 1, 2, 3]
    assert int(batch["num_tokens"]) == sum(len(one.input_ids) for _, one in ITEMS)
    assert int(batch["learned_tokens"]) == LEARNED[:4].sum()
    items = [(Item(2, 7.5), SAMPLES[2]), (Item(0, 7.5), SAMPLES[0])]
    assert float(collate(items, pad_token_id=PAD)["num_items_in_batch"]) == 7.5


def test_the_loss_of_a_padded_batch_is_the_token_weighted_mean_of_its_samples(model):
    weights = torch.tensor(LEARNED[:4], dtype=torch.float32)
    alone = torch.stack([loss(model, [item]) for item in ITEMS])
    expected = (weights * alone).sum() / weights.sum()
    torch.testing.assert_close(loss(model, ITEMS), expected, atol=1e-5, rtol=0)


def test_an_answer_may_hold_the_pad_id():
    odd = [(Item(0, 1.0), Sample([10, GMASK, SOP, PAD, EOP], 2))]
    assert collate(odd, pad_token_id=PAD)["labels"].tolist() == [[-100, -100, -100, PAD, EOP]]


def test_a_filler_is_read_but_not_learned():
    batch = collate(SampleDataset(SAMPLES)[[Item(FILLER, 5.0)]], pad_token_id=PAD)
    assert batch["input_ids"].tolist() == [SAMPLES[0].input_ids.tolist()]
    assert (batch["labels"] == -100).all() and int(batch["learned_tokens"]) == 0
    assert batch["sample_index"].tolist() == [FILLER]


def test_the_longest_batch_has_the_longest_samples():
    tokens = np.array([len(one.input_ids) for one in SAMPLES])
    batch = longest_batch(SampleDataset(SAMPLES), tokens, batch_size=3, pad_token_id=PAD)
    expected = sorted(range(len(SAMPLES)), key=lambda index: -tokens[index])[:3]
    assert sorted(batch["sample_index"].tolist()) == sorted(expected)
    assert batch["input_ids"].shape == (3, tokens.max())


# Which samples come when.


sizes = {
    "number": st.integers(1, 40),
    "batch_size": st.integers(1, 5),
    "world_size": st.integers(1, 4),
    "accumulate": st.integers(1, 3),
    "shuffle_seed": st.none() | st.integers(0, 2**32 - 1),
}


@given(**sizes)
def test_every_sample_comes_once_an_epoch_whatever_the_sizes(number, **options):
    batches = together(number, **options)
    assert sorted(index for batch in batches for index in batch) == list(range(number))
    assert len(batches) == len(plan(number, **options))


@given(**sizes)
def test_a_process_without_a_sample_has_one_filler_and_none_has_more_than_a_batch(
    number, **options
):
    for rank in range(options["world_size"]):
        for batch in indices(plan(number, rank=rank, **options)):
            assert 1 <= len(batch) <= options["batch_size"]
            assert batch == [FILLER] or FILLER not in batch


@given(**sizes, epoch=st.integers(0, 9))
def test_the_order_follows_from_seed_and_epoch_alone(number, shuffle_seed, epoch, **sizes_of_step):
    plain = plan(number, batch_size=1, shuffle_seed=shuffle_seed)
    split = plan(number, shuffle_seed=shuffle_seed, **sizes_of_step)
    list(split)  # an epoch gone through leaves nothing behind
    plain.set_epoch(epoch)
    split.set_epoch(epoch)
    assert plain.order().tolist() == split.order().tolist()
    assert [index for batch in indices(plain) for index in batch] == plain.order().tolist()


def test_another_seed_and_another_epoch_give_another_order():
    orders = []
    for seed in (1, 2):
        for epoch in (0, 1):
            one = plan(20, batch_size=3, shuffle_seed=seed)
            one.set_epoch(epoch)
            orders.append(tuple(one.order().tolist()))
    assert len(set(orders)) == 4
    assert plan(20, batch_size=3, shuffle_seed=None).order().tolist() == list(range(20))


LAYOUTS = (
    {"world_size": 1, "batch_size": 8, "accumulate": 1},
    {"world_size": 2, "batch_size": 4, "accumulate": 1},
    {"world_size": 1, "batch_size": 4, "accumulate": 2},
    {"world_size": 4, "batch_size": 1, "accumulate": 2},
)


def steps(batches, accumulate):
    """The samples of each optimizer step."""
    return [
        sorted(index for batch in batches[start : start + accumulate] for index in batch)
        for start in range(0, len(batches), accumulate)
    ]


@given(number=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_an_optimizer_step_has_the_same_samples_however_it_is_cut(number, seed):
    first, *others = (
        steps(together(number, shuffle_seed=seed, **layout), layout["accumulate"])
        for layout in LAYOUTS
    )
    assert all(other == first for other in others)
    assert [len(step) for step in first[:-1]] == [8] * (len(first) - 1)


def step_gradient(model, layout, *, step, packing=False):
    """What the optimizer sees: Lightning's and DDP's mean over the batches of an optimizer step."""
    model = copy.deepcopy(model)
    world_size, accumulate = layout["world_size"], layout["accumulate"]
    for rank in range(world_size):
        one = BatchPlan(LEARNED, rank=rank, shuffle_seed=0, **layout)
        loader = build_loader(SampleDataset(SAMPLES), one, pad_token_id=PAD, packing=packing)
        for batch in list(loader)[step * accumulate : (step + 1) * accumulate]:
            items = batch["num_items_in_batch"]
            inputs = model_inputs(batch)
            loss = model(**inputs, num_items_in_batch=items, use_cache=False, loss_only=True).loss
            (loss / (accumulate * world_size)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("step", [0, 1], ids=["whole", "last"])
def test_the_gradient_of_an_optimizer_step_is_the_same_however_it_is_cut(model, step, packing):
    whole = copy.deepcopy(model)
    chosen = BatchPlan(LEARNED, batch_size=8, shuffle_seed=0).order()[8 * step : 8 * step + 8]
    batch = collate([(Item(i, 1.0), SAMPLES[i]) for i in chosen.tolist()], pad_token_id=PAD)
    whole(**{name: batch[name] for name in INPUTS}, use_cache=False).loss.backward()
    for layout in LAYOUTS:
        found = step_gradient(model, layout, step=step, packing=packing)
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-5)


@given(**sizes, start=st.integers(0, 50))
def test_a_plan_goes_on_at_a_batch_and_is_whole_in_the_next_epoch(number, start, **options):
    one = plan(number, **options)
    whole = list(one)
    one.start_batch = start = min(start, len(whole))
    assert list(one) == whole[start:]
    assert list(one) == whole


# Weights.


def of_entries(entries, **options):
    return plan(sum(entry.num_samples for entry in entries), entries=entries, **options)


def times_each(one, number):
    """How often each sample comes in the epoch of a plan."""
    found = [index for batch in indices(one) for index in batch if index != FILLER]
    return np.bincount(found, minlength=number)


weighted = {
    "entries": st.lists(
        st.builds(Entry, st.integers(1, 20), st.floats(0.05, 4.0)), min_size=1, max_size=4
    ).filter(lambda entries: sum(entry.per_epoch for entry in entries)),
    "batch_size": st.integers(1, 5),
    "accumulate": st.integers(1, 3),
    "shuffle_seed": st.integers(0, 2**32 - 1),
}


@given(**weighted, world_size=st.integers(1, 4), epoch=st.integers(0, 9))
def test_a_weight_says_how_often_a_sample_comes_whatever_the_sizes(
    entries, world_size, epoch, **options
):
    times = 0
    for rank in range(world_size):
        one = of_entries(entries, rank=rank, world_size=world_size, **options)
        one.set_epoch(epoch)
        times += times_each(one, one.num_own)
    first = 0
    for entry in entries:
        own = times[first : first + entry.num_samples]
        assert set(own.tolist()) <= {math.floor(entry.weight), math.floor(entry.weight) + 1}
        assert abs(own.sum() - entry.weight * entry.num_samples) <= 0.5 + 1e-9
        assert own.sum() == entry.per_epoch
        first += entry.num_samples


@given(
    number=st.integers(1, 60),
    num_mixed=st.integers(0, 20),
    epoch=st.integers(0, 9),
    shuffle_seed=st.integers(0, 2**32 - 1),
)
def test_without_weights_and_with_weights_of_1_the_order_is_the_same_plain_permutation(
    number, num_mixed, epoch, shuffle_seed
):
    generator = np.random.default_rng((shuffle_seed, epoch))
    mix = {"num_mixed": num_mixed, "mix_ratio": 0.3} if num_mixed else {}
    wanted = round(number * 0.3 / 0.7) if num_mixed else 0
    parts = [np.arange(number)]
    if wanted:
        drawn = generator.choice(num_mixed, wanted, replace=wanted > num_mixed)
        parts.append(number + drawn)
    expected = generator.permutation(np.concatenate(parts)).tolist()
    for entries in ([], [Entry(1), Entry(number - 1)]):
        one = plan(
            number + num_mixed, batch_size=3, shuffle_seed=shuffle_seed, entries=entries, **mix
        )
        one.set_epoch(epoch)
        assert one.order().tolist() == expected


def test_every_epoch_draws_others_of_the_samples_of_a_broken_weight():
    def drawn(epoch):
        one = of_entries([Entry(100, 0.25)], batch_size=4)
        one.set_epoch(epoch)
        return frozenset(one.order().tolist())

    assert drawn(0) == drawn(0) != drawn(1)
    assert {len(drawn(epoch)) for epoch in range(30)} == {25}
    assert len(frozenset.union(*(drawn(epoch) for epoch in range(30)))) > 95


def test_the_share_that_is_mixed_in_is_of_the_weighted_epoch():
    options = {"batch_size": 4, "num_mixed": 50, "mix_ratio": 0.25}
    one = plan(80, entries=[Entry(10, 2.5), Entry(20, 0.25)], **options)
    assert one.num_samples == 40 and (one.order() >= 30).sum() == 10


def test_weights_that_leave_nothing_are_refused():
    with pytest.raises(ToolkitError, match="leave no sample to an epoch"):
        of_entries([Entry(10, 0.01), Entry(3, 0.1)], batch_size=4)


# The last step.


@given(**weighted, world_size=st.integers(1, 4))
def test_with_drop_last_there_are_whole_steps_only_and_the_rest_is_the_end_of_the_order(
    entries, world_size, accumulate, **options
):
    sizes = {"world_size": world_size, "accumulate": accumulate, **options}
    kept = of_entries(entries, **sizes)
    step = world_size * accumulate * options["batch_size"]
    if kept.num_samples < step:
        with pytest.raises(ToolkitError, match=rf"drop_last .* a step takes {step} \("):
            of_entries(entries, drop_last=True, **sizes)
        return
    batches = []
    for rank in range(world_size):
        one = of_entries(entries, rank=rank, drop_last=True, **sizes)
        batches.append(indices(one))
        assert len(batches[-1]) == len(one) and len(one) % accumulate == 0
        assert {len(batch) for batch in batches[-1]} == {options["batch_size"]}
    found = [index for same in zip(*batches, strict=True) for rank in same for index in rank]
    assert found == kept.order()[: len(found)].tolist()
    assert len(found) + one.num_left_out == kept.num_samples and one.num_left_out < step


@given(**weighted, world_size=st.integers(1, 4), drop_last=st.booleans(), start=st.integers(0, 50))
def test_a_weighted_plan_goes_on_at_a_batch_and_is_whole_in_the_next_epoch(
    entries, start, drop_last, **options
):
    step = options["batch_size"] * options["world_size"] * options["accumulate"]
    one = of_entries([*entries, Entry(step)], drop_last=drop_last, **options)
    whole = list(one)
    one.start_batch = start = min(start, len(whole))
    assert list(one) == whole[start:]
    assert list(one) == whole


# Mixing in.


@given(
    number=st.integers(1, 60),
    num_mixed=st.integers(1, 40),
    ratio=st.floats(0.05, 0.8),
    epoch=st.integers(0, 9),
)
def test_an_epoch_has_all_its_own_samples_and_a_share_of_mixed_in_ones(
    number, num_mixed, ratio, epoch
):
    one = plan(number + num_mixed, batch_size=4, num_mixed=num_mixed, mix_ratio=ratio)
    one.set_epoch(epoch)
    found = [index for batch in indices(one) for index in batch]
    drawn = [index for index in found if index >= number]
    assert sorted(index for index in found if index < number) == list(range(number))
    assert all(index < number + num_mixed for index in drawn)
    assert abs(len(drawn) - ratio * len(found)) <= 0.5
    if len(drawn) <= num_mixed:
        assert len(set(drawn)) == len(drawn)


def test_every_epoch_draws_anew_and_the_same_epoch_the_same():
    def drawn(epoch):
        one = plan(110, batch_size=4, num_mixed=100, mix_ratio=0.5)
        one.set_epoch(epoch)
        return {index for batch in indices(one) for index in batch if index >= 10}

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set.union(*(drawn(epoch) for epoch in range(30)))) > 80


def test_too_few_samples_to_mix_in_come_more_than_once():
    one = plan(12, batch_size=4, num_mixed=2, mix_ratio=0.5)
    drawn = [index for batch in indices(one) for index in batch if index >= 10]
    assert len(drawn) == 10 and set(drawn) == {10, 11}


def test_the_samples_of_two_files_follow_one_another(tmp_path):
    parts = {"own": SAMPLES[:3], "mix": SAMPLES[3:5]}
    paths = [write_folder(tmp_path / name, samples) for name, samples in parts.items()]
    one = BatchPlan(LEARNED[:5], batch_size=2, shuffle_seed=1, num_mixed=2, mix_ratio=0.4)
    dataset = SampleDataset(*(RecordFolder(path) for path in paths))
    seen = {}
    for batch in build_loader(dataset, one, pad_token_id=PAD):
        for index, ids in zip(batch["sample_index"].tolist(), batch["input_ids"], strict=True):
            seen[index] = ids[: len(SAMPLES[index].input_ids)].tolist()
    assert seen == {index: one.input_ids.tolist() for index, one in enumerate(SAMPLES[:5])}
    with pytest.raises(IndexError):
        dataset[[Item(5, 1.0)]]


def test_a_packed_batch_has_the_samples_of_the_padded_one():
    packed, padded = (collate(ITEMS, pad_token_id=PAD, packing=on) for on in (True, False))
    for name in ("sample_index", "num_tokens", "learned_tokens", "num_items_in_batch"):
        assert torch.equal(torch.as_tensor(packed[name]), torch.as_tensor(padded[name]))
    assert packed["input_ids"].shape == (1, int(packed["num_tokens"]))
    place = packed["packed"]
    for name in ("input_ids", "labels"):
        assert torch.equal(packed[name][0], padded[name][place.sequence, place.column])
    both = [batch["learned"][1].sort().values for batch in (packed, padded)]
    assert torch.equal(*both)


def test_a_filler_learns_nothing_when_it_is_packed():
    batch = collate(SampleDataset(SAMPLES)[[Item(FILLER, 5.0)]], pad_token_id=PAD, packing=True)
    assert (batch["labels"] == -100).all() and len(batch["learned"][0]) == 0
