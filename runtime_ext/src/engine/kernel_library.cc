// Kernels by way of tvm-ffi's module loader.
#include "engine/kernel_library.h"

#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <map>
#include <utility>

#include "engine/thread_pool.h"
#include "error.h"

namespace cfmoe {
namespace {

namespace ffi = tvm::ffi;

std::string one_line(std::string text) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

}  // namespace

struct KernelLibrary::Impl {
  std::string path;
  ffi::Module module;
  std::map<std::string, ffi::Function> functions;
};

void Kernel::fail() const {
  TVMFFIObjectHandle raised = nullptr;
  TVMFFIErrorMoveFromRaised(&raised);
  std::string reason = "it returned an error";
  if (raised != nullptr) {
    const auto* error =
        reinterpret_cast<const TVMFFIErrorCell*>(static_cast<const char*>(raised) + sizeof(TVMFFIObject));
    reason = one_line(std::string(error->message.data, error->message.size));
    TVMFFIObjectDecRef(raised);
  }
  throw Error(ErrorKind::kInternal, std::string("kernel ") + name + " failed: " + reason);
}

KernelLibrary::KernelLibrary(const std::string& path) {
  register_backend_symbols();
  try {
    impl_ = std::make_unique<Impl>(Impl{path, ffi::Module::LoadFromFile(path), {}});
  } catch (const ffi::Error& error) {
    throw Error(path + ": cannot be loaded: " + one_line(std::string(error.message())) +
                "; compile the artifact again on this kind of machine");
  }
}

KernelLibrary::KernelLibrary(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

#if defined(CFMOE_STATIC_KERNELS)

bool KernelLibrary::is_static() { return true; }

// The compiler's build_static names kernels by the set that they belong to: the same shapes, formats and target.
std::unique_ptr<KernelLibrary> KernelLibrary::linked(const std::string& directory, const std::string& kernel_set,
                                                     const std::string& target) {
  std::string prefix = "cfmoe_" + kernel_set.substr(0, 16) + "_" + target + "_";
  std::replace(prefix.begin(), prefix.end(), '-', '_');
  const std::string all = std::string(",") + CFMOE_STATIC_KERNELS + ",";
  if (all.find("," + prefix + ",") == std::string::npos) {
    throw Error(directory + ": needs the kernels " + prefix + " and this program was built with " +
                (all.size() > 2 ? all.substr(1, all.size() - 2) : "none") +
                ": it runs models of the same shapes and quantisation only; build it with this artifact's kernels");
  }
  const auto open = ffi::Function::GetGlobalRequired("ffi.SystemLib");
  return std::unique_ptr<KernelLibrary>(
      new KernelLibrary(std::make_unique<Impl>(Impl{prefix, open(prefix).cast<ffi::Module>(), {}})));
}

#else

bool KernelLibrary::is_static() { return false; }

std::unique_ptr<KernelLibrary> KernelLibrary::linked(const std::string& directory, const std::string&,
                                                     const std::string&) {
  throw Error(ErrorKind::kInternal, directory + ": this program has no kernels of its own");
}

#endif

KernelLibrary::~KernelLibrary() = default;

Kernel KernelLibrary::get(const std::string& name) {
  auto found = impl_->functions.find(name);
  if (found == impl_->functions.end()) {
    ffi::Optional<ffi::Function> function = impl_->module->GetFunction(name);
    if (!function) throw Error(impl_->path + ": has no kernel " + name + "; compile the artifact again");
    found = impl_->functions.emplace(name, *std::move(function)).first;
  }
  const auto* object = static_cast<const ffi::FunctionObj*>(found->second.get());
  return {object->safe_call, const_cast<ffi::FunctionObj*>(object), found->first.c_str()};
}

}  // namespace cfmoe
