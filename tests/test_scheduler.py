import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm.growing_text import GrowingText
from chatglm.sampling import Sampling
from chatglm.serving.request import Request, Row
from chatglm.serving.scheduler import Scheduler

PAGE_TOKENS = 4


def row(prompt_tokens, new_tokens):
    request = Request(tuple(range(prompt_tokens)), new_tokens, Sampling(do_sample=False))
    return Row(request, deliver=lambda update: None, answer=GrowingText(str))


def scheduler(num_pages=8, most_running=4, prefill_tokens=1000, num_virtual=0, **more):
    return Scheduler(
        num_pages=num_pages, page_tokens=PAGE_TOKENS, most_running=most_running,
        prefill_tokens=prefill_tokens, num_virtual=num_virtual, **more,
    )  # fmt: skip


def one_pass(turns):
    """What the engine does with a runner that knows each token at once; gives who joined."""
    joining = turns.admit()
    for one in joining:
        give_token(turns, one)
    turns.put_back(turns.rows_without_room())
    turns.make_room()
    for one in list(turns.running):
        give_token(turns, one)
    return joining


def give_token(turns, one):
    one.tokens.append(7)
    one.num_told += 1
    needed = turns.num_virtual + one.num_cached
    assert needed <= len(one.pages) * PAGE_TOKENS
    if not one.wants_more:
        turns.remove(one)


def test_rows_join_in_the_order_of_their_arrival_and_none_overtakes():
    turns = scheduler(most_running=2)
    rows = [row(3, 9), row(20, 9), row(1, 9)]
    for one in rows:
        turns.add(one)
    assert turns.admit() == [rows[0], rows[1]]
    turns.remove(rows[0])
    assert turns.admit() == [rows[2]]


def test_a_long_prompt_that_does_not_fit_yet_is_not_overtaken_by_short_ones():
    turns = scheduler()
    first, long, short = row(12, 2), row(24, 2), row(1, 2)
    for one in (first, long, short):
        turns.add(one)
    assert turns.admit() == [first] and turns.admit() == []
    turns.remove(first)
    assert turns.admit() == [long]


def test_prompts_are_read_together_within_the_budget_pads_included_and_a_longer_one_alone():
    turns = scheduler(num_pages=100, prefill_tokens=12)
    rows = [row(6, 2), row(4, 2), row(30, 2), row(5, 2), row(7, 2)]
    for one in rows:
        turns.add(one)
    assert turns.admit() == rows[:2]
    assert turns.admit() == rows[2:3]
    turns.remove(rows[0])
    turns.remove(rows[1])
    assert turns.admit() == rows[3:4]  # two of 7 are more than 12
    assert turns.admit() == rows[4:]


def test_a_budget_bounds_the_rows_that_join_and_their_tokens_but_one_may_always():
    turns = scheduler(num_pages=64, most_running=16, pads=False)
    rows = [row(tokens, 2) for tokens in (9, 3, 4, 4, 1, 1, 1)]
    for one in rows:
        turns.add(one)
    assert turns.admit((3, 8)) == rows[:1]
    assert turns.admit((3, 8)) == rows[1:3]
    assert turns.admit((3, 8)) == rows[3:6]
    turns.prefill_tokens = 0
    assert turns.admit((3, 8)) == rows[6:]


def test_the_row_that_came_last_goes_back_and_comes_back_before_later_ones():
    turns = scheduler(num_pages=4, most_running=3)
    old, young, later = row(6, 9), row(2, 9), row(1, 9)
    for one in (old, young, later):
        turns.add(one)
    assert turns.admit() == [old, young]
    while young in turns.running:
        one_pass(turns)
    assert young.pages == [] and list(turns.waiting) == [young, later] and old in turns.running
    assert young.num_told == len(young.tokens) > 0


sizes = st.tuples(st.integers(1, 20), st.integers(1, 12))


@settings(max_examples=300)
@given(
    arrivals=st.lists(st.lists(sizes, max_size=4), max_size=12),
    num_pages=st.integers(9, 30),
    most_running=st.integers(1, 6),
    prefill_tokens=st.integers(1, 40),
    num_virtual=st.integers(0, 4),
)
def test_every_row_ends_and_every_page_comes_back(
    arrivals, num_pages, most_running, prefill_tokens, num_virtual
):
    turns = scheduler(num_pages, most_running, prefill_tokens, num_virtual)
    everyone, first_joined = [], []
    for arriving in arrivals:
        rows = [row(*size) for size in arriving]
        everyone += rows
        for one in rows:
            turns.add(one)
        first_joined += [one for one in one_pass(turns) if one not in first_joined]
        assert len(turns.running) <= most_running
        held = [page for one in turns.running for page in one.pages]
        assert len(set(held)) == len(held) == num_pages - turns.pool.num_free
    for _ in range(40 * len(everyone) + 1):
        first_joined += [one for one in one_pass(turns) if one not in first_joined]
    assert all(not one.wants_more for one in everyone)
    assert first_joined == everyone  # none overtook another
    assert turns.pool.num_free == num_pages and not turns.running and not turns.waiting


@pytest.mark.parametrize(("pads", "together"), [(True, 2), (False, 3)])
def test_pads_count_only_where_they_are_read(pads, together):
    turns = scheduler(num_pages=40, prefill_tokens=24, pads=pads)
    for length in (2, 12, 6, 8):
        turns.add(row(length, 3))
    assert len(turns.admit()) == together
