// c[i] = a[i] * factor + c[i] for i < n. Compiled into multiply_add.h by
//   glslangValidator -V --target-env vulkan1.1 --vn kMultiplyAdd -o multiply_add.h multiply_add.comp
#version 450
layout(local_size_x = 64) in;
layout(set = 0, binding = 0) readonly buffer A { float a[]; };
layout(set = 0, binding = 1) buffer C { float c[]; };
layout(push_constant) uniform Scalars { int n; int factor; };

void main() {
  uint i = gl_GlobalInvocationID.x;
  if (i < uint(n)) c[i] = a[i] * float(factor) + c[i];
}
