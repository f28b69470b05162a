// Row gather on the CPU, rows dealt out to threads in order.
#include "gather.h"
#include "row_copy.h"
#include "shares.h"

namespace actcache {

void gather_rows_cpu(const GatherParams& params, int n_threads) {
    deal_out(params.n_rows, params.n_rows * row_bytes(params), n_threads,
             [&p = params](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) {
                     copy_row(source_row(p, i), p.col_stride, destination_row(p, i), p.elem_bytes, p.n_cols,
                              p.elem_bytes);
                 }
             });
}

}  // namespace actcache
