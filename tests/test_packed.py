"""Sequences side by side in one row, on the CPU and by the kernels."""

import copy
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatglm.configuration import ChatGLMConfig
from chatglm.errors import ToolkitError
from chatglm.kernels.compiler import Kernel
from chatglm.loss import learned_tokens
from chatglm.model import ChatGLMForConditionalGeneration
from chatglm.packed import KeyPlaces, Packed
from chatglm.positions import position_rows

IDS = {"vocab_size": 320, "bos_token_id": 304, "eos_token_id": 305, "mask_token_id": 300,
       "gmask_token_id": 301}  # fmt: skip
SMALL = {"hidden_size": 64, "inner_hidden_size": 256, "num_layers": 3, "num_attention_heads": 4,
         "max_sequence_length": 128, **IDS}  # fmt: skip
WIDE = {"hidden_size": 256, "inner_hidden_size": 512, "num_layers": 3, "num_attention_heads": 2,
        "max_sequence_length": 512, **IDS}  # fmt: skip
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
PARTS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6)


def build(shape, *, pre_seq_len=None, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    config = ChatGLMConfig(**shape, pre_seq_len=pre_seq_len)
    model = ChatGLMForConditionalGeneration(config)
    if pre_seq_len:
        model.transformer.prefix_encoder.dropout.p = 0.0
        model.transformer.prefix_encoder.embedding.weight.data *= 0.1
    return model.to(device, dtype).train()


def sequences(number, longest):
    """(context length, ids) of each."""
    chance = random.Random(number)
    made = []
    for _ in range(number):
        context, answer = chance.randint(1, longest), chance.randint(1, longest)
        ids = [chance.randrange(5, 290) for _ in range(context + answer)]
        ids[context - 1], ids[context] = IDS["gmask_token_id"], IDS["bos_token_id"]
        made.append((context, ids))
    return made


def in_one_row(made, device="cpu"):
    """The model's inputs for them."""
    packed = Packed.of([context for context, _ in made], [len(ids) for _, ids in made])
    labels = [[-100] * (context + 1) + ids[context + 1 :] for context, ids in made]
    row, labels = (packed.row(part)[None].to(device) for part in ([i for _, i in made], labels))
    return {"input_ids": row, "labels": labels, "packed": packed.to(device)}


def one_by_one(model, made):
    """Logits of each sequence, and the loss over the tokens of all."""
    device, total, learned, logits = model.device, 0.0, 0, []
    for context, ids in made:
        labels = torch.tensor([[-100] * (context + 1) + ids[context + 1 :]], device=device)
        out = model(
            input_ids=torch.tensor([ids], device=device), labels=labels, use_cache=False,
            context_lengths=torch.tensor([context], device=device),
            mask_positions=torch.tensor([context - 1], device=device), num_items_in_batch=1.0,
        )  # fmt: skip
        logits.append(out.logits[0])
        total, learned = total + out.loss, learned + len(ids) - context - 1
    return logits, total / learned


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pre_seq_len", [None, 5])
def test_every_sequence_computes_what_it_would_alone(pre_seq_len):
    model, made = build(SMALL, pre_seq_len=pre_seq_len), sequences(6, 20)
    expected, mean = one_by_one(model, made)
    inputs = in_one_row(made)
    found = model(**inputs, use_cache=False)
    for number, logits in enumerate(expected):
        own = found.logits[0][inputs["packed"].sequence == number]
        torch.testing.assert_close(own, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, mean)
    packed_loss = model(**inputs, use_cache=False, loss_only=True).loss
    torch.testing.assert_close(packed_loss, mean)
    alone, together = gradients(model, one_by_one(model, made)[1]), gradients(model, packed_loss)
    assert alone.keys() == together.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(together[name], gradient, atol=1e-6, rtol=1e-4)


@given(parts=PARTS)
def test_a_row_has_every_token_at_its_place(parts):
    made = [([*range(100 * n, 100 * n + c + a)], c) for n, (c, a) in enumerate(parts)]
    packed = Packed.of([c for _, c in made], [len(ids) for ids, _ in made])
    row = packed.row([ids for ids, _ in made])
    assert (row == 100 * packed.sequence + packed.column).all()
    in_context = packed.column < packed.context_lengths[packed.sequence]
    assert in_context[: packed.num_context_tokens].all()
    assert not in_context[packed.num_context_tokens :].any()
    for number, (ids, context) in enumerate(made):
        index = torch.arange(len(ids))[None]
        alone = position_rows(index, torch.tensor([context]), torch.tensor([context - 1]))[0]
        assert (packed.positions[:, packed.sequence == number] == alone).all()


@given(parts=PARTS, virtual=st.integers(0, 3))
def test_keys_stand_sequence_by_sequence_behind_their_virtual_ones(parts, virtual):
    packed = Packed.of([c for c, _ in parts], [c + a for c, a in parts])
    places = KeyPlaces.of(packed, virtual)
    keys = torch.full((places.num_keys,), -1)
    keys[places.places.long()] = 100 * packed.sequence + packed.column
    keys[places.virtual] = -2
    assert (keys != -1).all()
    for number, (context, answer) in enumerate(parts):
        own = [*[-2] * virtual, *range(100 * number, 100 * number + context + answer)]
        first, end = places.ends[number : number + 2].tolist()
        assert keys[first:end].tolist() == own
        first, end = places.context_ends[number : number + 2].tolist()
        assert keys[places.of_contexts[first:end]].tolist() == own[: virtual + context]
    assert places.answer_ends.diff().tolist() == [answer for _, answer in parts]
    of_contexts = keys[places.of_contexts]
    assert (of_contexts[places.virtual_of_contexts] == -2).all()
    in_context = packed.num_context_tokens
    assert (of_contexts[places.context_places.long()]
            == 100 * packed.sequence[:in_context] + packed.column[:in_context]).all()  # fmt: skip


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputing_gives_the_same_gradients(mode):
    model, inputs = build(SMALL), in_one_row(sequences(4, 12))
    calls = []
    for block in model.transformer.layers:
        block.mlp.dense_h_to_4h.register_forward_hook(lambda *_: calls.append(1))
    kept = gradients(model, model(**inputs, loss_only=True).loss)
    assert len(calls) == SMALL["num_layers"]
    model.recompute(mode)
    again = gradients(model, model(**inputs, loss_only=True).loss)
    assert len(calls) == 3 * SMALL["num_layers"]
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient)


def test_half_a_block_is_not_computed_again_over_a_cache():
    model, (_, ids) = build(SMALL), sequences(1, 12)[0]
    model.recompute("selective")
    out = model(torch.tensor([ids]), labels=torch.tensor([ids]), use_cache=True)
    out.loss.backward()
    assert out.past_key_values.get_seq_length() == len(ids)


@pytest.mark.parametrize("beside", [{"attention_mask": torch.ones(1, 9)}, {"use_cache": True},
                                    {"output_hidden_states": True}], ids=str)  # fmt: skip
def test_what_a_packed_row_can_not_have_beside_it_is_refused(beside):
    with pytest.raises(ToolkitError, match=f"packed has no {next(iter(beside))} beside it"):
        build(SMALL)(**in_one_row(sequences(3, 9)), **beside)


def test_a_row_of_another_length_is_refused():
    inputs = in_one_row(sequences(3, 9))
    inputs["input_ids"] = inputs["input_ids"][:, 1:]
    with pytest.raises(ToolkitError, match=r"packed is of a row of .* tokens, and the input is of"):
        build(SMALL)(**inputs)


def plainly(model):
    """The same model by plain torch."""
    plain = copy.deepcopy(model)
    plain.use_fused_kernels(False)
    return plain


@pytest.fixture
def launched(monkeypatch):
    """How often each kernel has been launched."""
    counts = Counter()
    launch = Kernel.launch

    def counted(kernel, *given):
        counts[kernel.name] += 1
        launch(kernel, *given)

    monkeypatch.setattr(Kernel, "launch", counted)
    return counts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pre_seq_len", [None, 7])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
class TestOnGpu:
    pytestmark = GPU

    @pytest.mark.parametrize("number", [1, 9])
    def test_kernels_compute_what_plain_torch_does(
        self, launched, dtype, pre_seq_len, mode, number
    ):
        model = build(WIDE, pre_seq_len=pre_seq_len, device="cuda", dtype=dtype)
        exact = plainly(model).float()
        plain = plainly(model)
        model.recompute(mode)
        inputs = in_one_row(sequences(number, 150), "cuda")
        losses = [one(**inputs, use_cache=False).loss for one in (exact, plain)]
        assert not launched
        losses.append(model(**inputs, use_cache=False).loss)
        assert min(launched[name] for name in ("split_heads", "layer_norm")) >= WIDE["num_layers"]
        assert abs(losses[2] - losses[0]) < 2 * abs(losses[1] - losses[0]) + 2e-3
        found = [gradients(one, loss) for one, loss in zip((exact, plain, model), losses,
                                                           strict=True)]  # fmt: skip
        assert found[2].keys() == found[0].keys()
        for name, gradient in found[0].items():
            errors = [(one[name].float() - gradient).norm() / gradient.norm() for one in found[1:]]
            assert errors[1] < 1.5 * errors[0] + 2e-3, (name, errors)
        backward = ("join_heads", "layer_norm_backward")
        assert min(launched[name] for name in backward) >= WIDE["num_layers"]


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
class TestLossOnGpu:
    pytestmark = GPU

    def test_the_loss_and_its_gradients_are_those_of_all_logits(self, trained, launched):
        model = build(WIDE, device="cuda", dtype=torch.bfloat16)
        model.lm_head.weight.requires_grad_(trained)
        inputs = in_one_row(sequences(12, 150), "cuda")  # more tokens than one part of the loss has
        assert len(learned_tokens(inputs["labels"])[0]) > 512
        exact = plainly(model).float()
        expected = gradients(exact, exact(**inputs).loss)
        loss = model(**inputs, loss_only=True).loss
        assert launched["cross_entropy"] > 1
        assert abs(loss - exact(**inputs).loss) < 2e-3
        found = gradients(model, loss)
        assert ("lm_head.weight" in found) == trained
        for name, gradient in found.items():
            error = (gradient.float() - expected[name]).norm() / expected[name].norm()
            assert error < 0.03, (name, error)


class TestAutocastOnGpu:
    pytestmark = GPU

    @pytest.mark.parametrize("pre_seq_len", [None, 7])
    def test_weights_of_32_bits_train_in_half_precision(self, pre_seq_len, launched):
        model = build(WIDE, pre_seq_len=pre_seq_len, device="cuda")
        inputs = in_one_row(sequences(9, 150), "cuda")
        exact = plainly(model)
        expected = gradients(exact, exact(**inputs, loss_only=True).loss)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**inputs, loss_only=True).loss
        assert launched["split_heads"] == WIDE["num_layers"]
        for name, gradient in gradients(model, loss).items():
            assert (gradient - expected[name]).norm() < 0.05 * expected[name].norm(), name
