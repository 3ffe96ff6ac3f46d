#!/usr/bin/env bash
# Sees that the compiler, doctest and Python's venv module are there, and what the groups named need; as root on Debian or Ubuntu installs
# what is missing.
# Run as: scripts/system_packages.sh PYTHON [gpu] [android]
set -euo pipefail
python=${1:?the Python interpreter}
shift

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "error: $python is not Python 3.11 or newer; install one and run make PYTHON=/path/to/python3" >&2
  exit 1
fi

missing=()
command -v g++ >/dev/null || missing+=(g++)
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  missing+=("$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')")
[ -e /usr/include/doctest/doctest.h ] || [ -e /usr/local/include/doctest/doctest.h ] ||
  [ -n "${DOCTEST_INCLUDE:-}" ] || missing+=(doctest-dev)
loader() { PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null | grep -q "$1" || missing+=("$2"); }
for group in "$@"; do
  case $group in
    gpu)
      # The shader compiler and its validator; for tests loaders, drivers that run on the CPU and Khronos' validation layer.
      command -v glslangValidator >/dev/null || missing+=(glslang-tools)
      command -v spirv-opt >/dev/null && command -v spirv-val >/dev/null || missing+=(spirv-tools)
      loader libvulkan.so.1 libvulkan1
      loader libOpenCL.so.1 ocl-icd-libopencl1
      ls /usr/share/vulkan/icd.d/lvp_icd* >/dev/null 2>&1 || missing+=(mesa-vulkan-drivers)
      ls /usr/share/vulkan/explicit_layer.d/VkLayer_khronos_validation* >/dev/null 2>&1 || missing+=(vulkan-validationlayers)
      ls /etc/OpenCL/vendors/pocl* >/dev/null 2>&1 || missing+=(pocl-opencl-icd)
      ;;
    android)
      command -v javac >/dev/null && command -v keytool >/dev/null || missing+=(openjdk-17-jdk-headless)
      for tool in aapt2:aapt zipalign:zipalign apksigner:apksigner dexdump:dexdump npm:npm; do
        command -v "${tool%%:*}" >/dev/null || missing+=("${tool#*:}")
      done
      [ -e /usr/share/android-framework-res/framework-res.apk ] || missing+=(android-framework-res)
      [ -e /usr/share/java/junit4.jar ] || missing+=(junit4)
      [ -e /usr/share/java/com.android.json.jar ] || missing+=(libandroid-json-java)
      # Runs the engine of the APK in the tests.
      command -v qemu-aarch64-static >/dev/null || missing+=(qemu-user-static)
      command -v readelf >/dev/null || missing+=(binutils)
      ;;
    *)
      echo "error: the group $group is unknown; there are: gpu, android" >&2
      exit 1
      ;;
  esac
done
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
else
  echo "error: missing system packages: ${missing[*]}; on Debian or Ubuntu run: sudo apt-get install ${missing[*]}" >&2
  exit 1
fi
