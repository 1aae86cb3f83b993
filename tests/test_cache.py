"""The cache written in place: what it keeps, where, and how rows and columns are chosen."""

import pytest
import torch

from chatglm.cache import GROWTH, InPlaceLayer, KVCache


def new_tokens(length, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 3, length, 4, generator=generator) for _ in range(2))


@pytest.fixture
def filled():
    """A layer with five tokens, and what was written."""
    layer, written = InPlaceLayer(capacity=8), new_tokens(5)
    layer.update(*written)
    return layer, written


def test_updates_within_capacity_write_into_the_same_storage():
    layer = InPlaceLayer(capacity=8)
    keys, values = layer.update(*new_tokens(5))
    places = keys.data_ptr(), values.data_ptr()
    for step in range(3):
        keys, values = layer.update(*new_tokens(1, seed=step))
        assert (keys.data_ptr(), values.data_ptr()) == places
    assert layer.get_seq_length() == 8


def test_updates_give_everything_written_so_far():
    layer, parts = InPlaceLayer(), []
    for step, length in enumerate((5, 1, 3)):
        parts.append(new_tokens(length, seed=step))
        given = layer.update(*parts[-1])
        for kept, written in zip(given, zip(*parts, strict=True), strict=True):
            assert torch.equal(kept, torch.cat(written, dim=2))


def test_growth_keeps_the_content():
    layer, first, second = InPlaceLayer(capacity=4), new_tokens(4), new_tokens(3, seed=1)
    layer.update(*first)
    keys, values = layer.update(*second)
    assert torch.equal(keys, torch.cat((first[0], second[0]), dim=2))
    assert torch.equal(values, torch.cat((first[1], second[1]), dim=2))
    assert layer.keys.shape[2] == GROWTH


def test_reorder_gives_each_row_what_another_was(filled):
    layer, (keys, values) = filled
    layer.reorder_cache(torch.tensor([1, 1]))
    new = new_tokens(1, seed=3)
    kept = layer.update(*new)
    for got, written, added in zip(kept, (keys, values), new, strict=True):
        assert torch.equal(got, torch.cat((written[[1, 1]], added), dim=2))


def test_rows_are_repeated_and_selected(filled):
    layer, (keys, _) = filled
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.keys[:, :, :5], keys[[0, 0, 1, 1]])
    layer.batch_select_indices(torch.tensor([3, 0]))
    assert torch.equal(layer.keys[:, :, :5], keys[[1, 0]])


def test_crop_forgets_the_last_tokens(filled):
    layer, (keys, _) = filled
    layer.crop(-2)  # transformers names the number to remove as a negative one
    assert layer.get_seq_length() == 3
    new = new_tokens(1, seed=4)
    kept, _ = layer.update(*new)
    assert torch.equal(kept, torch.cat((keys[:, :, :3], new[0]), dim=2))


def test_reset_forgets_the_tokens_and_keeps_the_room(filled):
    layer, _ = filled
    place = layer.keys.data_ptr()
    layer.reset()
    assert layer.get_seq_length() == 0
    new = new_tokens(2, seed=5)
    kept, _ = layer.update(*new)
    assert kept.data_ptr() == place
    assert torch.equal(kept, new[0])


def test_every_layer_keeps_its_own_tokens():
    cache = KVCache(2, capacity=8)
    written = [new_tokens(3, seed=layer) for layer in range(2)]
    for layer, pair in enumerate(written):
        cache.update(*pair, layer)
    assert cache.get_seq_length() == 3
    for layer, (keys, _) in enumerate(written):
        assert torch.equal(cache.layers[layer].keys[:, :, :3], keys)


def test_an_empty_cache_takes_every_change():
    cache = KVCache(2)
    cache.reorder_cache(torch.tensor([0]))
    cache.reset()
    cache.crop(0)
    cache.crop(-1)
    assert cache.get_seq_length() == 0
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
