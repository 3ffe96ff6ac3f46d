/* Replaying a routing trace (docs/trace-format.md) against caches of any size and policy: the desktop half of the C
 * API. Conventions are those of cfmoe.h.
 */
#ifndef CFMOE_SIMULATE_H_
#define CFMOE_SIMULATE_H_

#include "cfmoe/cfmoe.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct cfmoe_simulator cfmoe_simulator;

typedef struct cfmoe_simulator_options {
  uint32_t struct_size; /* sizeof(cfmoe_simulator_options) */
  int32_t reference;    /* one stream without pinning, prefill like decode, instead of what the engine does */
  int32_t warm;         /* keep the cache from sample to sample */
  uint32_t chunk_size;  /* of prefill, in tokens; 0: the trace's, or 256 where it has none */
} cfmoe_simulator_options;

typedef struct cfmoe_simulation {
  uint64_t prefill_hits, prefill_misses;
  uint64_t decode_hits, decode_misses;
  uint64_t hand_over_loads; /* reads between prefill and decode, which are no accesses */
} cfmoe_simulation;

/* Names of the policies, comma-separated: what engines take, and what only a simulator can run as well. */
CFMOE_API const char* cfmoe_engine_policies(void);
CFMOE_API const char* cfmoe_simulator_policies(void);
CFMOE_API const char* cfmoe_default_policy(void);

/* `trace` are the bytes of a trace file, needed during the call only; `name` is what messages call them. */
CFMOE_API cfmoe_status cfmoe_simulator_create(const void* trace, size_t size, const char* name,
                                              const cfmoe_simulator_options* options, cfmoe_simulator** out,
                                              char* error, size_t error_size);
CFMOE_API void cfmoe_simulator_destroy(cfmoe_simulator* simulator);
/* May be called from several threads at once. `lookahead` in accesses, for lopt. `groups_by_misses` gets top_k + 1
 * counts if not NULL: decode groups, (token, layer) pairs, with 0, 1, ... top_k misses. */
CFMOE_API cfmoe_status cfmoe_simulator_run(const cfmoe_simulator* simulator, const char* policy, uint64_t slots,
                                           uint32_t lookahead, cfmoe_simulation* out, uint64_t* groups_by_misses,
                                           char* error, size_t error_size);

#ifdef __cplusplus
}
#endif
#endif /* CFMOE_SIMULATE_H_ */
