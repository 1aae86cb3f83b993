"""Freezing the lower layers: the cheapest way to train less."""

from ..errors import ToolkitError
from ..model import ChatGLMForConditionalGeneration


def freeze_layers(model: ChatGLMForConditionalGeneration, num_layers: int) -> None:
    """Freeze the embedding and the first `num_layers` layers; the layers above and the head train.

    The embedding goes with them: training it would carry gradients down through all that is frozen.

    Raises:
        ToolkitError: if no layer is left.
    """
    layers = model.transformer.layers
    if num_layers >= len(layers):
        raise ToolkitError(
            f"global_num_layers_freeze {num_layers} leaves nothing of {len(layers)} layers to"
            f" train: allowed are 0 to {len(layers) - 1}"
        )
    model.transformer.word_embeddings.requires_grad_(False)
    for layer in layers[:num_layers]:
        layer.requires_grad_(False)
