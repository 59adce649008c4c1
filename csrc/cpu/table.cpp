#include "block.h"

namespace fdfo::cpu {

namespace FDFO_ISA {
#define KERNEL(name, ...) void name(__VA_ARGS__);
#include "kernel_list.h"
#undef KERNEL
}  // namespace FDFO_ISA

#define FDFO_STRING(name) FDFO_STRING_OF(name)
#define FDFO_STRING_OF(name) #name

extern const Table FDFO_TABLE{
    FDFO_STRING(FDFO_ISA),
#define KERNEL(name, ...) FDFO_ISA::name,
#include "kernel_list.h"
#undef KERNEL
};

}  // namespace fdfo::cpu
