// The binding names the CPU's kernels; this build has none.
#include "cpu/kernels.h"

namespace fdfo::cpu {
const Table kGeneric{};
}
