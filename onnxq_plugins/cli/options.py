"""Options that several commands take, and what is made of them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.files import check_writable

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="an .onnx file", show_default=False)]
DataPath = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="PATH",
        show_default=False,
        help=("sample inputs: .npz or .npy (first axis = samples), a folder of images, or package.module:callable"),
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", show_default=False, help="where to write; MODEL.RECIPE.onnx in this folder if not given"),
]
RecipeName = Annotated[str, typer.Option("-r", "--recipe", help="a built-in recipe (see onnxq recipes) or a file")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", show_default=False, help="change the recipe: pass.key=value, weights.bits=4"),
]
TargetName = Annotated[str, typer.Option("--target", show_default=False, help="the runtime; the recipe's if not given")]
Samples = Annotated[int, typer.Option(help="use that many samples, spread evenly over the data; 0 for all")]
Resize = Annotated[int, typer.Option(help="images: shorter side after resizing, in pixels")]
Crop = Annotated[int, typer.Option(help="images: side of the square cut from the middle")]
Mean = Annotated[str, typer.Option(help="images: mean of RGB/255, one value or three, comma-separated")]
Std = Annotated[str, typer.Option(help="images: standard deviation of RGB/255, one value or three")]
Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        show_default=False,
        help=("one label a sample: .npy, or text with a number a line (an .npz may hold them as 'labels')"),
    ),
]
MetricName = Annotated[
    str,
    typer.Option(
        "--metric",
        show_default=False,
        help=("how searches judge a network: sqnr, agreement, top1 (wants labels), or your package.module:function"),
    ),
]
Layout = Annotated[str, typer.Option(help="images: nchw or nhwc; read off the model's input if not given")]


def image_settings(resize: int, crop: int, mean: str, std: str, layout: str) -> list[str]:
    settings = [f"data.{key}={value}" for key, value in (("resize", resize), ("crop", crop)) if value]
    settings += [f"data.{key}=[{_decimals(key, value)}]" for key, value in (("mean", mean), ("std", std)) if value]
    return settings + ([f'data.layout="{layout}"'] if layout else [])


def _decimals(name: str, text: str) -> str:
    """Numbers as TOML writes them: .485 is none there."""
    try:
        return ",".join(repr(float(part)) for part in text.split(","))
    except ValueError:
        raise OnnxqError(
            f"--{name} '{text}' must be a number or a list of numbers, such as 0.5 or 0.485,0.456,0.406."
        ) from None


def check_outputs(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None]) -> None:
    """Complain about an output that cannot be written, is one of the inputs, or is named twice."""
    seen: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        check_writable(path)
        for what, given in inputs.items():
            if path.exists() and given is not None and given.exists() and path.samefile(given):
                raise OnnxqError(f"output '{path}' is the {what} itself; give another file with {option}.")
        if path.resolve() in seen:
            raise OnnxqError(f"{seen[path.resolve()]} and {option} are both '{path}'; choose another file for one.")
        seen[path.resolve()] = option


@contextlib.contextmanager
def spread_over(dask: str, processes: bool) -> Iterator[None]:
    """Where joblib's work runs: threads of this process if nothing else is asked for."""
    import joblib

    if not dask:
        with joblib.parallel_config(backend="loky") if processes else contextlib.nullcontext():
            yield
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise OnnxqError("--dask needs Dask; install it with: pip install 'onnxq-plugins[dask]'.") from error
    try:
        client = Client(dask, timeout="10s")  # type: ignore[no-untyped-call]
    except Exception as error:  # distributed raises OSError, ValueError and others
        raise OnnxqError(
            f"no Dask scheduler answers at '{dask}' ({type(error).__name__}); start one with 'dask scheduler', "
            "or mend the address."
        ) from error
    warnings.filterwarnings("ignore", message="Sending large graph")  # a network is sent with its task
    with client:
        if not client.scheduler_info()["workers"]:
            raise OnnxqError(f"the Dask scheduler at '{dask}' has no workers; start some with 'dask worker {dask}'.")
        with joblib.parallel_config(backend="dask"):
            yield
