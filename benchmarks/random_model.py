"""A model of random weights, for what does not depend on them: speed and size."""

import torch

from chatglm.configuration import ChatGLMConfig
from chatglm.model import ChatGLMForConditionalGeneration


def random_model(
    config: ChatGLMConfig, *, dtype: torch.dtype, device: str
) -> ChatGLMForConditionalGeneration:
    """Head and embedding are one tensor, as in the pretrained weights; int8 and int4 by config."""
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config)
    model.lm_head.weight = model.transformer.word_embeddings.weight
    model = model.to(dtype).to_empty(device=device).eval()
    model.lm_head.weight = model.transformer.word_embeddings.weight
    torch.manual_seed(0)
    steps = 127 if config.quantization_bit == 8 else 7
    for name, tensor in model.state_dict().items():
        if tensor.dtype == torch.int8:
            tensor.random_(-128, 128)
        elif name.endswith("weight_scale"):
            tensor.fill_(0.02 * 3.5 / steps)
        elif "layernorm" in name:
            tensor.fill_(float(name.endswith("weight")))
        else:
            tensor.normal_(0, 0.02)
    return model
