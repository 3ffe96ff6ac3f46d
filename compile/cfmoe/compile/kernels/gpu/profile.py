"""What a GPU profile offers, as far as schedules depend on it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Profile:
    """Sizes of workgroups count threads. `features` are names of targets.GPU_FEATURES."""

    name: str
    features: frozenset[str]
    shared_bytes: int  # of one workgroup
    min_thread_rows: int  # rows of 32 threads that share the inputs of a tile in decode …
    thread_rows: int  # … and where a matrix has so few tiles that its threads stay below the next number
    threads_at_once: int  # that fill the device
    row_threads: int  # of kernels that handle one row of activations
    attention_threads: int
    attention_splits: int  # parts that the positions of one row are cut into in decode
    attention_rows: int  # queries that share one pass over keys and values in prefill

    @property
    def shuffles(self) -> bool:
        return "subgroup_shuffle" in self.features

    def without_vulkan(self) -> Profile:
        """The same sizes without what only Vulkan kernels use: OpenCL C and MSL have plain forms of it."""
        return replace(self, features=frozenset())
