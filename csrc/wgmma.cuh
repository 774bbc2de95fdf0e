// out += A B for one 64 x 16 slice of A, whose registers the caller decoded, and 16 x N of B in shared
// memory; one wgmma. Accumulator 4 j + 2 half + e of lane 4 r + c is row 16 warp + 8 half + r and column
// 8 j + 2 c + e (PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16").

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace tli_engine::hopper {

template <class T, int N>
struct Wgmma;

// an instruction names each of its registers: up to 128 accumulators, four of A, the descriptor, a flag
#define TLI_NAMES_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define TLI_NAMES_16  \
    TLI_NAMES_8 \
    ",%8,%9,%10,%11,%12,%13,%14,%15"
#define TLI_NAMES_32  \
    TLI_NAMES_16 \
    ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define TLI_NAMES_64  \
    TLI_NAMES_32 \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52" \
    ",%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define TLI_NAMES_128  \
    TLI_NAMES_64 \
    ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84" \
    ",%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103" \
    ",%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119" \
    ",%120,%121,%122,%123,%124,%125,%126,%127"

#define TLI_VALUES_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TLI_VALUES_8(i) TLI_VALUES_4(i), TLI_VALUES_4(i + 4)
#define TLI_VALUES_16(i) TLI_VALUES_8(i), TLI_VALUES_8(i + 8)
#define TLI_VALUES_32(i) TLI_VALUES_16(i), TLI_VALUES_16(i + 16)
#define TLI_VALUES_64(i) TLI_VALUES_32(i), TLI_VALUES_32(i + 32)
#define TLI_VALUES_128(i) TLI_VALUES_64(i), TLI_VALUES_64(i + 64)

#define TLI_WGMMA(TYPE, NAME, N, COUNT, A, B, ADD)                                              \
    template <>                                                                                 \
    struct Wgmma<TYPE, N> {                                                                     \
        static __device__ __forceinline__ void run(                                             \
            float (&d)[COUNT], const uint32_t (&a)[4], uint64_t descriptor) {                   \
            asm volatile(                                                                       \
                "{ .reg .pred add;\n"                                                           \
                "setp.ne.b32 add, " ADD ", 0;\n"                                                \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME                 \
                " {" TLI_NAMES_##COUNT "}, {" A "}, " B ", add, 1, 1, 0; }\n"                   \
                : TLI_VALUES_##COUNT(0)                                                         \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(1));         \
        }                                                                                       \
    };

#define TLI_WGMMA_SIZES(TYPE, NAME)                                         \
    TLI_WGMMA(TYPE, NAME, 16, 8, "%8,%9,%10,%11", "%12", "%13")             \
    TLI_WGMMA(TYPE, NAME, 32, 16, "%16,%17,%18,%19", "%20", "%21")          \
    TLI_WGMMA(TYPE, NAME, 64, 32, "%32,%33,%34,%35", "%36", "%37")          \
    TLI_WGMMA(TYPE, NAME, 128, 64, "%64,%65,%66,%67", "%68", "%69")         \
    TLI_WGMMA(TYPE, NAME, 256, 128, "%128,%129,%130,%131", "%132", "%133")

TLI_WGMMA_SIZES(__nv_bfloat16, "bf16")
TLI_WGMMA_SIZES(__half, "f16")

}  // namespace tli_engine::hopper
