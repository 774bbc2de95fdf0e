// Launching a kernel that overlaps the end of the one before it.

#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace tli_engine {

struct Launch {
    int grid, threads, shared_bytes;
    cudaStream_t stream;
    const char* op;  // for messages

    void check(cudaError_t status, const char* what) const {
        if (status == cudaSuccess) return;
        throw std::runtime_error(std::string(op) + ": " + what + ": " + cudaGetErrorString(status));
    }
};

// A kernel must be allowed its shared memory once on each device; each has a Config of its own.
template <class Config>
void allow_shared_memory(const Launch& launch, const void* kernel) {
    static std::atomic<uint64_t> allowed{0};
    int device = 0;
    launch.check(cudaGetDevice(&device), "cudaGetDevice");
    const uint64_t bit = device < 64 ? 1ull << device : 0;
    if (allowed.load() & bit) return;
    launch.check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes),
        "shared memory");
    allowed.fetch_or(bit);
}

// By programmatic dependent launch: the kernel must wait before it touches what others wrote.
template <class Config, class... Arguments>
void launch_overlapping(
    const Launch& launch, void (*kernel)(Arguments...), const Arguments&... arguments) {
    allow_shared_memory<Config>(launch, reinterpret_cast<const void*>(kernel));
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = launch.grid;
    config.blockDim = launch.threads;
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = launch.stream;
    config.attrs = &overlap;
    config.numAttrs = 1;
    launch.check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
}

}  // namespace tli_engine
