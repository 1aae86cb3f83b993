"""The switches of the weights; and what a user needs to build and load a model.

from models import load_for_inference
model, tokenizer = load_for_inference("./best_ckpt/last")
"""

from typing import Any

from chatglm.building import build_model, build_tokenizer, load_for_inference, resolve_settings
from chatglm.configuration import ChatGLMConfig
from chatglm.model import ChatGLMForConditionalGeneration
from chatglm.tokenizer import ChatGLMTokenizer

__all__ = [
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "ChatGLMTokenizer",
    "build_model",
    "build_tokenizer",
    "load_for_inference",
    "resolve_settings",
]

# Train only the layers above the first so many; 0: all layers.
global_num_layers_freeze = 0

# p-tuning v2: so many virtual tokens, computed through two linears if prefix_projection. None: as
# config_name says (./config/config_ptv2.json), else no p-tuning.
pre_seq_len = None
prefix_projection = None

# How frozen weights are held under LoRA, AdaLoRA and p-tuning, and by infer.py: packed the released
# way into 8 or 4 bits (None: as stored), or by bitsandbytes in int8 or nf4.
quantization_bit = None
load_in_8bit = False
load_in_4bit = False

# Train head and embedding in full as one tensor. None: as config.json says.
tie_word_embeddings = None

model_switches: dict[str, Any] = {
    "global_num_layers_freeze": global_num_layers_freeze,
    "pre_seq_len": pre_seq_len,
    "prefix_projection": prefix_projection,
    "quantization_bit": quantization_bit,
    "load_in_8bit": load_in_8bit,
    "load_in_4bit": load_in_4bit,
    "tie_word_embeddings": tie_word_embeddings,
}
