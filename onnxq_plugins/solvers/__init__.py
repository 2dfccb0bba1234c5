"""Pure numpy solvers on arrays: no graph, no model, no state."""
