"""From a Hugging Face checkpoint to an artifact: kernels whose unit is one expert, and the plan that calls them."""

from cfmoe.compile.compiler import compile_model

__all__ = ["compile_model"]
