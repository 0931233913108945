// Chooses the instruction set, checks labels, shares the rows out to threads, and adds up the rows.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "rows.h"
#include "threads.h"

namespace kdlab {
namespace {

// Worst first. Every name is known everywhere, also where only the base kernels are built.
struct Candidate { const char* name; const Kernels* kernels; };
const Candidate candidates[] = {
    {"base", &kernels_base},
#ifdef KDLAB_X86_KERNELS
    {"avx2", &kernels_avx2},
    {"avx512", &kernels_avx512},
#else
    {"avx2", nullptr},
    {"avx512", nullptr},
#endif
};

bool runs_here(const char* name) {
#ifdef KDLAB_X86_KERNELS
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (!std::strcmp(name, "avx2")) return avx2;
    if (!std::strcmp(name, "avx512"))
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return !std::strcmp(name, "base");
}

// The best that runs here and is not above `name`; null for an unknown name.
const Kernels* best_up_to(const char* name) {
    const Kernels* best = nullptr;
    for (const Candidate& c : candidates) {
        if (runs_here(c.name)) best = c.kernels;
        if (!std::strcmp(c.name, name)) return best;
    }
    return nullptr;
}

const Kernels* choose_at_load() {
    const char* name = std::getenv("KDLAB_ISA");
    const Kernels* k = name ? best_up_to(name) : nullptr;
    return k ? k : best_up_to("avx512");
}

std::atomic<const Kernels*> current{choose_at_load()};

// Does the CPU itself round to bfloat16? KDLAB_BF16=0 does without, as on those that cannot.
#ifdef KDLAB_X86_KERNELS
const bool has_bf16 = (__builtin_cpu_init(), __builtin_cpu_supports("avx512bf16")) &&
                      !(std::getenv("KDLAB_BF16") && !std::strcmp(std::getenv("KDLAB_BF16"), "0"));
#else
const bool has_bf16 = false;
#endif

}  // namespace

const Kernels& kernels_in_use() { return *current.load(std::memory_order_relaxed); }

}  // namespace kdlab

using namespace kdlab;

int64_t kdlab_soft_kl_cpu(const kdlab_soft_kl* a) {
    const Kernels* kernels = current.load(std::memory_order_relaxed);
    Job job;
    static_cast<kdlab_soft_kl&>(job) = *a;
    job.kl = a->teacher && (a->kl_weight != 0 || a->kl_rows);
    job.kind = kdlab_kind_at_ends(a->kind, a->mix);
    const bool label = job.kl && kdlab_kind_has_label(job.kind);
    if (label && !a->target) job.kl = false;
    job.ce = a->target && (a->ce_weight != 0 || a->ce_rows || (job.kl && job.kind == KDLAB_NKD));    // half of NKD is one

    int64_t valid = 0;
    for (int64_t r = 0; r < a->rows; ++r) {
        if (!job.counts(r)) continue;
        ++valid;
        if ((job.ce || label) && a->target && (a->target[r] < 0 || a->target[r] >= a->cols)) return r;
    }
    job.denominator = 1;
    if (a->reduction == KDLAB_MEAN)
        job.denominator = std::isnan(a->normalizer) ? double(std::max<int64_t>(1, valid)) : a->normalizer;

    std::vector<double> values(a->reduction == KDLAB_NONE ? 0 : a->rows);
    job.values = a->reduction == KDLAB_NONE ? nullptr : values.data();

    job.rounds_bf16 = has_bf16;
    size_t element = a->dtype == KDLAB_F64 ? 8 : a->dtype == KDLAB_F32 ? 4 : 2;
    size_t grad_bytes = a->grad ? element * a->rows * a->cols : 0;
    job.stream = grad_bytes > (size_t(4) << 20) && (element * a->cols) % 64 == 0 &&
                 reinterpret_cast<uintptr_t>(a->grad) % 64 == 0;

    if (a->cols == 0 || !(job.kl || job.ce)) {               // nothing to compute: all is zero
        for (int64_t r = 0; r < a->rows; ++r) job.write_empty_row(r);
        if (grad_bytes) std::memset(a->grad, 0, grad_bytes);
    } else {
        share_rows(a->rows, a->cols, a->threads, [&](int64_t begin, int64_t end) {
            kernels->soft_kl(job, begin, end, scratch_of(scratch_bytes(a->cols)));
        });
    }
    if (a->reduction != KDLAB_NONE) {
        double sum = 0;
        for (double v : values) sum += v;
        put(a->out, a->loss_dtype, 0, sum / job.denominator);
    }
    return -1;
}

void kdlab_scale_cpu(const kdlab_scale* a) {
    if (!a->per_row && at(a->factor, a->factor_dtype, 0) == 1) return;
    const Kernels* kernels = current.load(std::memory_order_relaxed);
    share_rows(a->rows, a->cols, a->threads, [&](int64_t begin, int64_t end) { kernels->scale(*a, begin, end); });
}

const char* kdlab_isa(void) { return current.load()->name; }

int kdlab_set_isa(const char* name) {
    const Kernels* k = best_up_to(name);
    if (k) current.store(k);
    return k ? 0 : -1;
}

const char* kdlab_isa_at(int i) {
    for (const Candidate& c : candidates)
        if (runs_here(c.name) && i-- == 0) return c.name;
    return nullptr;
}
