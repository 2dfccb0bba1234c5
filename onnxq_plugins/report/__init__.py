"""How good a result is and why: the comparison with float, the diagnosis with causes and remedies, the curve of a search,
plots and the page."""

from onnxq_plugins.report.page import write_report

__all__ = ["write_report"]
