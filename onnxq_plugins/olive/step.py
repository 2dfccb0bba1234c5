"""The pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from olive.common.config_utils import ParamCategory, validate_config
from olive.data.config import DataConfig
from olive.exception import OlivePassError
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam
from olive.search.search_parameter import Categorical

from onnxq_plugins import engine
from onnxq_plugins.errors import OnnxqError

# Execution provider -> the target whose rules its kernels follow; the recipe's own for all others.
_TARGETS = {"OpenVINOExecutionProvider": "openvino", "QNNExecutionProvider": "npu"}


class OnnxqQuantization(Pass):
    """Quantize an ONNX model by a recipe. A recipe or target that cannot be had fails its point of a search, with the
    sentences of OnnxqError; the search goes on."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        target = _TARGETS.get(str(accelerator_spec.execution_provider), "")
        return {
            "recipe": PassConfigParam(
                type_=str,
                default_value="int8",
                search_defaults=Categorical(["int8", "int8-rounded"]),
                description="a built-in recipe or a file; a list of them is searched",
            ),
            "target": PassConfigParam(
                type_=str,
                default_value=target,
                search_defaults=Categorical([target]),
                description="what will run the model, that of the execution provider by default; a list is searched",
            ),
            "settings": PassConfigParam(
                type_=dict[str, Any], default_value=None, description='changes to the recipe, such as {"weights.bits": 4}'
            ),
            "exclude": PassConfigParam(
                type_=list[str], default_value=None, description="operators that stay float: names, or globs on them"
            ),
            "data": PassConfigParam(
                type_=str,
                default_value=None,
                category=ParamCategory.DATA,
                description="samples: .npz, .npy, or a folder of images or of one .npz per feed",
            ),
            "data_config": PassConfigParam(
                type_=DataConfig | dict[str, Any], default_value=None, description="samples as Olive describes them"
            ),
            "samples": PassConfigParam(type_=int, default_value=0, description="how many to use, spread evenly; 0 for all"),
            "min_sqnr": PassConfigParam(
                type_=float, default_value=None, description="dB that each output must have; the pass fails without"
            ),
            "seed": PassConfigParam(type_=int, default_value=0, description="same seed, same result"),
        }

    def _run_for_config(self, model: Any, config: BasePassConfig, output_model_path: str) -> ONNXModelHandler:
        if not isinstance(model, ONNXModelHandler):
            raise OlivePassError(
                f"OnnxqQuantization takes ONNX models, not {type(model).__name__}; put OnnxConversion before it."
            )
        path = resolve_onnx_path(output_model_path, Path(model.model_path).name)
        try:
            result = engine.quantize(
                model.model_path,
                config.recipe,
                _samples(config),
                output=path,
                target=config.target or None,
                settings=config.settings or {},
                exclude=config.exclude or (),
                samples=config.samples,
                min_sqnr=config.min_sqnr,
                seed=config.seed,
            )
        except OnnxqError as error:
            raise OlivePassError(str(error)) from error
        if result.missed:
            raise OlivePassError(result.missed)
        return ONNXModelHandler(model_path=path)


def _samples(config: BasePassConfig) -> Any:
    """The samples, or None for recipes that need none."""
    if config.data_config is None:
        return config.data or None
    return validate_config(config.data_config, DataConfig).to_data_container().create_dataloader()
