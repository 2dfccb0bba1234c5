"""Passes of onnx-ir: quantization by a recipe, and each exact rewrite of the float model, to compose with other passes.

    from onnx_ir.passes import Sequential
    from onnxq_plugins.ir import QuantizePass

    quantized = Sequential(..., QuantizePass("int8", samples))(model).model

Needs onnx-ir: pip install 'onnxq-plugins[ir]'."""

try:
    import onnx_ir as _onnx_ir  # noqa: F401  whether it is there
except ImportError as error:
    raise ImportError("onnxq_plugins.ir needs onnx-ir; install it with: pip install 'onnxq-plugins[ir]'") from error

from onnxq_plugins.ir.passes import Centre, Equalize, Fuse, QuantizePass, Reorder, RewritePass, quantize

__all__ = ["Centre", "Equalize", "Fuse", "QuantizePass", "Reorder", "RewritePass", "quantize"]
