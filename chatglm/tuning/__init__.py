"""What is trained of a model: all, its last layers, virtual tokens, or adapters around linears."""
