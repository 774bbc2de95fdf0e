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
    int cluster = 1;

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

// Clusters of which one waits for another must all fit at once: how many do, on each device.
template <class Config>
void check_clusters(const Launch& launch, const void* kernel, const cudaLaunchConfig_t& config) {
    static std::atomic<int> known[64];
    int device = 0, fitting = 0;
    launch.check(cudaGetDevice(&device), "cudaGetDevice");
    if (device < 64) fitting = known[device].load();
    if (fitting == 0) {
        launch.check(cudaOccupancyMaxActiveClusters(&fitting, kernel, &config), "clusters that fit");
        if (device < 64) known[device].store(fitting);
    }
    if (launch.grid <= fitting * launch.cluster) return;
    throw std::runtime_error(
        std::string(launch.op) + ": " + std::to_string(launch.grid / launch.cluster) + " clusters of "
        + std::to_string(launch.cluster) + " do not fit on the device at once, " + std::to_string(fitting)
        + " do");
}

// By programmatic dependent launch: the kernel must wait before it touches what others wrote.
template <class Config, class... Arguments>
void launch_overlapping(
    const Launch& launch, void (*kernel)(Arguments...), const Arguments&... arguments) {
    allow_shared_memory<Config>(launch, reinterpret_cast<const void*>(kernel));
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = launch.grid;
    config.blockDim = launch.threads;
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = launch.stream;
    config.attrs = attributes;
    config.numAttrs = launch.cluster > 1 ? 2 : 1;
    if (launch.cluster > 1) {
        check_clusters<Config>(launch, reinterpret_cast<const void*>(kernel), config);
    }
    launch.check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
}

}  // namespace tli_engine
