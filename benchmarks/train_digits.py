"""Train the embedded digits model and write `onnxq_plugins/cli/digits.onnx`.

    python -m benchmarks.train_digits

Needs torch in addition to the package's own dependencies; nothing else in the project does. The ONNX graph
is built by hand from the trained weights instead of being exported by torch: the names stay
readable, and the BatchNormalization nodes stay unfolded, which an exporter in evaluation mode would
not leave. The seed is fixed, so one torch build on one kind of CPU writes the same bytes each time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from onnxq_plugins.cli.digits import digits_model_path, digits_split

SEED = 0
EPOCHS = 80
BATCH = 64
PEAK_LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.02
LABEL_SMOOTHING = 0.05
TOLERANCE = 1e-4


@dataclass(frozen=True)
class BlockSpec:
    """One inverted residual block: 1x1 expand, 3x3 depthwise, linear 1x1 project."""

    name: str
    inputs: int
    expanded: int
    outputs: int
    stride: int

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.inputs == self.outputs


STEM = 24
HEAD = 96
BLOCKS = (
    BlockSpec("block1", STEM, 96, 24, 1),
    BlockSpec("block2", 24, 96, 32, 2),
    BlockSpec("block3", 32, 128, 32, 1),
    BlockSpec("block4", 32, 128, 48, 2),
    BlockSpec("block5", 48, 144, 48, 1),
)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    # No bias: the BatchNormalization that follows every convolution has its own.
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class DigitsNet(nn.Module):
    """Images [N, 1, 8, 8] to logits [N, 10]. Layers are stored under their names in the graph."""

    def __init__(self) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {}

        def add(name: str, layer: nn.Conv2d) -> None:
            layers[name] = layer
            layers[f"{name}_bn"] = nn.BatchNorm2d(layer.out_channels)

        add("stem", conv(1, STEM, 3))
        for b in BLOCKS:
            add(f"{b.name}_expand", conv(b.inputs, b.expanded, 1))
            add(f"{b.name}_depthwise", conv(b.expanded, b.expanded, 3, b.stride, b.expanded))
            add(f"{b.name}_project", conv(b.expanded, b.outputs, 1))
        add("head", conv(BLOCKS[-1].outputs, HEAD, 1))
        layers["classifier"] = nn.Linear(HEAD, 10)
        self.layers = nn.ModuleDict(layers)

    def _conv_bn(self, name: str, x: Tensor) -> Tensor:
        y: Tensor = self.layers[f"{name}_bn"](self.layers[name](x))
        return y

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self._conv_bn("stem", x))
        for b in BLOCKS:
            y = functional.relu6(self._conv_bn(f"{b.name}_expand", x))
            y = functional.relu6(self._conv_bn(f"{b.name}_depthwise", y))
            y = self._conv_bn(f"{b.name}_project", y)
            x = x + y if b.residual else y
        x = functional.relu6(self._conv_bn("head", x)).mean(dim=(2, 3))
        logits: Tensor = self.layers["classifier"](x)
        return logits


def shifted(images: Tensor) -> Tensor:
    """Shift each image [N, 1, 8, 8] by -1, 0 or 1 pixel along both axes, filling with zeros."""
    padded = functional.pad(images, (1, 1, 1, 1))
    count = len(images)
    # Half the draws leave an axis alone: the digits nearly fill the 8x8 frame, a shift cuts strokes.
    offsets = torch.tensor([0, 1, 1, 2])[torch.randint(0, 4, (2, count))]
    rows = (offsets[0][:, None] + torch.arange(8))[:, :, None]
    columns = (offsets[1][:, None] + torch.arange(8))[:, None, :]
    return padded[torch.arange(count)[:, None, None], 0, rows, columns][:, None]


def train(images: Tensor, labels: Tensor) -> DigitsNet:
    """Train for a fixed number of epochs; the last weights are kept, no epoch is selected."""
    torch.manual_seed(SEED)
    net = DigitsNet()
    # A last batch of a few images would upset the running statistics of BatchNorm: it is dropped.
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=EPOCHS * steps)
    net.train()
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images))
        total = 0.0
        for step in range(steps):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            logits = net(shifted(images[chosen]))
            loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1}: training loss {total / steps:.4f}", flush=True)
    return net.eval()


class GraphWriter:
    """Collects nodes and initializers; each node's output carries the node's name."""

    def __init__(self, net: DigitsNet) -> None:
        self.net = net
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.constant("relu6_min", np.array(0, np.float32))
        self.constant("relu6_max", np.array(6, np.float32))

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def parameter(self, name: str, value: Tensor) -> str:
        return self.constant(name, value.detach().numpy())

    def node(self, op: str, name: str, inputs: list[str], output: str = "", **attributes: object) -> str:
        output = output or f"{name}_output"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def conv_bn(self, name: str, x: str) -> str:
        layer = self.net.layers[name]
        norm = self.net.layers[f"{name}_bn"]
        assert isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None and norm.running_var is not None
        pad_y, pad_x = layer.kernel_size[0] // 2, layer.kernel_size[1] // 2
        x = self.node(
            "Conv",
            name,
            [x, self.parameter(f"{name}_weight", layer.weight)],
            kernel_shape=list(layer.kernel_size),
            strides=list(layer.stride),
            pads=[pad_y, pad_x, pad_y, pad_x],
            dilations=[1, 1],
            group=layer.groups,
        )
        statistics = [
            self.parameter(f"{name}_bn_scale", norm.weight),
            self.parameter(f"{name}_bn_bias", norm.bias),
            self.parameter(f"{name}_bn_mean", norm.running_mean),
            self.parameter(f"{name}_bn_var", norm.running_var),
        ]
        return self.node("BatchNormalization", f"{name}_bn", [x, *statistics], epsilon=norm.eps)

    def conv_bn_relu6(self, name: str, x: str) -> str:
        return self.node("Clip", f"{name}_relu6", [self.conv_bn(name, x), "relu6_min", "relu6_max"])


def build(net: DigitsNet) -> onnx.ModelProto:
    """The ONNX model: `image` [N, 1, 8, 8] to `logits` [N, 10]."""
    graph = GraphWriter(net)
    x = graph.conv_bn_relu6("stem", "image")
    for b in BLOCKS:
        y = graph.conv_bn_relu6(f"{b.name}_expand", x)
        y = graph.conv_bn_relu6(f"{b.name}_depthwise", y)
        y = graph.conv_bn(f"{b.name}_project", y)
        x = graph.node("Add", f"{b.name}_add", [x, y]) if b.residual else y
    x = graph.conv_bn_relu6("head", x)
    x = graph.node("GlobalAveragePool", "pool", [x])
    x = graph.node("Flatten", "flatten", [x], axis=1)
    classifier = net.layers["classifier"]
    assert isinstance(classifier, nn.Linear)
    weight = graph.parameter("classifier_weight", classifier.weight)
    bias = graph.parameter("classifier_bias", classifier.bias)
    graph.node("Gemm", "classifier", [x, weight, bias], output="logits", transB=1)

    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "digits",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 8, 8])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="onnxq-plugins",
        doc_string="Handwritten digits, 8x8 grey images in 0..1: a depthwise-separable residual CNN "
        "in MobileNetV2 style, BatchNormalization not folded.",
    )
    helper.set_model_props(model, {"source": "benchmarks/train_digits.py, scikit-learn digits"})
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, images: np.ndarray) -> tuple[str, np.ndarray]:
    """Logits [N, 10] of the model, and the runtime that computed them."""
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        return "onnx reference evaluator", np.asarray(ReferenceEvaluator(model).run(None, {"image": images})[0])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return "onnxruntime", np.asarray(session.run(None, {"image": images})[0])


def main() -> None:
    # Threads would change the order of sums, and with it the weights.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    split = digits_split()
    net = train(torch.from_numpy(split["train_images"]), torch.from_numpy(split["train_labels"]))
    print(f"trained in {time.perf_counter() - started:.0f} s")

    model = build(net)
    with torch.no_grad():
        expected = net(torch.from_numpy(split["test_images"])).numpy()
    evaluator, logits = run(model, split["test_images"])
    difference = float(np.abs(logits - expected).max())
    print(f"largest difference of logits, torch and {evaluator}: {difference:.1e}")
    if not difference <= TOLERANCE:
        raise SystemExit(f"the ONNX model disagrees with torch by more than {TOLERANCE:g}; nothing written")
    accuracy = float((logits.argmax(axis=1) == split["test_labels"]).mean())
    print(f"test accuracy: {accuracy:.4f} of {len(logits)} images")

    path = digits_model_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString(deterministic=True))
    print(f"wrote {path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
