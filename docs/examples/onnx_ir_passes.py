"""Quantization between other passes of onnx-ir, and float rewrites alone. Needs: pip install 'onnxq-plugins[ir]'."""

import onnx_ir
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxq_plugins import ir, measure, runtimes
from onnxq_plugins.cli.digits import digits_model_path, digits_split

data = digits_split()
samples, test = data["calibration_images"], {"image": data["test_images"]}
model = onnx_ir.load(digits_model_path())

prepare = Sequential(RemoveUnusedNodesPass(), ir.Fuse(), ir.Equalize(samples))  # float rewrites, for any quantizer behind
step = ir.QuantizePass("int8", samples)
quantized = Sequential(prepare, step)(model).model
onnx_ir.save(quantized, "digits.int8.onnx")
print(step.result.summary)

original, rewritten, int8 = (
    runtimes.outputs(runtimes.session(onnx_ir.to_proto(one)), [test])[0] for one in (model, prepare(model).model, quantized)
)
print(f"the rewritten float model differs by {measure.drift([original], [rewritten]):.0e}")
print(f"quantized: SQNR {measure.sqnr(original, int8):.1f} dB")
