// What lets one header serve g++ (any instruction set) and nvcc.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FDFO_HD __host__ __device__ __forceinline__
#else
#define FDFO_HD inline __attribute__((always_inline))
#endif

namespace fdfo {

// Reads the bits of one type as another of the same size.
template <class To, class From>
FDFO_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace fdfo
