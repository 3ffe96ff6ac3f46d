/* What the module CZlib shows: the system's zlib, wherever its SDK keeps it. */
#include <zlib.h>
