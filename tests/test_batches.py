"""Padded batches: what is learned, and that pads change nothing."""

import pytest
import torch

from chatglm.batches import build_loader, collate
from chatglm.configuration import ChatGLMConfig
from chatglm.model import ChatGLMForConditionalGeneration
from chatglm.records import RecordFile, write_records
from chatglm.strategies import Sample, SpecialTokens, truncate

PAD, GMASK, SOP, EOP = 3, 6, 7, 8
LENGTHS = ((4, 3), (0, 5), (9, 1), (2, 8))


def sample(prompt, answer):
    return truncate(
        [10 + i for i in range(prompt)],
        [40 + i for i in range(answer)],
        SpecialTokens(GMASK, SOP, EOP),
        max_seq_length=64,
        ensure_answer_min_length=1,
    )


ITEMS = [(index, sample(*lengths)) for index, lengths in enumerate(LENGTHS)]


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
    names = ("input_ids", "labels", "context_lengths", "mask_positions")
    with torch.no_grad():
        return model(**{name: batch[name] for name in names}, use_cache=False).loss


def test_nothing_is_learned_up_to_sop_nor_on_pads():
    batch = collate(ITEMS, pad_token_id=PAD)
    for ids, labels, (_, one) in zip(batch["input_ids"], batch["labels"], ITEMS, strict=True):
        length, first = len(one.input_ids), one.context_length + 1
        assert ids[first - 1] == SOP and ids[one.context_length - 1] == GMASK
        assert (labels[:first] == -100).all() and (labels[length:] == -100).all()
        assert labels[first:length].tolist() == one.input_ids[first:]
        assert ids[:length].tolist() == one.input_ids and (ids[length:] == PAD).all()


def test_positions_indices_and_counts_are_those_of_the_samples():
    batch = collate(ITEMS, pad_token_id=PAD)
    assert batch["context_lengths"].tolist() == [one.context_length for _, one in ITEMS]
    found = batch["input_ids"].gather(1, batch["mask_positions"][:, None])
    assert (found == GMASK).all()
    assert batch["sample_index"].tolist() == [0, 1, 2, 3]
    assert int(batch["num_tokens"]) == sum(len(one.input_ids) for _, one in ITEMS)


def test_the_loss_of_a_padded_batch_is_the_token_weighted_mean_of_its_samples(model):
    weights = torch.tensor([len(one.input_ids) - one.context_length - 1.0 for _, one in ITEMS])
    alone = torch.stack([loss(model, [item]) for item in ITEMS])
    expected = (weights * alone).sum() / weights.sum()
    torch.testing.assert_close(loss(model, ITEMS), expected, atol=1e-5, rtol=0)


def test_an_answer_may_hold_the_pad_id(model):
    odd = [(0, Sample([10, GMASK, SOP, PAD, EOP], 2))]
    assert collate(odd, pad_token_id=PAD)["labels"].tolist() == [[-100, -100, -100, PAD, EOP]]


def test_the_same_seed_gives_the_same_order_and_another_another(tmp_path):
    path = str(tmp_path / "some.record")
    write_records(path, [sample(1, 1 + i % 3) for i in range(20)], {})

    def orders(seed):
        loader = build_loader(RecordFile(path), batch_size=3, pad_token_id=PAD, shuffle_seed=seed)
        epochs = [[i for batch in loader for i in batch["sample_index"].tolist()] for _ in "ab"]
        assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
        return epochs

    assert orders(1) == orders(1) != orders(2)
    assert orders(1)[0] != orders(1)[1]
    assert orders(None) == [list(range(20))] * 2
