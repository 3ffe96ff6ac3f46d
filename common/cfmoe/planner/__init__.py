"""The budget planner: from a trace, a model's footprint and a device's speeds to a curve of memory against speed."""
