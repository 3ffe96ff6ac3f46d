/* The C API of the CFMoE runtime. Keep this header narrow: two opaque handles, plain structs, token ids in and out.
 *
 * Every fallible call returns a cfmoe_status and, unless CFMOE_OK, writes one NUL-terminated line into `error` (cut to
 * `error_size`). No exception crosses this boundary. An engine and its sessions belong to one thread at a time; a token
 * callback may read metrics, memory and residents and change the budget. cfmoe_session_cancel, cfmoe_engine_trim and
 * cfmoe_engine_memory may be called from any thread.
 */
#ifndef CFMOE_CFMOE_H_
#define CFMOE_CFMOE_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define CFMOE_API __declspec(dllexport)
#else
#define CFMOE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define CFMOE_ABI_VERSION 5

typedef enum cfmoe_status {
  CFMOE_OK = 0,
  CFMOE_INTERNAL = 1, /* a fault of the runtime or the machine */
  CFMOE_USER = 2,     /* the caller can mend it; the message says how */
  CFMOE_CANCELLED = 3
} cfmoe_status;

typedef struct cfmoe_engine cfmoe_engine;
typedef struct cfmoe_session cfmoe_session;
typedef struct cfmoe_tokenizer cfmoe_tokenizer;

typedef struct cfmoe_engine_options {
  uint32_t struct_size;  /* sizeof(cfmoe_engine_options) */
  uint64_t budget_bytes; /* everything: weights, KV, workspace, pool. 0: see expert_percent */
  double expert_percent; /* with budget_bytes 0: fixed parts + floor(percent of all experts) slots. 0: all experts if
                            memory allows */
  uint32_t context_size; /* tokens; 0: min(the model's, 4096) */
  int32_t threads;       /* 0: one per physical core */
  const char* io;        /* "auto", "direct", "buffered", "mmap"; NULL: auto */
  const char* policy;    /* NULL: the default policy */
  int32_t log_events;    /* keep the per-access event log */
  int32_t record_trace;  /* keep the routing of every token: see cfmoe_session_write_trace. Memory outside the budget */
  int32_t record_scores; /* and the router's scores of all experts with it */
  const char* device;    /* "cpu", "vulkan", "opencl", "metal"; "auto": a GPU if one works, else the CPU with a warning.
                            NULL: cpu */
  const char *prefill_device, *decode_device; /* of one phase alone; NULL: `device` */
} cfmoe_engine_options;

typedef struct cfmoe_memory {
  uint64_t budget_bytes;
  uint64_t smallest_budget_bytes; /* that works */
  uint64_t largest_budget_bytes;  /* that is of use: all experts */
  uint64_t weights_bytes;
  uint64_t kv_bytes;
  uint64_t workspace_bytes;
  uint64_t pool_bytes;
  uint64_t arena_bytes;  /* memory outside the pool only */
  uint64_t mapped_bytes; /* of experts.bin, with mmap; not part of the budget */
  uint32_t expert_slots;
  uint32_t expert_total;
} cfmoe_memory;

typedef struct cfmoe_phase_metrics {
  uint64_t tokens;
  double seconds;
  uint64_t hits;
  uint64_t misses;
  uint64_t prefetched; /* experts read ahead of any use, counted as prefill; their bytes are in bytes_read */
  uint64_t bytes_read;
  double stall_ms;
} cfmoe_phase_metrics;

typedef struct cfmoe_metrics {
  cfmoe_phase_metrics prefill;
  cfmoe_phase_metrics decode;
  uint64_t first_32_hits; /* of the first 32 decoded tokens */
  uint64_t first_32_accesses;
} cfmoe_metrics;

typedef struct cfmoe_model_info {
  uint32_t vocab_size, context_size, num_layers, moe_layers, num_experts, top_k, prefill_chunk;
  uint64_t expert_record_bytes;
} cfmoe_model_info;

typedef struct cfmoe_access_event {
  uint8_t decode; /* 0: prefill, one per (chunk, layer, expert); 1: decode, one per (token, layer, k) */
  uint8_t hit;
  uint16_t layer; /* MoE layer */
  uint32_t expert;
  uint64_t position;
} cfmoe_access_event;

typedef struct cfmoe_sampling {
  uint32_t struct_size;
  float temperature;        /* 0: greedy */
  int32_t top_k;            /* 0: off */
  float top_p;              /* 1: off */
  float repetition_penalty; /* 1: off */
  uint64_t seed;
} cfmoe_sampling;

/* Called with each new token before the next is computed; a value other than 0 ends generation (not an error). */
typedef int (*cfmoe_token_callback)(int32_t token, void* user);

CFMOE_API uint32_t cfmoe_abi_version(void);
CFMOE_API const char* cfmoe_version(void);

/* Fills `options` with the defaults. */
CFMOE_API void cfmoe_engine_options_init(cfmoe_engine_options* options);
CFMOE_API void cfmoe_sampling_init(cfmoe_sampling* sampling);

CFMOE_API cfmoe_status cfmoe_engine_open(const char* artifact, const cfmoe_engine_options* options, cfmoe_engine** out,
                                         char* error, size_t error_size);
CFMOE_API void cfmoe_engine_close(cfmoe_engine* engine); /* after its sessions; NULL is allowed */
CFMOE_API void cfmoe_engine_model(const cfmoe_engine* engine, cfmoe_model_info* out);
CFMOE_API void cfmoe_engine_memory(const cfmoe_engine* engine, cfmoe_memory* out);
/* Changes the budget, between calls or in a token callback; the arguments mean what they mean in cfmoe_engine_options.
 * Refuses what is too small, naming the smallest that works. No token depends on it. */
CFMOE_API cfmoe_status cfmoe_engine_set_budget(cfmoe_engine* engine, uint64_t budget_bytes, double expert_percent,
                                               char* error, size_t error_size);
/* For low memory: shrinks the budget to `budget_bytes`, or to the smallest that works if that is more (0: to that), and
 * gives the memory back to the system. At once between calls and in a token callback; from another thread while a call
 * runs, before that call's next layer. Never grows the budget. */
CFMOE_API cfmoe_status cfmoe_engine_trim(cfmoe_engine* engine, uint64_t budget_bytes, char* error, size_t error_size);
/* Keeps the cache warm from now on: a session that begins or is reset finds the experts that are in memory instead of a
 * cold cache, and free room is filled in the background with `experts` (layer * num_experts + expert), the likeliest
 * first, between calls. No token depends on it, and the budget holds. A count of 0 ends reading ahead; a
 * new list replaces what of the old one is not read yet. Between calls. */
CFMOE_API cfmoe_status cfmoe_engine_keep_warm(cfmoe_engine* engine, const uint32_t* experts, size_t count, char* error,
                                              size_t error_size);
/* Which experts are in memory: writes 1 or 0 for each, [moe_layers * num_experts], as far as `capacity` goes. Returns
 * how many there are to write. */
CFMOE_API size_t cfmoe_engine_residents(const cfmoe_engine* engine, uint8_t* out, size_t capacity);
CFMOE_API const char* cfmoe_engine_io(const cfmoe_engine* engine); /* what "auto" became */
CFMOE_API const char* cfmoe_engine_policy(const cfmoe_engine* engine);
CFMOE_API const char* cfmoe_engine_warning(const cfmoe_engine* engine); /* "" if none; valid until the budget changes */
/* Where a phase runs: "cpu", "vulkan", "opencl" or "metal". */
CFMOE_API const char* cfmoe_engine_device(const cfmoe_engine* engine, int decode);
CFMOE_API const char* cfmoe_engine_device_name(const cfmoe_engine* engine); /* of the GPU; "" if there is none */
/* The devices of a kind, "vulkan", "opencl" or "metal", as a JSON array of objects: index, name, type, driver,
 * features, unified, memory_bytes. Writes `size` bytes and a NUL if they fit in `capacity`. Refuses where no driver is
 * installed.
 */
CFMOE_API cfmoe_status cfmoe_devices(const char* kind, char* out, size_t capacity, size_t* size, char* error,
                                     size_t error_size);

/* One conversation. The engine has one KV cache: one session at a time. */
CFMOE_API cfmoe_status cfmoe_session_create(cfmoe_engine* engine, cfmoe_session** out, char* error, size_t error_size);
CFMOE_API void cfmoe_session_destroy(cfmoe_session* session);
/* Forgets the conversation and makes the cache cold. */
CFMOE_API cfmoe_status cfmoe_session_reset(cfmoe_session* session, char* error, size_t error_size);
/* Forgets what follows the first `position` tokens and keeps the experts that are in memory. At 0 a new conversation
 * begins, metrics too. */
CFMOE_API cfmoe_status cfmoe_session_rewind(cfmoe_session* session, uint32_t position, char* error, size_t error_size);
CFMOE_API uint32_t cfmoe_session_position(const cfmoe_session* session);

/* Prefills `tokens` and generates up to `max_new_tokens`, into `out_tokens` (room for max_new_tokens) if not NULL.
 * Stops at a stop token, which is not reported: the model's own end tokens unless `stop_tokens` is given (NULL: the
 * model's; count 0 with a non-NULL pointer: none). */
CFMOE_API cfmoe_status cfmoe_session_generate(cfmoe_session* session, const int32_t* tokens, uint32_t token_count,
                                              uint32_t max_new_tokens, const cfmoe_sampling* sampling,
                                              const int32_t* stop_tokens, uint32_t stop_token_count,
                                              cfmoe_token_callback callback, void* user, int32_t* out_tokens,
                                              uint32_t* out_count, char* error, size_t error_size);
/* Feeds `tokens` after what the session has seen. Writes the logits behind every one of them (token_count * vocab_size
 * floats) if `logits` is not NULL. Short inputs (`decode` != 0) run token by token through the decode program. */
CFMOE_API cfmoe_status cfmoe_session_feed(cfmoe_session* session, const int32_t* tokens, uint32_t token_count,
                                          int decode, float* logits, char* error, size_t error_size);
CFMOE_API void cfmoe_session_cancel(cfmoe_session* session);

CFMOE_API void cfmoe_session_metrics(const cfmoe_session* session, cfmoe_metrics* out);
/* Moves out at most `capacity` logged events and returns how many; call until 0. */
CFMOE_API size_t cfmoe_session_take_events(cfmoe_session* session, cfmoe_access_event* out, size_t capacity);

/* The artifact's tokenizer, if it is byte-level BPE without a normalizer; other kinds are refused. One thread at a
 * time. Needs no engine. */
CFMOE_API cfmoe_status cfmoe_tokenizer_open(const char* artifact, cfmoe_tokenizer** out, char* error,
                                            size_t error_size);
CFMOE_API void cfmoe_tokenizer_close(cfmoe_tokenizer* tokenizer); /* NULL is allowed */
/* Token ids of UTF-8 text, exactly as tokenizer.json says: none is added, special tokens written in the text are found.
 * Writes at most `capacity` of them; `count` is how many there are. */
CFMOE_API cfmoe_status cfmoe_tokenizer_encode(const cfmoe_tokenizer* tokenizer, const char* text, size_t text_size,
                                              int32_t* out, size_t capacity, size_t* count, char* error,
                                              size_t error_size);
/* The same for a text of which a part was typed: special tokens that touch a range [plain[2 * i], plain[2 * i + 1]) of
 * bytes are not looked for, there they are text like any other. */
CFMOE_API cfmoe_status cfmoe_tokenizer_encode_typed(const cfmoe_tokenizer* tokenizer, const char* text,
                                                    size_t text_size, const size_t* plain, size_t plain_count,
                                                    int32_t* out, size_t capacity, size_t* count, char* error,
                                                    size_t error_size);
/* Streams: the text, in whole characters, that `token` completes after those pushed before; special tokens have none.
 * A negative `token` ends the stream with what is left. Writes `size` bytes and a NUL, and refuses where they do not
 * fit in `capacity`: three times the longest token and a few. What is no UTF-8 becomes U+FFFD. */
CFMOE_API cfmoe_status cfmoe_tokenizer_push(cfmoe_tokenizer* tokenizer, int32_t token, char* out, size_t capacity,
                                            size_t* size, char* error, size_t error_size);
/* Writes what the engine has run since it was opened as a routing trace (docs/trace-format.md), replacing the file. */
CFMOE_API cfmoe_status cfmoe_session_write_trace(const cfmoe_session* session, const char* path, char* error,
                                                 size_t error_size);

#ifdef __cplusplus
}
#endif
#endif /* CFMOE_CFMOE_H_ */
