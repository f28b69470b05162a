// actcache._core: the CPU side. What is read comes as a pointer, an integer, which the caller keeps alive; what is written
// comes as an object with a buffer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "attention.h"
#include "bindings.h"
#include "isa.h"
#include "linear.h"
#include "planes.h"

namespace py = pybind11;

namespace {

constexpr std::int64_t kFloat = sizeof(float);
constexpr auto kMost = static_cast<std::size_t>(actcache::kMaxBytes);

void check_written(const actcache::Output& out, actcache::Span written, const actcache::GatherParams& params) {
    out.check_holds(written);
    out.check_apart(written, "src", actcache::span_of_table(params));
    out.check_apart(written, "row_ids", actcache::span_of_ids(params));
}

void check_threads(const char* name, int n_threads) {
    if (n_threads >= 1) return;
    throw py::value_error(std::string(name) + ": n_threads is " + std::to_string(n_threads) + ", expected 1 or more");
}

void raise_bad_id(const actcache::GatherParams& params, std::int64_t bad) {
    if (bad == params.n_rows) return;
    throw py::index_error("row_ids[" + std::to_string(bad) + "] is " + std::to_string(params.row_ids[bad]) +
                          ", expected 0 <= id < " + std::to_string(params.n_src_rows));
}

py::bytes encode_words(std::uintptr_t words, std::size_t n_words, std::size_t row_words) {
    if (n_words > kMost || row_words < 1) {
        throw py::value_error("encode_words: n_words " + std::to_string(n_words) + ", row_words " +
                              std::to_string(row_words) + ": expected at most 2^60 and 1 or more");
    }
    // Written in place and cut to size: a copy would cost as much as a third of the encoding.
    PyObject* bytes = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(actcache::encoded_bound(n_words)));
    if (bytes == nullptr) throw py::error_already_set();
    std::size_t size = 0;
    try {
        const py::gil_scoped_release unlocked;
        size = actcache::encode_words(reinterpret_cast<const unsigned char*>(words), n_words, row_words,
                                      reinterpret_cast<unsigned char*>(PyBytes_AS_STRING(bytes)));
    } catch (...) {
        Py_DECREF(bytes);
        throw;
    }
    if (_PyBytes_Resize(&bytes, static_cast<Py_ssize_t>(size)) != 0) throw py::error_already_set();
    return py::reinterpret_steal<py::bytes>(bytes);
}

}  // namespace

PYBIND11_MODULE(_core, module) {
    module.doc() =
        "Native core of actcache on the CPU: row gather and scatter, the codec of bf16 words, attention within packed "
        "sequences, linear layers by matrix tiles.";
    module.def("version", [] { return ACTCACHE_VERSION; }, "The version of actcache that this module was built from.");
    module.def(
        "gather_rows",
        [](std::uintptr_t src, std::int64_t n_src_rows, std::int64_t n_cols, std::int64_t elem_bytes,
           std::int64_t row_stride, std::int64_t col_stride, std::uintptr_t row_ids, std::int64_t n_rows,
           const py::object& dst, int n_threads) {
            const actcache::Output out("gather_rows", "dst", dst);
            const auto params = actcache::make_gather(src, n_src_rows, n_cols, elem_bytes, row_stride, col_stride,
                                                      row_ids, n_rows, reinterpret_cast<std::uintptr_t>(out.data()));
            actcache::raise_refusal("gather_rows", "src", params, actcache::check(params));
            check_written(out, actcache::span_of(out.data(), n_rows * actcache::row_bytes(params)), params);
            check_threads("gather_rows", n_threads);
            const py::gil_scoped_release unlocked;
            raise_bad_id(params, actcache::first_bad_id(params));
            actcache::gather_rows_cpu(params, n_threads);
        },
        py::arg("src_ptr"), py::arg("n_src_rows"), py::arg("n_cols"), py::arg("elem_bytes"),
        py::arg("row_stride_bytes"), py::arg("col_stride_bytes"), py::arg("row_ids_ptr"), py::arg("n_rows"),
        py::arg("dst"), py::arg("n_threads"),
        "Copy rows src[row_ids[i], :] to the contiguous dst, which must not overlap src. ValueError (sizes), "
        "IndexError (a row id) and BufferError (memory that is read-only, of another size or shared) are raised "
        "before anything is written.");
    module.def(
        "scatter_rows",
        [](const py::object& dst, std::int64_t n_dst_rows, std::int64_t n_cols, std::int64_t elem_bytes,
           std::int64_t row_stride, std::int64_t col_stride, std::uintptr_t row_ids, std::int64_t n_rows,
           std::uintptr_t src, int n_threads) {
            const actcache::Output out("scatter_rows", "dst", dst);
            const auto params = actcache::make_scatter(reinterpret_cast<std::uintptr_t>(out.data()), n_dst_rows, n_cols,
                                                       elem_bytes, row_stride, col_stride, row_ids, n_rows, src);
            const auto geometry = actcache::undoing(params);
            actcache::raise_refusal("scatter_rows", "dst", geometry, actcache::check(geometry));
            const auto written = actcache::span_of_table(geometry);
            out.check_holds(written, false);
            out.check_apart(written, "src", actcache::span_of(params.src, n_rows * actcache::row_bytes(geometry)));
            out.check_apart(written, "row_ids", actcache::span_of_ids(geometry));
            check_threads("scatter_rows", n_threads);
            const py::gil_scoped_release unlocked;
            raise_bad_id(geometry, actcache::first_bad_id(geometry));
            actcache::scatter_rows_cpu(params, n_threads);
        },
        py::arg("dst"), py::arg("n_dst_rows"), py::arg("n_cols"), py::arg("elem_bytes"), py::arg("row_stride_bytes"),
        py::arg("col_stride_bytes"), py::arg("row_ids_ptr"), py::arg("n_rows"), py::arg("src_ptr"),
        py::arg("n_threads"),
        "Copy rows src[i, :] of the contiguous src to dst[row_ids[i], :]. The ids must all be different and dst must "
        "not overlap itself or src. Errors as gather_rows.");
    module.def(
        "attend",
        [](std::uintptr_t query, std::uintptr_t key, std::uintptr_t value, const py::object& out,
           std::uintptr_t offsets, std::int64_t n_sequences, std::int64_t n_tokens, std::array<std::int64_t, 2> n_heads,
           std::array<std::int64_t, 2> widths, std::array<std::int64_t, 2> query_strides,
           std::array<std::int64_t, 2> key_strides, std::array<std::int64_t, 2> value_strides, std::int64_t window,
           float scale, int n_threads) {
            const actcache::Output output("attend", "out", out);
            const actcache::AttentionParams params = {reinterpret_cast<const float*>(query),
                                                      reinterpret_cast<const float*>(key),
                                                      reinterpret_cast<const float*>(value),
                                                      reinterpret_cast<float*>(output.data()),
                                                      reinterpret_cast<const std::int64_t*>(offsets),
                                                      n_sequences,
                                                      n_tokens,
                                                      n_heads[0],
                                                      n_heads[1],
                                                      widths[0],
                                                      widths[1],
                                                      {query_strides[0], query_strides[1]},
                                                      {key_strides[0], key_strides[1]},
                                                      {value_strides[0], value_strides[1]},
                                                      window,
                                                      scale};
            if (const char* refusal = actcache::check(params)) throw py::value_error(std::string("attend: ") + refusal);
            const auto written = actcache::span_of(output.data(), n_tokens * n_heads[0] * widths[1] * kFloat);
            output.check_holds(written);
            const auto check_apart = [&](const char* name, const float* start, std::int64_t heads, std::int64_t width,
                                         const std::array<std::int64_t, 2>& strides) {
                output.check_apart(written, name,
                                   actcache::span_of(start, n_tokens, strides[0] * kFloat, heads, strides[1] * kFloat,
                                                     width * kFloat));
            };
            check_apart("query", params.query, n_heads[0], widths[0], query_strides);
            check_apart("key", params.key, n_heads[1], widths[0], key_strides);
            check_apart("value", params.value, n_heads[1], widths[1], value_strides);
            check_threads("attend", n_threads);
            const py::gil_scoped_release unlocked;
            actcache::attend_cpu(params, n_threads);
        },
        py::arg("query_ptr"), py::arg("key_ptr"), py::arg("value_ptr"), py::arg("out"), py::arg("offsets_ptr"),
        py::arg("n_sequences"), py::arg("n_tokens"), py::arg("n_heads"), py::arg("widths"), py::arg("query_strides"),
        py::arg("key_strides"), py::arg("value_strides"), py::arg("window"), py::arg("scale"), py::arg("n_threads"),
        "Causal float32 attention of each sequence to itself; see attention.h. n_heads are those of queries and of "
        "keys, widths those of keys and of values, strides in floats from token to token and from head to head. "
        "ValueError (sizes, offsets) and BufferError (out) are raised before anything is written.");
    module.def(
        "linear",
        [](std::uintptr_t rows, std::uintptr_t weight, std::uintptr_t bias, const py::object& out, std::int64_t n_rows,
           std::int64_t n_in, std::int64_t n_out, std::int64_t row_stride, int n_threads) {
            const actcache::Output output("linear", "out", out);
            const actcache::LinearParams params = {reinterpret_cast<const float*>(rows),
                                                   reinterpret_cast<const float*>(weight),
                                                   reinterpret_cast<const float*>(bias),
                                                   reinterpret_cast<float*>(output.data()),
                                                   n_rows,
                                                   n_in,
                                                   n_out,
                                                   row_stride};
            if (const char* refusal = actcache::check(params)) throw py::value_error(std::string("linear: ") + refusal);
            const auto written = actcache::span_of(output.data(), n_rows * n_out * kFloat);
            output.check_holds(written);
            output.check_apart(written, "rows",
                               actcache::span_of(params.rows, n_rows, row_stride * kFloat, 1, 0, n_in * kFloat));
            output.check_apart(written, "weight", actcache::span_of(params.weight, n_in * n_out * kFloat));
            output.check_apart(written, "bias", actcache::span_of(params.bias, bias == 0 ? 0 : n_out * kFloat));
            check_threads("linear", n_threads);
            const py::gil_scoped_release unlocked;
            actcache::linear_cpu(params, n_threads);
        },
        py::arg("rows_ptr"), py::arg("weight_ptr"), py::arg("bias_ptr"), py::arg("out"), py::arg("n_rows"),
        py::arg("n_in"), py::arg("n_out"), py::arg("row_stride"), py::arg("n_threads"),
        "A linear layer of float32 by bfloat16 products; see linear.h. bias_ptr may be 0; row_stride is in floats. "
        "ValueError (sizes) and BufferError (out) are raised before anything is written.");
    module.def("has_tiles", &actcache::has_tiles, "Whether linear() has matrix tiles; without, it is slow.");
    module.def("encode_words", &encode_words, py::arg("words_ptr"), py::arg("n_words"), py::arg("row_words"),
               "A chunk of bf16 words, of any alignment, as PLANES.md lays it out. ValueError for sizes.");
    module.def(
        "decode_words",
        [](std::uintptr_t data, std::size_t n_bytes, std::size_t n_words, const py::object& words) {
            const actcache::Output out("decode_words", "words", words);
            const auto* chunk = reinterpret_cast<const unsigned char*>(data);
            if (n_bytes > kMost || n_words > kMost / 2) throw py::value_error("sizes must not exceed 2^60 bytes");
            const auto written = actcache::span_of(out.data(), static_cast<std::int64_t>(2 * n_words));
            out.check_holds(written);
            out.check_apart(written, "data", actcache::span_of(chunk, static_cast<std::int64_t>(n_bytes)));
            const char* refusal = nullptr;
            {
                const py::gil_scoped_release unlocked;
                refusal = actcache::decode_words(chunk, n_bytes, n_words, out.data());
            }
            if (refusal != nullptr) throw py::value_error(refusal);
        },
        py::arg("data_ptr"), py::arg("n_bytes"), py::arg("n_words"), py::arg("words"),
        "The way back, into n_words words. ValueError where the data are no chunk of so many, BufferError for words as "
        "in gather_rows; nothing is written then.");
    module.def(
        "limit_isa", [](int widest) { actcache::limit_isa(static_cast<actcache::Isa>(widest)); }, py::arg("widest"),
        "For tests: use no wider instructions than portable (0), AVX2 (1) or AVX-512 (2).");
    module.def(
        "isa", [] { return static_cast<int>(actcache::isa()); }, "The instructions in use, numbered as in limit_isa.");
}
