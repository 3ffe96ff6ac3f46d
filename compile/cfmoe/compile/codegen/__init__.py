"""From device functions in TIR to what GPU drivers take: SPIR-V, OpenCL C and MSL. Importing it teaches tvm.compile the target vulkan."""

from cfmoe.compile.codegen import vulkan_build as vulkan_build
