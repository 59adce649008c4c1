// Philox4x32-10: random words as a function of (seed, pair, stream, index). Known answers are in the tests.
#pragma once

#include "fdfo/macros.h"

namespace fdfo {

struct Key {
  uint32_t low, high;
};

struct Words {
  uint32_t w0, w1, w2, w3;
};

// The four words at counter (index, stream, pair_lo, pair_hi), given as `c`.
FDFO_HD Words philox(Words c, Key key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c.w0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c.w2) * 0xCD9E8D57u;
    c = {static_cast<uint32_t>(p1 >> 32) ^ c.w1 ^ key.low, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c.w3 ^ key.high, static_cast<uint32_t>(p0)};
    key = {key.low + 0x9E3779B9u, key.high + 0xBB67AE85u};
  }
  return c;
}

}  // namespace fdfo
