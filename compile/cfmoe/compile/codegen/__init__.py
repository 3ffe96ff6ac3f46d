"""From device functions in TIR to what GPU drivers take: SPIR-V, OpenCL C and MSL."""
