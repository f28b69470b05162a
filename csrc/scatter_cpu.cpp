// Row scatter on the CPU, rows dealt out to threads in order.
#include "row_copy.h"
#include "scatter.h"
#include "shares.h"

namespace actcache {

void scatter_rows_cpu(const ScatterParams& params, int n_threads) {
    deal_out(params.n_rows, params.n_rows * params.n_cols * params.elem_bytes, n_threads,
             [&p = params](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) {
                     copy_row(source_row(p, i), p.elem_bytes, destination_row(p, i), p.col_stride, p.n_cols,
                              p.elem_bytes);
                 }
             });
}

}  // namespace actcache
