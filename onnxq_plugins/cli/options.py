"""Options that several commands take, and how a command declares a group of them as one parameter."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from onnxq_plugins import runtimes
from onnxq_plugins.data import DataOptions
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.files import check_writable
from onnxq_plugins.recipe import load_recipe

# One panel of --help each.
data_option = functools.partial(typer.Option, rich_help_panel="Data")
recipe_option = functools.partial(typer.Option, rich_help_panel="Recipe")
output_option = functools.partial(typer.Option, rich_help_panel="Output")
search_option = functools.partial(typer.Option, rich_help_panel="Search")
work_option = functools.partial(typer.Option, rich_help_panel="Work")

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="an .onnx file", show_default=False)]
DataPath = Annotated[
    str,
    data_option(
        "--data",
        metavar="PATH",
        show_default=False,
        help="sample inputs: .npz or .npy (first axis: samples), a folder of images or of one .npz per feed, or "
        "package.module:callable",
    ),
]
SampleCount = Annotated[int, data_option(help="use this many, spread evenly; 0 for all")]
Labels = Annotated[
    Path | None,
    data_option(
        "--labels",
        show_default=False,
        help="one per sample: .npy, or text with one number per line (an .npz may hold them as 'labels')",
    ),
]
ShapeList = Annotated[
    list[str] | None,
    data_option(
        "--shape",
        metavar="INPUT=SIZES",
        show_default=False,
        help="instead of data, random numbers of this shape: x=1,3,480,480; repeatable",
    ),
]
RecipeName = Annotated[
    str, recipe_option("-r", "--recipe", show_default="int8", help="a built-in one (see onnxq recipes) or a file")
]
Settings = Annotated[
    list[str] | None,
    recipe_option("--set", metavar="KEY=VALUE", show_default=False, help="change a key: weights.bits=4, pass.key=value"),
]
Exclude = Annotated[
    list[str] | None,
    recipe_option(
        "--exclude", metavar="NAME", show_default=False, help="an operator that stays float, or a glob on names; repeatable"
    ),
]
TargetName = Annotated[str, recipe_option("--target", show_default=False, help="the runtime; the recipe's by default")]
Seed = Annotated[int | None, recipe_option(show_default=False, help="same seed, same result; 0 by default")]
Float32 = Annotated[bool, recipe_option("--float32", help="convert an fp16 or bf16 model to float32 first")]
MetricName = Annotated[
    str,
    search_option(
        "--metric",
        show_default=False,
        help="how a search judges a network: sqnr, agreement, top1 (needs labels), or package.module:function",
    ),
]
MinSqnr = Annotated[
    float | None,
    search_option(
        "--min-sqnr",
        show_default=False,
        help="dB that each output must have: what costs it most is kept in 16 bits or in float; exit code 1 and no file if "
        "that is not enough; the recipe's by default",
    ),
]
ClassAxis = Annotated[
    int | None,
    search_option(
        "--class-axis",
        show_default=False,
        help="axis of the outputs' classes, such as 1 for segmentation [N, C, H, W]; found by default",
    ),
]


def _register(libraries: list[Path] | None) -> list[Path] | None:
    """Load custom operators as soon as the option is read, for whatever the command does."""
    runtimes.register_custom_ops(*libraries or ())
    return libraries


CustomOps = Annotated[
    list[Path] | None,
    work_option(
        "--custom-ops",
        metavar="LIB.so",
        show_default=False,
        callback=_register,
        help="a shared library with operators that onnxruntime lacks; repeatable",
    ),
]


class OptionGroup:
    """Options that commands take together, as one parameter. A subclass is a frozen dataclass; its fields are annotated as
    Typer's parameters are."""


def flatten(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer needs it: each parameter that is an `OptionGroup` becomes one parameter per field, in its place.
    A group's parameter has no name on the command line."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if isinstance(kind, type) and issubclass(kind, OptionGroup):
            groups[parameter.name] = kind
            parameters += _field_parameters(kind)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kind))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        filled = {name: kind(**{f.name: values.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        command(**values, **filled)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _field_parameters(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if f.default is MISSING else f.default,
            annotation=hints[f.name],
        )
        for f in fields(group)
    ]


@dataclass(frozen=True)
class ImageOptions(OptionGroup):
    """How images and steps of streams become samples."""

    resize: Annotated[int, data_option(show_default=False, help="images: shorter side after resizing, in pixels")] = 0
    crop: Annotated[int, data_option(show_default=False, help="images: side of the square cut from the middle")] = 0
    size: Annotated[
        str, data_option(metavar="WxH", show_default=False, help="images: width and height after resizing, like 320x240")
    ] = ""
    letterbox: Annotated[
        bool, data_option("--letterbox", help="images: keep the ratio of the sides and pad to the size")
    ] = False
    padding: Annotated[int, data_option(help="images: grey of the letterbox, 0..255")] = DataOptions.padding
    bgr: Annotated[bool, data_option("--bgr", help="images: blue first, as OpenCV reads them")] = False
    range: Annotated[int, data_option(help="images: what white is; 255 for raw pixels")] = 1
    mean: Annotated[str, data_option(show_default=False, help="images: mean of RGB/255, like 0.485,0.456,0.406")] = ""
    std: Annotated[str, data_option(show_default=False, help="images: standard deviation of RGB/255, likewise")] = ""
    state: Annotated[
        list[str] | None,
        data_option(
            "--state",
            metavar="OUT=IN",
            show_default=False,
            help="samples are steps of a stream, in their order: output OUT is input IN of the next; repeatable",
        ),
    ] = None
    layout: Annotated[str, data_option(show_default=False, help="images: nchw or nhwc; the model's by default")] = ""

    def settings(self) -> list[str]:
        """As settings of a recipe. Raises OnnxqError for a mean or std that is no number."""
        settings = [f"data.{key}={value}" for key in ("resize", "crop") if (value := getattr(self, key))]
        settings += [
            f"data.{key}={value}"
            for key in ("padding", "range")
            if (value := getattr(self, key)) != getattr(DataOptions, key)
        ]
        settings += [f"data.{key}=true" for key in ("letterbox", "bgr") if getattr(self, key)]
        settings += [f"data.size=[{_sides(self.size)}]"] if self.size else []
        settings += [
            f"data.{key}=[{_decimals(key, text)}]" for key, text in (("mean", self.mean), ("std", self.std)) if text
        ]
        settings += [f"data.state={{{', '.join(map(_pair, self.state))}}}"] if self.state else []
        return settings + ([f'data.layout="{self.layout}"'] if self.layout else [])

    def data_options(self, samples: int = 0) -> DataOptions:
        """As options of `open_data`, for a command without a recipe."""
        return replace(load_recipe({}, {}, self.settings()).data, samples=samples)


def _sides(text: str) -> str:
    """Width and height as a TOML list."""
    sides = text.lower().split("x")
    if not 1 <= len(sides) <= 2 or not all(side.strip().isdecimal() for side in sides):
        raise OnnxqError(f"--size '{text}' must be width and height in pixels, such as 320x240.")
    return ",".join(str(int(side)) for side in (sides * 2)[:2])


def _pair(text: str) -> str:
    """OUT=IN as a pair of TOML."""
    output, _, name = (part.strip() for part in text.partition("="))
    if not output or not name:
        raise OnnxqError(f"--state '{text}' must be OUTPUT=INPUT, such as stateN=state.")
    return f"{json.dumps(output)} = {json.dumps(name)}"


def _decimals(option: str, text: str) -> str:
    """Numbers as TOML writes them, where .485 is none."""
    try:
        return ",".join(repr(float(part)) for part in text.split(","))
    except ValueError:
        raise OnnxqError(
            f"--{option} '{text}' must be a number or a list of numbers, such as 0.5 or 0.485,0.456,0.406."
        ) from None


@dataclass(frozen=True)
class RecipeOptions(OptionGroup):
    """The recipe, and what overrides it."""

    recipe: RecipeName = ""
    settings: Settings = None
    exclude: Exclude = None
    target: TargetName = ""
    seed: Seed = None

    def source(self, stored: tuple[dict[str, Any], int] | None = None) -> tuple[str | dict[str, Any], int]:
        """The recipe and the seed to run.

        stored   a recipe and a seed that come from a file instead of --recipe; --seed overrides the latter
        """
        if stored is None:
            return self.recipe or "int8", self.seed or 0
        return stored[0], stored[1] if self.seed is None else self.seed


@dataclass(frozen=True)
class GoalOptions(OptionGroup):
    """What the result must be."""

    min_sqnr: MinSqnr = None
    min_speed: Annotated[
        float | None,
        search_option(
            "--min-speed",
            show_default=False,
            help="times float that the result must run at, here, on one thread; exit code 1 and no file if it does not",
        ),
    ] = None
    keep: Annotated[bool, output_option("--keep", help="write the model even if --min-sqnr or --min-speed is missed")] = (
        False
    )
    no_check: Annotated[
        bool, work_option("--no-check", help="do not run both models side by side in the end: accuracy, speed, size")
    ] = False


@dataclass(frozen=True)
class WorkOptions(OptionGroup):
    """How the work is done."""

    workers: Annotated[int, work_option(help="parallel tasks; 0 for one per core")] = 0
    cache: Annotated[Path | None, work_option(show_default=False, help="folder that keeps statistics between runs")] = None
    custom_ops: CustomOps = None


@dataclass(frozen=True)
class ClusterOptions(OptionGroup):
    """Where the work is done."""

    dask: Annotated[
        str,
        work_option(
            "--dask",
            metavar="ADDRESS",
            show_default=False,
            help="run on a Dask cluster, such as tcp://host:8786",
        ),
    ] = ""
    processes: Annotated[bool, work_option("--processes", help="workers are processes, not threads")] = False

    @contextlib.contextmanager
    def backend(self) -> Iterator[None]:
        """Have joblib run work here: in threads of this process by default. Raises OnnxqError where Dask cannot."""
        import joblib

        if not self.dask:
            with joblib.parallel_config(backend="loky") if self.processes else contextlib.nullcontext():
                yield
            return
        try:
            from distributed import Client
        except ImportError as error:
            raise OnnxqError("--dask needs Dask; install it with: pip install 'onnxq-plugins[dask]'.") from error
        try:
            client = Client(self.dask, timeout="10s")  # type: ignore[no-untyped-call]
        except Exception as error:  # distributed raises OSError, ValueError and others
            raise OnnxqError(
                f"no Dask scheduler answers at '{self.dask}' ({type(error).__name__}); start one with 'dask scheduler', "
                "or correct the address."
            ) from error
        warnings.filterwarnings("ignore", message="Sending large graph")  # a network is sent with its task
        with client:
            if not client.scheduler_info()["workers"]:
                raise OnnxqError(
                    f"the Dask scheduler at '{self.dask}' has no workers; start some with 'dask worker {self.dask}'."
                )
            with joblib.parallel_config(backend="dask"):
                yield


def read_shapes(texts: list[str] | None) -> dict[str, list[int]] | None:
    """The shapes of --shape by input. Raises OnnxqError for what is none."""
    shapes = {}
    for text in texts or ():
        name, _, sizes = text.rpartition("=")
        try:
            shapes[name] = [int(size) for size in sizes.strip("[] ").split(",") if size.strip()]
        except ValueError:
            name = ""
        if not name or min(shapes[name], default=0) < 0:
            raise OnnxqError(f"--shape '{text}' must be an input and its sizes, such as x=1,3,480,480.")
    return shapes or None


def check_outputs(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None]) -> None:
    """Raise OnnxqError for an output that cannot be written, is one of the inputs, or is named twice.

    outputs   option -> path
    inputs    what a path is, in a word -> path
    """
    options: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        check_writable(path)
        for noun, source in inputs.items():
            if path.exists() and source is not None and source.exists() and path.samefile(source):
                raise OnnxqError(f"output '{path}' is the {noun} itself; give another file with {option}.")
        if (other := options.setdefault(path.resolve(), option)) != option:
            raise OnnxqError(f"{other} and {option} are both '{path}'; choose another file for one.")
