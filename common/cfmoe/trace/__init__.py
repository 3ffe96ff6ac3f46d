"""Routing traces: which experts each token was routed to. docs/trace-format.md is the contract of the file."""

from cfmoe.trace.trace import Phase, Segment, Trace, window_segments

__all__ = ["Phase", "Segment", "Trace", "window_segments"]
