// Network, batch and cache as llm/model/decode_cpu.py describes them to decode_cpu.cpp, field by field.
#pragma once
#include "cpu_product.h"
#include "cpu_thin.h"

struct Layer {
    Matrix qkv, out, fc, proj;
    const float *norm_1[2], *norm_2[2];  // LayerNorm's weight and bias, null: RMSNorm
    const void* values;                  // value embeddings (vocabulary, kv_dim), null: none
    const float* gate;                   // (n_kv_head, gate_channels)
    int64_t window;                      // earlier positions that are seen; -1: all
    int64_t part, index;                 // part of the cache that holds it, and its number there
    int64_t offset;                      // its number among the layers that offset keys, -1: it does not
    float residual, x0, grams;  // grams: of the sum of n-gram rows that is added
};

// Low-rank adapter: thin matrices of every layer in the order below, then those of the embedding and the head.
struct Adapter {
    const Thin* thin;
};
enum { QUERIES, KEYS, VALUES, OUT, FC, PROJ, TABLE, PER_LAYER };
enum { EMBEDDING, HEAD };  // behind the last layer

struct Model {
    int64_t n_layer, n_head, n_kv_head, head_dim, n_embd, vocab, table_rows, seq_len;
    int64_t is_bf16, has_bf16_tables, is_gpt2, has_scalars, gate_channels, smear_channels, middle;  // middle -1: none
    float scale, softcap, gate_range, smear, backout, norm_eps;  // softcap 0: none
    const void *wte, *wpe;                                       // tables, in their own type
    const float *cos, *sin;                                      // (seq_len, head_dim / 2)
    const float* smear_gate;                                     // (smear_channels,), null: none
    const float* final_norm[2];
    Matrix head;
    const Layer* layers;
    const Adapter* adapters;  // (n_adapters,)
    int64_t n_adapters, low;  // low: the most numbers that an adapter makes of a token's row at a time
    const void* grams[2];     // tables of pairs and of triples (parts x gram_rows, n_embd / parts), null: none
    const int64_t* factors;   // (parts, 3) of their hashes
    int64_t parts, gram_rows, prime, bos;
};

// Part of the cache: keys and values of layers with one window. A row's own token j lies in place j % places. Where
// there are fewer places than a row has room for, `spare` more than the window, older tokens are overwritten.
struct Part {
    void *k, *v;
    int64_t places, spare;
    int64_t layer_stride, row_stride, head_stride, place_stride;  // in numbers
};

struct PrefixPart {  // keys and values (layers of the part, n_kv_head, room, head_dim) of tokens `first` and later ones
    const void *k, *v;
    int64_t room, first;
};

struct Batch {
    int64_t n;                // new tokens
    int64_t capacity;         // tokens that the scratch memory has room for
    const int64_t* ids;       // (n,)
    const int64_t* rows;      // (n,) row of the cache of each token, null: token i belongs to row i
    const int64_t* at;        // (n,) place of each token among its row's own tokens
    const int64_t* adapters;  // (n,) number of each token's adapter, 0: none; null: no token has one
    const int64_t* prefix;    // (cache rows,) prefix of every row, -1: none; null: no row has one
    const int64_t* lengths;   // (n_prefixes,) tokens of every prefix, -1: not there
    const PrefixPart* shared; // (n_prefixes, n_parts)
    const Part* parts;        // (n_parts,)
    int64_t n_prefixes, n_parts, cache_rows, room;
    void* last_embed;         // (cache rows, n_embd) of the compute type; null: no smear
    int64_t* last_ids;        // (cache rows, n_last), the newest last; null: no n-grams
    int64_t n_last;
    void* last_keys;          // (cache rows, n_offset, n_kv_head, head_dim) of the compute type; null: no offset
    int64_t n_offset;
    const int64_t* outputs;   // (n_outputs,) tokens whose logits are asked for, null: those of all
    int64_t n_outputs;
    float* logits;            // (n_outputs, vocab)
    void* scratch;
};
