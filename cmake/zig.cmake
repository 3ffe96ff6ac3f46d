# Toolchain: zig of the Python package ziglang as a cross compiler that brings its own C and C++ libraries.
#   -DCFMOE_ZIG_TARGET=aarch64-linux-musl -DPython_EXECUTABLE=PYTHON
# The executable lies in the package, so that nothing need be on PATH. For iOS it has headers and no libraries: archives only.
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES CFMOE_ZIG_TARGET CFMOE_ZIG Python_EXECUTABLE)
if(NOT CFMOE_ZIG)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "import ziglang, pathlib; print(pathlib.Path(ziglang.__file__).with_name('zig'))"
    OUTPUT_VARIABLE CFMOE_ZIG OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "The Python package ziglang is missing from ${Python_EXECUTABLE}: pip install 'cfmoe[cross]'.")
  endif()
endif()
if(NOT EXISTS "${CFMOE_ZIG}")
  message(FATAL_ERROR "The Python package ziglang has no compiler at ${CFMOE_ZIG}: pip install --force-reinstall ziglang.")
endif()
string(REGEX MATCH "^[^-]+" CMAKE_SYSTEM_PROCESSOR "${CFMOE_ZIG_TARGET}")
set(CMAKE_CXX_COMPILER "${CFMOE_ZIG}" c++)
set(CMAKE_CXX_COMPILER_TARGET "${CFMOE_ZIG_TARGET}")
# zig writes debug information unless it is told not to: five sixths of an archive.
set(CMAKE_CXX_FLAGS_INIT "-target ${CFMOE_ZIG_TARGET} -g0")
# To link, zig would first compile its libraries, in a mode that the build does not use.
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
if(CFMOE_ZIG_TARGET MATCHES "-ios")
  # CMake's own iOS wants Xcode.
  set(CMAKE_SYSTEM_NAME Generic)
  get_filename_component(zig_directory "${CFMOE_ZIG}" DIRECTORY)
  string(APPEND CMAKE_CXX_FLAGS_INIT " -isystem ${zig_directory}/lib/libc/include/any-darwin-any -fPIC")
  # Apps take libc++ from iOS: zig's headers are to call nothing that the oldest iOS lacks, as Apple's do.
  set(availability _LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS)
  string(APPEND CMAKE_CXX_FLAGS_INIT " -U${availability} -D${availability}=1")
  set(CMAKE_CXX_ARCHIVE_CREATE "\"${CFMOE_ZIG}\" ar --format=darwin qcs <TARGET> <OBJECTS>")
  set(CMAKE_CXX_ARCHIVE_FINISH "")
else()
  set(CMAKE_SYSTEM_NAME Linux)
endif()
