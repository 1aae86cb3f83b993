"""Captured steps beside the model's own forward pass in fp32."""

import copy

import pytest
import torch

from chatglm import decoding, steps
from chatglm.configuration import ChatGLMConfig
from chatglm.decoding import generate_tokens
from chatglm.kernels import ops
from chatglm.kernels.compiler import KernelError
from chatglm.model import ChatGLMForConditionalGeneration
from chatglm.sampling import Sampling
from chatglm.supported import reason_against

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PAD, MASK, GMASK, BOS, EOS = 3, 300, 301, 304, 305
GREEDY = Sampling(do_sample=False)


def build(bits=0, *, dtype=torch.float16, width=4096, pre_seq_len=None):
    """A model of three layers, and the same values in fp32."""
    torch.manual_seed(0)
    config = ChatGLMConfig(
        vocab_size=320, hidden_size=width, inner_hidden_size=4 * width, num_layers=3,
        num_attention_heads=width // 128, max_sequence_length=512, bos_token_id=BOS,
        eos_token_id=EOS, mask_token_id=MASK, gmask_token_id=GMASK, pad_token_id=PAD,
        pre_seq_len=pre_seq_len,
    )  # fmt: skip
    with torch.device("cuda"):
        model = ChatGLMForConditionalGeneration(config).to(dtype).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(0, 0.1)
    if bits:
        from chatglm.quantization.linear import quantize_blocks

        quantize_blocks(model.transformer.layers, bits, torch.device("cuda"))
        config.quantization_bit = bits
    exact = copy.deepcopy(model).float()
    exact.transformer._computes_in_half = lambda hidden: True  # the angles are no matter of error
    return model, exact


@pytest.fixture(autouse=True)
def no_steps_left():
    yield
    steps.forget_steps()


def prompt(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, 299, (length - 2,), generator=generator).tolist()
    return [*ids, GMASK, BOS]


def padded(prompts):
    """ids and mask of prompts padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts], device="cuda")
    return ids, (ids != PAD).long()


def logits_after(exact, prompts, tokens):
    """Scores (steps, B, V) of the forward pass before each of tokens (steps, B), fp32 or half."""
    ids, mask = padded(prompts)
    whole = torch.cat((ids, tokens.T.cuda()), dim=1)
    mask = torch.cat((mask, torch.ones_like(tokens.T.cuda())), dim=1)
    with torch.no_grad():
        logits = exact(whole, attention_mask=mask).logits
    return logits[:, ids.shape[1] - 1 : -1].transpose(0, 1).float()


@torch.inference_mode()
def captured_scores(model, prompts, count, room=256, cache_bits=16):
    """Scores (count, B, V) and the greedy tokens (count, B) of captured steps."""
    ids, mask = padded(prompts)
    order = (mask == 0).long().argsort(dim=1, stable=True)
    step = steps.get_step(model, rows=len(prompts), room=room, cache_bits=cache_bits)
    step.prefill(ids.gather(1, order), mask.gather(1, order))
    step.set_rules(GREEDY, seed=0, so_far=ids)
    scores, tokens = [step.scores.float().clone()], []
    step.first_token()
    for _ in range(count - 1):
        tokens.append(step.tokens.long().cpu())
        step.next_token()
        # What the sampling at a replay's end looked at.
        scores.append(step.scores.float().clone())
    tokens.append(step.tokens.long().cpu())
    return torch.stack(scores), torch.stack(tokens)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


KINDS = [
    pytest.param({"bits": bits, "dtype": dtype, "width": width}, id=f"{bits}-{name}-{width}")
    for bits in (0, 8, 4)
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16))
    for width in (4096, 2048)
    if (name, width) != ("bf16", 2048)
]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_as_exact_as_the_half_precision_forward_pass(kind):
    model, exact = build(**kind)
    assert reason_against(model) is None
    for lengths in ([3], [70], [40, 5, 64], [9] * 9, list(range(4, 37))):
        prompts = [prompt(length, seed) for seed, length in enumerate(lengths)]
        scores, tokens = captured_scores(model, prompts, 12)
        expected = logits_after(exact, prompts, tokens)
        plain = logits_after(model, prompts, tokens)
        bound = 1.5 * relative(plain, expected) + 1e-4
        assert relative(scores, expected) < bound, lengths
        chosen = scores.argmax(dim=-1).cpu()
        assert torch.equal(tokens, chosen)


@pytest.mark.parametrize("virtual", [1, 32, 128])
def test_virtual_tokens_stand_before_the_cache(virtual):
    model, exact = build(pre_seq_len=virtual)
    prompts = [prompt(30), prompt(17, seed=1)]
    scores, tokens = captured_scores(model, prompts, 8)
    expected = logits_after(exact, prompts, tokens)
    plain = logits_after(model, prompts, tokens)
    assert relative(scores, expected) < 1.5 * relative(plain, expected) + 1e-4
    no_prefix = model.transformer.prefix_encoder
    model.transformer.prefix_encoder, model.config.pre_seq_len = None, None
    without, _ = captured_scores(model, prompts, 8)
    model.transformer.prefix_encoder = no_prefix
    assert relative(without, expected) > 10 * relative(scores, expected)


@pytest.mark.parametrize("lengths", [[3], [300], [40, 5, 64]])
def test_a_cache_of_int8_costs_little(lengths):
    model, exact = build(pre_seq_len=8)
    prompts = [prompt(length, seed) for seed, length in enumerate(lengths)]
    scores, tokens = captured_scores(model, prompts, 12, room=320, cache_bits=8)
    expected = logits_after(exact, prompts, tokens)
    assert relative(scores, expected) < 0.01


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("most_drafted", [1, 4, 7])
def test_prompt_lookup_gives_the_very_tokens_of_single_steps(bits, most_drafted):
    model, _ = build(bits, pre_seq_len=3 if most_drafted == 4 else None)
    words = prompt(30)[:-2]
    prompts = [[*words, *words, *words[:10], GMASK, BOS]]
    single = answer(model, prompts, 200)
    assert torch.equal(answer(model, prompts, 200, prompt_lookup_tokens=most_drafted), single)


def test_a_row_comes_out_the_same_alone_and_among_others():
    for bits in (0, 8, 4):
        model, _ = build(bits)
        prompts = [
            prompt(length, seed) for seed, length in enumerate([70, 12, 33, 64, 5, 20, 9, 2])
        ]
        together = answer(model, prompts, 20)
        for row, one in enumerate(prompts):
            assert torch.equal(answer(model, [one], 20)[:, 0], together[:, row])


@pytest.mark.parametrize("bits", [0, 4])
def test_adapters_are_part_of_the_step_and_can_be_changed(bits):
    peft = pytest.importorskip("peft")
    model, _ = build(bits)
    settings = peft.LoraConfig(r=8, target_modules=["query_key_value", "dense_4h_to_h"])
    tuned = peft.get_peft_model(model, settings, adapter_name="first").eval()
    tuned.add_adapter("second", settings)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02 if "first" in name else 0.05)
    assert reason_against(model) is None
    prompts = [prompt(20), prompt(11, seed=4)]
    found = []
    for name in ("first", "second"):
        tuned.set_adapter(name)
        scores, tokens = captured_scores(model, prompts, 8)
        expected = logits_after(model, prompts, tokens)
        assert relative(scores, expected) < 5e-3
        found.append(scores)
    with tuned.disable_adapter():
        found.append(captured_scores(model, prompts, 8)[0])
    assert relative(found[0], found[1]) > 0.02 and relative(found[0], found[2]) > 0.02


def answer(model, prompts, count, **options):
    ids, mask = padded(prompts)
    settings = {"sampling": GREEDY, "eos_token_ids": [-1], "max_new_tokens": count, **options}
    return torch.stack(list(generate_tokens(model, ids, attention_mask=mask, **settings)))


def test_an_answer_goes_on_to_the_models_longest_sequence():
    model, exact = build()
    prompts = [prompt(500)]
    tokens = answer(model, prompts, 12)
    assert tokens.shape == (12, 1)
    expected = logits_after(exact, prompts, tokens)
    best = expected.max(dim=-1).values
    chosen = expected.gather(2, tokens[..., None].cuda())[..., 0]
    assert ((best - chosen) < 0.02).all()


def test_an_answer_that_was_broken_off_leaves_nothing_to_the_next():
    model, _ = build(4)
    first, second = [prompt(40)], [prompt(25, seed=5)]
    fresh = answer(model, second, 10)
    started = generate_tokens(model, *padded(first)[:1], max_new_tokens=100, sampling=GREEDY,
                              eos_token_ids=[-1])  # fmt: skip
    next(started), next(started)
    started.close()
    assert torch.equal(answer(model, second, 10), fresh)


def test_sampled_tokens_follow_from_the_seed_and_not_from_what_ran_before():
    model, _ = build()
    rules = Sampling(temperature=1.5, top_p=0.95)

    def draw(seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        return answer(model, [prompt(20)], 12, sampling=rules, generator=generator)

    first = draw(1)
    assert not torch.equal(draw(2), first)
    assert torch.equal(draw(1), first)


def test_rows_that_have_ended_go_on_with_pads_and_the_answer_ends_with_the_last():
    model, _ = build()
    prompts = [prompt(20), prompt(33, seed=2)]
    tokens = answer(model, prompts, 12)
    end = int(tokens[3, 0])
    cut = answer(model, prompts, 12, eos_token_ids=[end])
    for row in range(2):
        wanted = tokens[:, row].tolist()
        if end in wanted:
            length = wanted.index(end) + 1
            wanted = wanted[:length] + [PAD] * (12 - length)
        assert cut[:, row].tolist() == wanted[: len(cut)]


def test_a_step_is_captured_anew_when_the_weights_stand_elsewhere():
    model, _ = build()
    prompts = [prompt(20)]
    before = answer(model, prompts, 6)
    for layer in model.transformer.layers:
        layer.mlp.dense_4h_to_h.weight.data = -layer.mlp.dense_4h_to_h.weight.data
    assert not torch.equal(answer(model, prompts, 6), before)


def test_kept_caches_stay_within_their_bytes(monkeypatch):
    model, _ = build()
    monkeypatch.setattr(steps, "KEPT_BYTES", 1)
    for rows in (1, 2, 3):
        answer(model, [prompt(20)] * rows, 3)
    assert len(steps._STEPS[model]) == 1


def test_nothing_waits_for_the_gpu_between_two_steps():
    model, _ = build()
    answer(model, [prompt(20)], 3)
    step = steps.get_step(model, rows=1, room=22)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.next_token()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_without_a_compiler_the_plain_loop_answers_and_says_why(monkeypatch, caplog):
    def no_kernel(*_):
        raise KernelError("libnvrtc is not to be found")

    model, _ = build()
    expected = answer(model, [prompt(20)], 4)
    ops.reason_against_card.cache_clear()
    decoding._said.clear()
    monkeypatch.setattr(ops, "get_kernel", no_kernel)
    found = answer(model, [prompt(20)], 4)
    monkeypatch.undo()
    ops.reason_against_card.cache_clear()
    assert found.shape == expected.shape
    assert "the slower, plain pace: libnvrtc is not to be found" in caplog.text
