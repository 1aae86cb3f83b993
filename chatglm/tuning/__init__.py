"""What is trained of a model: all, its last layers, virtual tokens, or adapters around linears."""

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
