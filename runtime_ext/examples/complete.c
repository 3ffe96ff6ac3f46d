/* Continues a text: complete ARTIFACT TEXT [MEMORY_BUDGET_BYTES]
 *
 *   cc -std=c99 complete.c -I runtime_ext/include -L DIR_OF_LIBCFMOE -lcfmoe -o complete
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cfmoe/cfmoe.h"

enum { PROMPT_TOKENS = 1024, NEW_TOKENS = 48 };

/* Prints each token as it comes. */
static int print_token(int32_t token, void* user) {
  char text[1024], error[256];
  size_t size;
  if (cfmoe_tokenizer_push(user, token, text, sizeof(text), &size, error, sizeof(error)) != CFMOE_OK) return 1;
  fputs(text, stdout);
  fflush(stdout);
  return 0;
}

static int complete(cfmoe_engine* engine, cfmoe_tokenizer* tokenizer, const char* text) {
  static int32_t prompt[PROMPT_TOKENS];
  char error[512];
  size_t count;
  cfmoe_session* session = NULL;
  cfmoe_status status =
      cfmoe_tokenizer_encode(tokenizer, text, strlen(text), prompt, PROMPT_TOKENS, &count, error, sizeof(error));
  if (status == CFMOE_OK && count > PROMPT_TOKENS) {
    fprintf(stderr, "error: the text has %zu tokens, this example takes %d\n", count, PROMPT_TOKENS);
    return 2;
  }
  if (status == CFMOE_OK) status = cfmoe_session_create(engine, &session, error, sizeof(error));
  if (status == CFMOE_OK) { /* greedy, up to the model's own end token */
    fputs(text, stdout);
    status = cfmoe_session_generate(session, prompt, (uint32_t)count, NEW_TOKENS, NULL, NULL, 0, print_token, tokenizer,
                                    NULL, NULL, error, sizeof(error));
    print_token(-1, tokenizer); /* what an unfinished character left */
    puts("");
  }
  if (status == CFMOE_OK) {
    cfmoe_metrics metrics;
    cfmoe_memory memory;
    cfmoe_session_metrics(session, &metrics);
    cfmoe_engine_memory(engine, &memory);
    fprintf(stderr, "%.1f tokens/s, %u of %u experts in memory, %llu hits, %llu misses\n",
            metrics.decode.seconds > 0 ? (double)metrics.decode.tokens / metrics.decode.seconds : 0.0,
            memory.expert_slots, memory.expert_total, (unsigned long long)metrics.decode.hits,
            (unsigned long long)metrics.decode.misses);
  } else {
    fprintf(stderr, "error: %s\n", error);
  }
  cfmoe_session_destroy(session);
  return status == CFMOE_OK ? 0 : 2;
}

int main(int argc, char** argv) {
  char error[512];
  cfmoe_engine* engine = NULL;
  cfmoe_tokenizer* tokenizer = NULL;
  cfmoe_engine_options options;
  int result = 2;
  if (argc < 3) {
    fprintf(stderr, "usage: %s ARTIFACT TEXT [MEMORY_BUDGET_BYTES]\n", argv[0]);
    return 2;
  }
  cfmoe_engine_options_init(&options);
  if (argc > 3) options.budget_bytes = strtoull(argv[3], NULL, 10);
  if (cfmoe_engine_open(argv[1], &options, &engine, error, sizeof(error)) == CFMOE_OK &&
      cfmoe_tokenizer_open(argv[1], &tokenizer, error, sizeof(error)) == CFMOE_OK) {
    result = complete(engine, tokenizer, argv[2]);
  } else {
    fprintf(stderr, "error: %s\n", error);
  }
  cfmoe_tokenizer_close(tokenizer);
  cfmoe_engine_close(engine);
  return result;
}
