// Declaration of what runtime_ext/src/device/metal uses of the system's os/proc.h.
#pragma once
#include <stddef.h>
#ifdef __cplusplus
extern "C"
#endif
size_t os_proc_available_memory(void);
