"""Kernels for GPUs, written in TIR with explicit threads; the same layouts and numerics as the CPU's."""
