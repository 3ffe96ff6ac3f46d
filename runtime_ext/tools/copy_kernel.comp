// Copies n vectors of 16 bytes: what reading and writing memory costs at best. Compiled into copy_kernel.h by
//   glslangValidator -V --target-env vulkan1.1 --vn kCopySpirv -o copy_kernel.h copy_kernel.comp
#version 450
layout(local_size_x = 256) in;
layout(set = 0, binding = 0) readonly buffer From { uvec4 from[]; };
layout(set = 0, binding = 1) writeonly buffer To { uvec4 to[]; };
layout(push_constant) uniform Scalars { int n; };

void main() {
  const uint step = gl_NumWorkGroups.x * 256;
  for (uint i = gl_GlobalInvocationID.x; i < uint(n); i += step) to[i] = from[i];
}
