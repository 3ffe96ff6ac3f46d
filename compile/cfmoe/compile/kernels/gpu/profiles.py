"""The GPU profiles that artifacts can be compiled for."""

from __future__ import annotations

from cfmoe.compile.kernels.gpu.profile import Profile

# What a profile's kernels may ask of a device; docs/gpu.md says which Vulkan features and versions these are.
FEATURES = ("float16", "storage16", "integer_dot", "subgroup_shuffle")

_PHONE = frozenset({"integer_dot", "subgroup_shuffle"})
PROFILES = {
    profile.name: profile
    for profile in (
        # What every Vulkan 1.1 and OpenCL 1.2 device has.
        Profile("generic", frozenset(), 16384, 4, 4, 8192, row_threads=64, attention_threads=64, attention_splits=4, attention_rows=4),
        # Waves of 64 or 128: two or four thread rows each.
        Profile("adreno", _PHONE, 32768, 4, 8, 16384, row_threads=128, attention_threads=128, attention_splits=4, attention_rows=4),
        # Waves of 16, few registers: small workgroups.
        Profile("mali", _PHONE, 32768, 4, 4, 8192, row_threads=64, attention_threads=64, attention_splits=4, attention_rows=4),
        Profile("desktop", _PHONE, 32768, 8, 32, 131072, row_threads=256, attention_threads=256, attention_splits=16, attention_rows=8),
    )
}
