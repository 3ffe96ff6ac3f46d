// Asks the CPU and the operating system for instruction sets, and matches them with targets.
#include "artifact/cpu_features.h"

#include <algorithm>

#include "error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace cfmoe {

#if defined(__x86_64__)

CpuFacts host_cpu() {
  CpuFacts cpu{"x86_64", {}};
  auto add = [&cpu](bool supported, const char* name) {
    if (supported) cpu.features.insert(name);
  };
  __builtin_cpu_init();
  add(__builtin_cpu_supports("sse4.2"), "sse4.2");
  add(__builtin_cpu_supports("avx"), "avx");
  add(__builtin_cpu_supports("avx2"), "avx2");
  add(__builtin_cpu_supports("fma"), "fma");
  add(__builtin_cpu_supports("bmi2"), "bmi2");
  add(__builtin_cpu_supports("avx512f"), "avx512f");
  add(__builtin_cpu_supports("avx512bw"), "avx512bw");
  add(__builtin_cpu_supports("avx512dq"), "avx512dq");
  add(__builtin_cpu_supports("avx512vl"), "avx512vl");
  add(__builtin_cpu_supports("avx512cd"), "avx512cd");
  add(__builtin_cpu_supports("avx512vnni"), "avx512vnni");
  // Not every compiler's __builtin_cpu_supports knows f16c; its registers are AVX's, so AVX's check covers the
  // operating system.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  add(__builtin_cpu_supports("avx") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1u << 29)) != 0, "f16c");
  return cpu;
}

#elif defined(__aarch64__) && defined(__linux__)

CpuFacts host_cpu() {
  CpuFacts cpu{"aarch64", {}};
  unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  auto add = [&cpu](bool supported, const char* name) {
    if (supported) cpu.features.insert(name);
  };
  add((first & HWCAP_ASIMD) != 0, "neon");
  add((first & HWCAP_ASIMDDP) != 0, "dotprod");
  add((first & HWCAP_ASIMDHP) != 0, "fullfp16");
  add((second & HWCAP2_I8MM) != 0, "i8mm");
  return cpu;
}

#elif defined(__aarch64__) && defined(__APPLE__)

CpuFacts host_cpu() {
  CpuFacts cpu{"aarch64", {"neon"}};
  auto add = [&cpu](const char* key, const char* name) {
    int value = 0;
    size_t size = sizeof(value);
    if (sysctlbyname(key, &value, &size, nullptr, 0) == 0 && value != 0) cpu.features.insert(name);
  };
  add("hw.optional.arm.FEAT_DotProd", "dotprod");
  add("hw.optional.arm.FEAT_FP16", "fullfp16");
  add("hw.optional.arm.FEAT_I8MM", "i8mm");
  return cpu;
}

#else
#error "CFMoE runs on x86_64 and aarch64"
#endif

std::vector<std::string> missing_for(const TargetEntry& target, const CpuFacts& cpu) {
  if (target.arch != cpu.arch) return {"an " + target.arch + " CPU"};
  std::vector<std::string> missing;
  for (const std::string& feature : target.features) {
    if (!cpu.features.contains(feature)) missing.push_back(feature);
  }
  return missing;
}

const TargetEntry& pick_cpu_target(const Manifest& manifest, const std::string& path, const CpuFacts& cpu) {
  const TargetEntry* best = nullptr;
  std::string reasons;
  for (const TargetEntry& target : manifest.targets) {
    if (target.device != "cpu") continue;
    std::vector<std::string> missing = missing_for(target, cpu);
    if (missing.empty()) {
      if (best == nullptr || target.features.size() > best->features.size()) best = &target;
      continue;
    }
    reasons += (reasons.empty() ? "" : "; ") + target.name + " needs ";
    for (size_t i = 0; i < missing.size(); ++i) reasons += (i == 0 ? "" : ", ") + missing[i];
  }
  if (best != nullptr) return *best;
  throw Error(path + ": no target of this artifact runs on this " + cpu.arch +
              " CPU: " + (reasons.empty() ? "it has none for a CPU" : reasons) +
              "; compile the model on this machine, or with cfmoe compile --target for this CPU");
}

}  // namespace cfmoe
