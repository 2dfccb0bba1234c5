"""The command line. Exit codes: 0 done, 1 something went wrong inside, 2 the input cannot be used, 130 interrupted."""

from __future__ import annotations

import logging
import traceback
import warnings

# isort: off
from onnxq_plugins import runtimes
from onnxq_plugins.cli import make, look, about  # the help lists commands in the order of these imports

# isort: on
from onnxq_plugins.cli.console import app, complain
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.laws import LawBroken

__all__ = ["about", "app", "look", "main", "make"]


def main() -> None:
    """Run the command line; complaints about input become one line each on standard error."""
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's: what is not finite is told in a sentence
    runtimes.quiet()
    try:
        app()
    except LawBroken as error:
        if error.__cause__ is not None:  # whoever writes the pass wants to see where
            traceback.print_exception(error.__cause__, limit=-3)
        complain(error, 1)
    except OnnxqError as error:
        complain(error, 2)
