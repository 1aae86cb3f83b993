"""What captured steps do with cache, counts and history, in fp32 and without a GPU."""

import gc
import weakref

import pytest
import torch

from chatglm import decoding, steps
from chatglm.decoding import generate_tokens
from chatglm.errors import ToolkitError
from chatglm.model import ChatGLMForConditionalGeneration

from . import plain_kernels
from .conftest import load
from .test_decoding import GREEDY, decode


@pytest.fixture(autouse=True)
def steps_on_a_cpu(monkeypatch):
    plain_kernels.use(monkeypatch)
    # fp32 runs turn by fp32 angles, which captured steps never have to.
    monkeypatch.setattr(steps, "rotary_tables", _exact_tables(steps.rotary_tables))
    yield
    steps.forget_steps()


def _exact_tables(tables):
    return lambda *given, half, device: tables(*given, half=False, device=device)


def test_greedy_tokens_are_the_released_ones(released, golden):
    assert torch.equal(decode(released, golden["greedy.input_ids"]), golden["greedy.output_ids"])


def test_greedy_tokens_of_a_padded_batch_are_the_released_ones(released, golden):
    ids = golden["greedy_batch.input_ids"]
    output = decode(released, ids, attention_mask=(ids != 3).long())
    assert torch.equal(output, golden["greedy_batch.output_ids"])


@pytest.mark.parametrize("most_drafted", [1, 4, 7])
def test_greedy_tokens_by_prompt_lookup_are_the_released_ones(released, golden, most_drafted):
    output = decode(released, golden["greedy.input_ids"], prompt_lookup_tokens=most_drafted)
    assert torch.equal(output, golden["greedy.output_ids"])


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights_give_the_tokens_of_the_plain_loop(
    quantized_folders, golden, bits, monkeypatch
):
    model = load(quantized_folders[bits])
    found = decode(model, golden["greedy.input_ids"])
    monkeypatch.undo()
    assert torch.equal(found, decode(model, golden["greedy.input_ids"]))


@pytest.fixture
def with_prefix(released):
    torch.manual_seed(1)
    config = type(released.config).from_dict({**released.config.to_dict(), "pre_seq_len": 6})
    model = ChatGLMForConditionalGeneration(config).eval()
    model.load_state_dict(released.state_dict(), strict=False)
    return model


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_tokens": 3}])
def test_virtual_tokens_stand_before_the_cache(with_prefix, golden, options, monkeypatch):
    found = decode(with_prefix, golden["greedy.input_ids"], **options)
    monkeypatch.undo()
    assert torch.equal(found, decode(with_prefix, golden["greedy.input_ids"]))


def test_a_cache_of_int8_changes_scores_by_little(with_prefix, golden):
    scores = []
    for bits in (16, 8):
        step = steps.CapturedStep(with_prefix, rows=2, room=64, cache_bits=bits)
        with torch.inference_mode():
            ids = golden["greedy_batch.input_ids"]
            order = (ids == 3).long().argsort(dim=1, stable=True)
            ids = ids.gather(1, order)
            step.prefill(ids, (ids != 3).long())
            step.set_rules(GREEDY, seed=0, so_far=ids)
            step.first_token()
            for _ in range(3):
                step.hidden.copy_(with_prefix.transformer.word_embeddings.weight[[7, 7]])
                step.next_token()
            scores.append(step.scores.clone())
    error = (scores[1] - scores[0]).norm() / scores[0].norm()
    assert 0 < error < 0.02


def test_a_cache_of_int8_is_refused_where_it_cannot_be_had(released, golden, monkeypatch):
    ids = golden["greedy.input_ids"]
    with pytest.raises(ToolkitError, match="can't be had with prompt_lookup_tokens"):
        decode(released, ids, kv_cache_bits=8, prompt_lookup_tokens=2)
    with pytest.raises(ToolkitError, match="allowed are 16 and 8"):
        decode(released, ids, kv_cache_bits=4)
    monkeypatch.undo()
    with pytest.raises(ToolkitError, match="not on a CUDA device; leave it at 16"):
        decode(released, ids, kv_cache_bits=8)


def test_a_second_answer_takes_the_step_of_the_first(released, golden):
    ids = golden["greedy.input_ids"]
    first = decode(released, ids)
    kept = list(steps._STEPS[released].values())
    assert torch.equal(decode(released, ids), first)
    assert list(steps._STEPS[released].values()) == kept and len(kept) == 1


def test_two_answers_at_once_do_not_disturb_each_other(released, golden):
    ids, wanted = golden["greedy.input_ids"], golden["greedy.output_ids"]
    settings = {"max_new_tokens": 12, "sampling": GREEDY, "eos_token_ids": [-1]}
    other = ids.clone()
    other[0, 0] = 9
    alone = torch.stack(list(generate_tokens(released, other, **settings)))
    first, second = (generate_tokens(released, x, **settings) for x in (ids, other))
    pairs = list(zip(first, second, strict=True))
    start = ids.shape[1]
    assert torch.cat([one for one, _ in pairs]).tolist() == wanted[0, start : start + 12].tolist()
    assert torch.equal(torch.stack([two for _, two in pairs]), alone)


def test_a_model_that_is_gone_takes_its_steps_along(golden, checkpoint_folder):
    model = load(checkpoint_folder)
    decode(model, golden["greedy.input_ids"], max_new_tokens=2)
    assert model in steps._STEPS
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_more_room_than_the_model_has_positions_is_refused(released, golden):
    with pytest.raises(ToolkitError, match="this model reads at most"):
        decode(released, golden["greedy.input_ids"], max_new_tokens=3000)


def test_a_generator_is_drawn_from(released):
    generator = torch.Generator().manual_seed(3)
    seeds = [decoding._seed_of(generator) for _ in range(2)]
    assert seeds[0] != seeds[1]
    assert decoding._seed_of(torch.Generator().manual_seed(3)) == seeds[0]
