"""What only a CUDA device shows: the same tokens, and sound half precision."""

import pytest
import torch
from safetensors.torch import load_file

from chatglm.model import ChatGLMForConditionalGeneration

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def golden_on_gpu(golden_folder):
    return load_file(golden_folder / "model.safetensors", device="cuda")


def load(checkpoint_folder, dtype):
    model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint_folder, dtype=dtype)
    return model.cuda().eval()


@pytest.mark.parametrize("cache", [None, "static", "dynamic"])
def test_greedy_tokens_on_the_gpu_are_the_released_ones(checkpoint_folder, golden_on_gpu, cache):
    model = load(checkpoint_folder, torch.float32)
    for name in ("greedy", "greedy_batch"):
        expected = golden_on_gpu[f"{name}.output_ids"]
        settings = {} if cache is None else {"cache_implementation": cache}
        output = model.generate(
            golden_on_gpu[f"{name}.input_ids"],
            max_length=expected.shape[1],
            do_sample=False,
            **settings,
        )
        assert torch.equal(output, expected)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_half_precision_is_close_to_fp32_on_the_gpu(checkpoint_folder, golden_on_gpu, dtype, bound):
    logits = load(checkpoint_folder, dtype)(golden_on_gpu["single.input_ids"]).logits.float()
    expected = golden_on_gpu["single.logits"]
    assert (logits - expected).norm() / expected.norm() < bound


def test_the_forward_pass_does_not_wait_for_the_gpu(checkpoint_folder, golden_on_gpu):
    model = load(checkpoint_folder, torch.float16)
    ids = golden_on_gpu["single.input_ids"]
    model(ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            first = model(ids, use_cache=True)
            context, mask = model.transformer._find_context(ids, None, None, False)
            model(
                ids[:, -1:],
                past_key_values=first.past_key_values,
                position_ids=torch.full((1, 1), ids.shape[1], device="cuda"),
                context_lengths=context,
                mask_positions=mask,
            )
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_packed_on_the_gpu_as_on_the_cpu(checkpoint_folder, bits):
    there = load(checkpoint_folder, torch.float16).quantize(bits, quantize_embeddings=True)
    here = ChatGLMForConditionalGeneration.from_pretrained(checkpoint_folder, dtype=torch.float16)
    expected = here.quantize(bits, quantize_embeddings=True).state_dict()
    for name, tensor in there.state_dict().items():
        assert tensor.is_cuda and torch.equal(tensor.cpu(), expected[name]), name
