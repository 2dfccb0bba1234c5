"""Quantization as a pass of Olive, and the list of passes with which `olive run` finds it.

    python -m onnxq_plugins.olive passes.json
    olive run --config workflow.json --package-config passes.json

Needs Olive: pip install 'onnxq-plugins[olive]'."""

try:
    import olive as _olive  # noqa: F401  whether it is there
except ImportError as error:
    raise ImportError(
        f"onnxq_plugins.olive needs Olive ({error}); install it with: pip install 'onnxq-plugins[olive]'"
    ) from error

from onnxq_plugins.olive.packages import package_config
from onnxq_plugins.olive.step import OnnxqQuantization

__all__ = ["OnnxqQuantization", "package_config"]
