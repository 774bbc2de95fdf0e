// tli_engine's CUDA operators over torch's stable ABI: one binary for torch 2.11 and newer, CPU builds
// included. What is checked here is what would be unsafe; the ops check the rest before.

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "nf4_gemv.h"
#include "nf4_linear_sm90.h"

namespace tli_engine {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t RECORD_BYTES = 2304, MAX_WIDTH = 64, MAX_GROUPS = 3, INT_LIMIT = int64_t{1} << 31;

// The shim is in libtorch_cuda, which a CPU build lacks: it is looked up, so that the extension loads.
cudaStream_t current_stream(int32_t device) {
    using Function = AOTITorchError (*)(int32_t, void**);
    static const auto function = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return reinterpret_cast<Function>(
            library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream"));
    }();
    STD_TORCH_CHECK(function != nullptr, "this torch has no CUDA");
    void* stream = nullptr;
    STD_TORCH_CHECK(function(device, &stream) == 0, "no current stream");
    return static_cast<cudaStream_t>(stream);
}

int device_attribute(cudaDeviceAttr attribute, int device) {
    int value = 0;
    const cudaError_t status = cudaDeviceGetAttribute(&value, attribute, device);
    STD_TORCH_CHECK(status == cudaSuccess, "device attribute: ", cudaGetErrorString(status));
    return value;
}

nf4::Tile to_tile(const std::vector<int64_t>& v) {
    // without the last, no clusters
    STD_TORCH_CHECK(v.size() == 7 || v.size() == 8, "tile must have 8 numbers, got ", v.size());
    for (const int64_t number : v) {
        STD_TORCH_CHECK(number >= 0 && number < 1 << 20, "tile must be small, got ", number);
    }
    const auto at = [&](int i) { return static_cast<int>(v[i]); };
    return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), v.size() == 8 ? at(7) : 1};
}

void check_tensor(const Tensor& t, const Tensor& x, ScalarType dtype, const char* name) {
    STD_TORCH_CHECK(
        t.is_cuda() && t.get_device_index() == x.get_device_index(), name, " must be on x's device");
    STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has a wrong dtype");
    STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
    // bulk copies and 16-byte loads
    const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    STD_TORCH_CHECK(t.numel() == 0 || address % 16 == 0, name, " must be aligned to 16 bytes");
}

void check_product(const Tensor& x, const Tensor& records, int64_t rows, int64_t contraction) {
    const ScalarType dtype = x.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "x must be bf16 or fp16");
    check_tensor(x, x, dtype, "x");
    check_tensor(records, x, ScalarType::Byte, "records");
    STD_TORCH_CHECK(rows > 0 && rows % 64 == 0 && rows < INT_LIMIT, "rows must be a multiple of 64");
    STD_TORCH_CHECK(
        contraction > 0 && contraction % 64 == 0 && contraction < INT_LIMIT / 2,
        "contraction must be a multiple of 64");
    STD_TORCH_CHECK(
        x.dim() == 2 && x.size(1) == contraction && x.size(0) < INT_LIMIT / 2,
        "x must be [m, ", contraction, "]");
    const int64_t columns = (contraction + 127) / 128 * 2;
    STD_TORCH_CHECK(
        records.dim() == 3 && records.size(0) == rows / 64 && records.size(1) == columns
            && records.size(2) == RECORD_BYTES,
        "records must be [", rows / 64, ", ", columns, ", ", RECORD_BYTES, "]");
    // the kernel's offsets are 32-bit
    STD_TORCH_CHECK(records.numel() < int64_t{1} << 32, "records must be under 4 GB");
}

void check_device(int device) {
    STD_TORCH_CHECK(
        device_attribute(cudaDevAttrComputeCapabilityMajor, device) == 9
            && device_attribute(cudaDevAttrComputeCapabilityMinor, device) == 0,
        "products with records need a GPU of compute capability 9.0");
}

void check_rest(
    const Tensor& x,
    const std::optional<Tensor>& bias,
    const Tensor& workspace,
    const Tensor& flags,
    int64_t rows) {
    if (bias.has_value()) {
        check_tensor(*bias, x, x.scalar_type(), "bias");
        STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == rows, "bias must be [", rows, "]");
    }
    check_tensor(workspace, x, ScalarType::Float, "workspace");
    check_tensor(flags, x, ScalarType::Int, "flags");
}

void check_scratch(const Tensor& workspace, const Tensor& flags, int64_t floats, int64_t flag_count) {
    STD_TORCH_CHECK(
        workspace.numel() >= floats && flags.numel() >= flag_count,
        "workspace and flags must hold ", floats, " and ", flag_count, " elements");
}

const void* data_or_null(const std::optional<Tensor>& t) {
    return t.has_value() ? t->const_data_ptr() : nullptr;
}

nf4::LowRank to_low_rank(
    const Tensor& x,
    const std::optional<Tensor>& lora_x,
    const std::optional<Tensor>& lora_b,
    const std::vector<int64_t>& sizes,
    int64_t rows,
    bool transposed) {
    nf4::LowRank low_rank;
    STD_TORCH_CHECK(lora_x.has_value() == lora_b.has_value(), "lora_x and lora_b go together");
    if (!lora_x.has_value()) return low_rank;
    const bool fp32 = lora_b->scalar_type() == ScalarType::Float;
    check_tensor(*lora_x, x, x.scalar_type(), "lora_x");
    check_tensor(*lora_b, x, fp32 ? ScalarType::Float : x.scalar_type(), "lora_b");
    STD_TORCH_CHECK(lora_x->dim() == 2 && lora_x->size(0) == x.size(0), "lora_x must be [m, width]");
    const int64_t width = lora_x->size(1), groups = static_cast<int64_t>(sizes.size());
    STD_TORCH_CHECK(
        width > 0 && width % 8 == 0 && width <= MAX_WIDTH, "lora_x's width must be 8, 16, ... or 64");
    STD_TORCH_CHECK(groups >= 1 && groups <= (transposed ? 1 : MAX_GROUPS), "wrong number of sizes");
    STD_TORCH_CHECK(width % groups == 0, "lora_x's width must be a multiple of the number of groups");
    int64_t end = 0;
    for (int64_t i = 0; i < groups; i++) {
        STD_TORCH_CHECK(sizes[i] > 0 && sizes[i] <= rows, "sizes must be positive and add up to rows");
        end += sizes[i];
        // a group past the last one has no rows
        if (i < 2) low_rank.ends[i] = static_cast<int>(end);
    }
    STD_TORCH_CHECK(end == rows, "sizes must add up to rows");
    if (groups == 1) low_rank.ends[1] = static_cast<int>(end);
    low_rank.width = static_cast<int>(width);
    low_rank.rank = static_cast<int>(width / groups);
    const int64_t shape[2] = {transposed ? width : rows, transposed ? rows : low_rank.rank};
    STD_TORCH_CHECK(
        lora_b->dim() == 2 && lora_b->size(0) == shape[0] && lora_b->size(1) == shape[1],
        "lora_b must be [", shape[0], ", ", shape[1], "]");
    low_rank.b = lora_b->const_data_ptr();
    low_rank.row_stride = transposed ? 1 : low_rank.rank;
    low_rank.column_stride = transposed ? static_cast<int>(rows) : 1;
    low_rank.fp32 = fp32;
    return low_rank;
}

}  // namespace

Tensor nf4_linear_sm90(
    Tensor x,
    Tensor records,
    std::optional<Tensor> bias,
    std::optional<Tensor> lora_x,
    std::optional<Tensor> lora_b,
    std::vector<int64_t> sizes,
    int64_t rows,
    int64_t contraction,
    bool transposed,
    bool exact,
    std::vector<int64_t> tile,
    Tensor workspace,
    Tensor flags) {
    check_product(x, records, rows, contraction);
    const nf4::LowRank low_rank = to_low_rank(x, lora_x, lora_b, sizes, rows, transposed);
    check_rest(x, bias, workspace, flags, rows);

    const int64_t m = x.size(0);
    Tensor out = torch::stable::new_empty(x, {m, rows});
    if (m == 0) return out;
    const int device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    check_device(device);
    const int sm_count = device_attribute(cudaDevAttrMultiProcessorCount, device);
    const nf4::Tile cut = to_tile(tile);
    const nf4::Plan plan = nf4::make_plan(static_cast<int>(rows), static_cast<int>(m), cut, sm_count);
    const int64_t steps = (contraction + 127) / 128;
    STD_TORCH_CHECK(cut.split <= steps, "split must be at most ", steps, ", got ", cut.split);
    STD_TORCH_CHECK(
        (plan.tiles - plan.whole_tiles) * steps * plan.grid < INT_LIMIT, "too many steps are shared");
    check_scratch(workspace, flags, plan.workspace_floats, plan.flags);

    const nf4::Call call{
        x.const_data_ptr(),
        static_cast<const uint8_t*>(records.const_data_ptr()),
        data_or_null(bias),
        data_or_null(lora_x),
        out.mutable_data_ptr(),
        static_cast<float*>(workspace.mutable_data_ptr()),
        static_cast<unsigned*>(flags.mutable_data_ptr()),
        static_cast<int>(m),
        static_cast<int>(rows),
        static_cast<int>(contraction),
        exact,
        low_rank,
        cut,
        plan,
        current_stream(device),
    };
    if (x.scalar_type() == ScalarType::BFloat16) {
        (transposed ? nf4::launch_bf16_dx : nf4::launch_bf16_forward)(call);
    } else {
        (transposed ? nf4::launch_fp16_dx : nf4::launch_fp16_forward)(call);
    }
    return out;
}

Tensor nf4_gemv_sm90(
    Tensor x,
    Tensor records,
    std::optional<Tensor> bias,
    std::optional<Tensor> lora_x,
    std::optional<Tensor> lora_b,
    std::vector<int64_t> sizes,
    int64_t rows,
    int64_t contraction,
    bool transposed,
    bool exact,
    std::vector<int64_t> plan,
    Tensor workspace,
    Tensor flags) {
    check_product(x, records, rows, contraction);
    const nf4::LowRank low_rank = to_low_rank(x, lora_x, lora_b, sizes, rows, transposed);
    check_rest(x, bias, workspace, flags, rows);
    const int64_t m = x.size(0), columns = contraction / 64;
    STD_TORCH_CHECK(m <= nf4::GEMV_M, "x must have at most ", nf4::GEMV_M, " rows, got ", m);
    STD_TORCH_CHECK(plan.size() == 3, "plan must have 3 numbers, got ", plan.size());
    const int64_t block_rows = plan[0], split = plan[1], groups = plan[2];
    STD_TORCH_CHECK(block_rows == 64 || block_rows == 32, "blocks must be of 64 or 32 rows, got ", block_rows);
    const int64_t blocks = rows / block_rows, least = (columns - 1) / nf4::GEMV_COLUMNS + 1;
    STD_TORCH_CHECK(
        split >= least && split <= columns, "split must be ", least, " to ", columns, ", got ", split);
    STD_TORCH_CHECK(
        groups >= 1 && groups <= blocks, "groups must be 1 to ", blocks, ", got ", groups);
    STD_TORCH_CHECK(
        split * columns < INT_LIMIT && groups * blocks < INT_LIMIT && split * groups < INT_LIMIT,
        "split and groups are too large");
    const bool shared = split > 1;
    check_scratch(workspace, flags, shared ? split * rows * m : 0, shared ? groups : 0);

    Tensor out = torch::stable::new_empty(x, {m, rows});
    if (m == 0) return out;
    const int device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    check_device(device);
    nf4::launch_gemv({
        x.const_data_ptr(),
        static_cast<const uint8_t*>(records.const_data_ptr()),
        data_or_null(bias),
        data_or_null(lora_x),
        out.mutable_data_ptr(),
        static_cast<float*>(workspace.mutable_data_ptr()),
        static_cast<unsigned*>(flags.mutable_data_ptr()),
        static_cast<int>(m),
        static_cast<int>(rows),
        static_cast<int>(contraction),
        x.scalar_type() == ScalarType::BFloat16,
        transposed,
        exact,
        low_rank,
        {static_cast<int>(block_rows), static_cast<int>(split), static_cast<int>(groups)},
        current_stream(device),
    });
    return out;
}

std::tuple<int64_t, int64_t> nf4_linear_sm90_workspace(
    int64_t rows, int64_t m, std::vector<int64_t> tile, int64_t sm_count) {
    STD_TORCH_CHECK(rows < INT_LIMIT && m < INT_LIMIT && sm_count < INT_LIMIT, "sizes are too large");
    const nf4::Plan plan = nf4::make_plan(
        static_cast<int>(rows), static_cast<int>(m), to_tile(tile), static_cast<int>(sm_count));
    return {plan.workspace_floats, plan.flags};
}

}  // namespace tli_engine

STABLE_TORCH_LIBRARY_FRAGMENT(tli_engine, library) {
    library.def(
        "nf4_linear_sm90(Tensor x, Tensor records, Tensor? bias, Tensor? lora_x, Tensor? lora_b, "
        "int[] sizes, int rows, int contraction, bool transposed, bool exact, int[] tile, "
        "Tensor(a!) workspace, Tensor(b!) flags) -> Tensor");
    library.def(
        "nf4_gemv_sm90(Tensor x, Tensor records, Tensor? bias, Tensor? lora_x, Tensor? lora_b, "
        "int[] sizes, int rows, int contraction, bool transposed, bool exact, int[] plan, "
        "Tensor(a!) workspace, Tensor(b!) flags) -> Tensor");
    library.def(
        "nf4_linear_sm90_workspace(int rows, int m, int[] tile, int sm_count) -> (int, int)");
}

STABLE_TORCH_LIBRARY_IMPL(tli_engine, CUDA, library) {
    library.impl("nf4_linear_sm90", TORCH_BOX(&tli_engine::nf4_linear_sm90));
    library.impl("nf4_gemv_sm90", TORCH_BOX(&tli_engine::nf4_gemv_sm90));
}

STABLE_TORCH_LIBRARY_IMPL(tli_engine, CompositeExplicitAutograd, library) {
    library.impl("nf4_linear_sm90_workspace", TORCH_BOX(&tli_engine::nf4_linear_sm90_workspace));
}
