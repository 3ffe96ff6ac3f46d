"""Kernels written directly in TIR; each module emits PrimFuncs for one operation."""
