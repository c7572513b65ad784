"""The xopt operators, each an ONNX function."""
