"""Mask and positions against the rules stated slowly, in plain Python."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from chatglm.positions import (
    allowed_keys,
    find_context,
    mask_from_released,
    position_rows,
    token_index,
)

PAD, MASK, GMASK, BOS = 3, 300, 301, 304
IDS = {"bos_token_id": BOS, "gmask_token_id": GMASK, "mask_token_id": MASK}
words = st.integers(10, 99)


@st.composite
def sequences(draw):
    """A prompt with its mask token anywhere, <sop>, and an answer."""
    prompt = draw(st.lists(words, max_size=6))
    prompt.insert(draw(st.integers(0, len(prompt))), draw(st.sampled_from([MASK, GMASK])))
    return [*prompt, BOS, *draw(st.lists(words, max_size=6))]


def padded(rows, extra):
    width = max(map(len, rows)) + extra
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    return ids, (ids != PAD).long()


def slow_rules(row):
    """(context length, mask position, row 0, row 1, who may see whom) of one sequence."""
    context = row.index(BOS)
    at = row.index(GMASK) if GMASK in row else row.index(MASK)
    text = [i if i < context else at for i in range(len(row))]
    block = [0 if i < context else i - context + 1 for i in range(len(row))]
    sees = [[key < context or key <= query for key in range(len(row))] for query in range(len(row))]
    return context, at, text, block, sees


@given(st.lists(sequences(), min_size=1, max_size=4), st.integers(0, 2))
def test_rules_hold_for_every_real_token_of_a_padded_batch(rows, extra):
    ids, mask = padded(rows, extra)
    contexts, positions = find_context(ids, mask, **IDS)
    two_rows = position_rows(token_index(ids, mask), contexts, positions)
    width = ids.shape[1]
    allowed = allowed_keys(mask, contexts, num_queries=width, num_keys=width, offset=0)
    for number, row in enumerate(rows):
        context, at, text, block, sees = slow_rules(row)
        pads = width - len(row)
        assert (contexts[number], positions[number]) == (context, at)
        assert two_rows[number, :, pads:].tolist() == [text, block]
        assert two_rows[number, :, :pads].eq(0).all()
        assert allowed[number, 0, pads:, pads:].tolist() == sees
        assert not allowed[number, 0, pads:, :pads].any()


@given(sequences(), st.data())
def test_chunks_of_an_answer_see_what_the_whole_sees(row, data):
    ids = torch.tensor([row])
    context, *_, sees = slow_rules(row)
    cut = data.draw(st.integers(context, len(row) - 1))
    contexts, _ = find_context(ids, None, **IDS)
    chunk = allowed_keys(None, contexts, num_queries=len(row) - cut, num_keys=len(row), offset=cut)
    assert chunk[0, 0].tolist() == sees[cut:]


@given(st.lists(sequences(), min_size=1, max_size=3), st.integers(1, 5))
def test_columns_not_filled_yet_are_forbidden(rows, room):
    ids, mask = padded(rows, 0)
    contexts, _ = find_context(ids, mask, **IDS)
    width = ids.shape[1]
    for given_mask in (mask, None):
        for offset in (0, torch.tensor(0)):
            allowed = allowed_keys(
                given_mask, contexts, num_queries=width, num_keys=width + room, offset=offset
            )
            assert not allowed[..., width:].any()


@given(st.lists(sequences(), min_size=1, max_size=4))
def test_every_query_sees_itself(rows):
    ids, mask = padded(rows, 1)
    contexts, _ = find_context(ids, mask, **IDS)
    width = ids.shape[1]
    allowed = allowed_keys(mask, contexts, num_queries=width, num_keys=width, offset=0)
    assert allowed[:, 0].diagonal(dim1=1, dim2=2).all()


def test_a_sequence_without_sop_is_causal_throughout():
    ids = torch.tensor([[11, 12, 13]])
    contexts, _ = find_context(ids, None, **IDS)
    allowed = allowed_keys(None, contexts, num_queries=3, num_keys=3, offset=0)
    assert contexts.tolist() == [0]
    assert torch.equal(allowed[0, 0], torch.ones(3, 3).tril().bool())


def test_gmask_is_preferred_to_mask():
    ids = torch.tensor([[MASK, 11, GMASK, BOS, 12]])
    assert find_context(ids, None, **IDS)[1].tolist() == [2]


def test_golden_positions_and_mask_are_the_released_ones(golden):
    for name in ("left", "greedy_batch"):
        ids, forbidden = golden[f"{name}.input_ids"], golden[f"{name}.attention_mask"]
        mask = mask_from_released(forbidden)
        assert torch.equal(mask, (ids != PAD).long())
        contexts, positions = find_context(ids, mask, **IDS)
        real = mask.bool()
        rows = position_rows(token_index(ids, mask), contexts, positions)
        expected = golden[f"{name}.position_ids"]
        for row in (0, 1):
            assert torch.equal(rows[:, row][real], expected[:, row][real])
        width = ids.shape[1]
        allowed = allowed_keys(mask, contexts, num_queries=width, num_keys=width, offset=0)
        assert torch.equal(allowed[:, 0][real], ~forbidden[:, 0][real])
