// The CUDA row kernels, emulated, under the name of the CPU's: so the fuzz program drives them unchanged. Its
// instruction sets are ways to lay rows on threads; its second number of threads is another order in which the emulated
// threads run.
#include "../../csrc/cuda/rows.cu"
#include "../../csrc/cuda/decoupled.cu"
#include "../../csrc/cuda/squares.cu"

namespace {

struct Way { const char* name; int shared, cluster; };
const Way ways[] = {{"as on Hopper", 0, 0}, {"clusters", 1 << 10, 16}, {"without clusters", 0, 1},
                    {"read twice", 1 << 10, 1}};
int way = 0;
unsigned calls = 0;

}  // namespace

int64_t kdlab_soft_kl_cpu(const kdlab_soft_kl* a) {
    emulator::order = a->threads == 1 ? 0 : 1 + ++calls % 3;
    kdlab_cuda_limits(ways[way].shared, ways[way].cluster);
    std::unique_ptr<double[]> workspace(new double[size_t(kdlab_cuda_workspace(a->rows))]);
    kdlab_cuda_rows call = {};
    call.rows = *a;
    call.place.workspace = workspace.get();
    call.t_squared = a->kl_factor != 1;
    if (const char* e = kdlab_rows_cuda(&call)) {
        std::printf("FAILED: %s\n", e);
        std::abort();
    }
    return -1;
}

const char* kdlab_isa_at(int i) { return i < 4 ? ways[i].name : nullptr; }

int kdlab_set_isa(const char* name) {
    for (way = 0; std::strcmp(ways[way].name, name); ++way) {}
    return 0;
}
