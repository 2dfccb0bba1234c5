"""Quantization for OpenVINO with the arguments of `nncf.quantize`: an ov.Model that is read from our QDQ file, judged in
OpenVINO.

    from onnxq_plugins.openvino import quantize   # was: from nncf import quantize

    model = quantize("model.onnx", dataset)       # was: quantize(core.read_model("model.onnx"), dataset)

Needs OpenVINO: pip install 'onnxq-plugins[openvino]'. NNCF is not needed; its Dataset, IgnoredScope and enumerations are
taken as they are."""

try:
    import openvino as _openvino  # noqa: F401  whether it is there
except ImportError as error:
    raise ImportError(
        f"onnxq_plugins.openvino needs OpenVINO ({error}); install it with: pip install 'onnxq-plugins[openvino]'"
    ) from error

from onnxq_plugins.openvino.model import QuantizedModel, quantize

__all__ = ["QuantizedModel", "quantize"]
