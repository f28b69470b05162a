// actcache._core: the CPU side. Pointers come as integers; the caller keeps what they point to alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "attention.h"
#include "bindings.h"
#include "isa.h"
#include "linear.h"

namespace py = pybind11;

namespace {

void check_threads(const char* name, int n_threads) {
    if (n_threads >= 1) return;
    throw py::value_error(std::string(name) + ": n_threads is " + std::to_string(n_threads) + ", expected 1 or more");
}

void raise_bad_id(const actcache::GatherParams& params, std::int64_t bad) {
    if (bad == params.n_rows) return;
    throw py::index_error("row_ids[" + std::to_string(bad) + "] is " + std::to_string(params.row_ids[bad]) +
                          ", expected 0 <= id < " + std::to_string(params.n_src_rows));
}

py::bytes encode(const actcache::PlanesInput& input) {
    if (input.n > static_cast<std::size_t>(actcache::kMaxBytes) || input.row_words < 1) {
        throw py::value_error("encode: n_words " + std::to_string(input.n) + ", row_words " +
                              std::to_string(input.row_words) + ": expected at most 2^60 and 1 or more");
    }
    // Written in place and cut to size: a copy would cost as much as a third of the encoding.
    PyObject* bytes = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(actcache::encoded_bound(input.n)));
    if (bytes == nullptr) throw py::error_already_set();
    std::size_t size = 0;
    try {
        const py::gil_scoped_release unlocked;
        size = actcache::encode_planes(input, reinterpret_cast<unsigned char*>(PyBytes_AS_STRING(bytes)));
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
        "Native core of actcache on the CPU: row gather and scatter, planes of bf16 words and "
        "their codec, attention within packed sequences, linear layers by matrix tiles.";
    module.def("version", [] { return ACTCACHE_VERSION; }, "The version of actcache that this module was built from.");
    module.def(
        "gather_rows",
        [](std::uintptr_t src, std::int64_t n_src_rows, std::int64_t n_cols, std::int64_t elem_bytes,
           std::int64_t row_stride, std::int64_t col_stride, std::uintptr_t row_ids, std::int64_t n_rows,
           std::uintptr_t dst, int n_threads) {
            const auto params = actcache::make_gather(src, n_src_rows, n_cols, elem_bytes, row_stride, col_stride,
                                                      row_ids, n_rows, dst);
            actcache::raise_refusal("gather_rows", "src", params, actcache::check(params));
            check_threads("gather_rows", n_threads);
            const py::gil_scoped_release unlocked;
            raise_bad_id(params, actcache::first_bad_id(params));
            actcache::gather_rows_cpu(params, n_threads);
        },
        py::arg("src_ptr"), py::arg("n_src_rows"), py::arg("n_cols"), py::arg("elem_bytes"),
        py::arg("row_stride_bytes"), py::arg("col_stride_bytes"), py::arg("row_ids_ptr"), py::arg("n_rows"),
        py::arg("dst_ptr"), py::arg("n_threads"),
        "Copy rows src[row_ids[i], :] to the contiguous dst, which must not overlap src. ValueError (sizes) and "
        "IndexError (a row id) are raised before anything is written.");
    module.def(
        "scatter_rows",
        [](std::uintptr_t dst, std::int64_t n_dst_rows, std::int64_t n_cols, std::int64_t elem_bytes,
           std::int64_t row_stride, std::int64_t col_stride, std::uintptr_t row_ids, std::int64_t n_rows,
           std::uintptr_t src, int n_threads) {
            const auto params = actcache::make_scatter(dst, n_dst_rows, n_cols, elem_bytes, row_stride, col_stride,
                                                       row_ids, n_rows, src);
            const auto geometry = actcache::undoing(params);
            actcache::raise_refusal("scatter_rows", "dst", geometry, actcache::check(geometry));
            check_threads("scatter_rows", n_threads);
            const py::gil_scoped_release unlocked;
            raise_bad_id(geometry, actcache::first_bad_id(geometry));
            actcache::scatter_rows_cpu(params, n_threads);
        },
        py::arg("dst_ptr"), py::arg("n_dst_rows"), py::arg("n_cols"), py::arg("elem_bytes"),
        py::arg("row_stride_bytes"), py::arg("col_stride_bytes"), py::arg("row_ids_ptr"), py::arg("n_rows"),
        py::arg("src_ptr"), py::arg("n_threads"),
        "Copy rows src[i, :] of the contiguous src to dst[row_ids[i], :]. The ids must all be different and dst must "
        "not "
        "overlap itself or src. ValueError (sizes) and IndexError (a row id) are raised before anything is written.");
    module.def(
        "gather_planes",
        [](std::uintptr_t src, std::int64_t n_src_rows, std::int64_t n_cols, std::int64_t elem_bytes,
           std::int64_t row_stride, std::int64_t col_stride, std::uintptr_t row_ids, std::int64_t n_rows,
           std::uintptr_t exponents, std::uintptr_t rests, int n_threads) {
            const actcache::PlanesParams params = {
                actcache::make_gather(src, n_src_rows, n_cols, elem_bytes, row_stride, col_stride, row_ids, n_rows,
                                      exponents),
                reinterpret_cast<unsigned char*>(rests)};
            actcache::raise_refusal("gather_planes", "src", params.gather, actcache::check(params));
            check_threads("gather_planes", n_threads);
            const py::gil_scoped_release unlocked;
            raise_bad_id(params.gather, actcache::first_bad_id(params.gather));
            actcache::gather_planes_cpu(params, n_threads);
        },
        py::arg("src_ptr"), py::arg("n_src_rows"), py::arg("n_cols"), py::arg("elem_bytes"),
        py::arg("row_stride_bytes"), py::arg("col_stride_bytes"), py::arg("row_ids_ptr"), py::arg("n_rows"),
        py::arg("exponents_ptr"), py::arg("rests_ptr"), py::arg("n_threads"),
        "As gather_rows, for 2-byte words, which are split on the way into contiguous planes of exponents and rests.");
    module.def(
        "attend",
        [](std::uintptr_t query, std::uintptr_t key, std::uintptr_t value, std::uintptr_t out, std::uintptr_t offsets,
           std::int64_t n_sequences, std::int64_t n_tokens, std::array<std::int64_t, 2> n_heads,
           std::array<std::int64_t, 2> widths, std::array<std::int64_t, 2> query_strides,
           std::array<std::int64_t, 2> key_strides, std::array<std::int64_t, 2> value_strides, std::int64_t window,
           float scale, int n_threads) {
            const actcache::AttentionParams params = {reinterpret_cast<const float*>(query),
                                                      reinterpret_cast<const float*>(key),
                                                      reinterpret_cast<const float*>(value),
                                                      reinterpret_cast<float*>(out),
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
            check_threads("attend", n_threads);
            const py::gil_scoped_release unlocked;
            actcache::attend_cpu(params, n_threads);
        },
        py::arg("query_ptr"), py::arg("key_ptr"), py::arg("value_ptr"), py::arg("out_ptr"), py::arg("offsets_ptr"),
        py::arg("n_sequences"), py::arg("n_tokens"), py::arg("n_heads"), py::arg("widths"), py::arg("query_strides"),
        py::arg("key_strides"), py::arg("value_strides"), py::arg("window"), py::arg("scale"), py::arg("n_threads"),
        "Causal float32 attention of each sequence to itself; see attention.h. n_heads are those of queries and of "
        "keys, widths those of keys and of values, strides in floats from token to token and from head to head. "
        "ValueError (sizes, offsets) is raised before anything is written.");
    module.def(
        "linear",
        [](std::uintptr_t rows, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t out, std::int64_t n_rows,
           std::int64_t n_in, std::int64_t n_out, std::int64_t row_stride, int n_threads) {
            const actcache::LinearParams params = {reinterpret_cast<const float*>(rows),
                                                   reinterpret_cast<const float*>(weight),
                                                   reinterpret_cast<const float*>(bias),
                                                   reinterpret_cast<float*>(out),
                                                   n_rows,
                                                   n_in,
                                                   n_out,
                                                   row_stride};
            if (const char* refusal = actcache::check(params)) throw py::value_error(std::string("linear: ") + refusal);
            check_threads("linear", n_threads);
            const py::gil_scoped_release unlocked;
            actcache::linear_cpu(params, n_threads);
        },
        py::arg("rows_ptr"), py::arg("weight_ptr"), py::arg("bias_ptr"), py::arg("out_ptr"), py::arg("n_rows"),
        py::arg("n_in"), py::arg("n_out"), py::arg("row_stride"), py::arg("n_threads"),
        "A linear layer of float32 by bfloat16 products; see linear.h. bias_ptr may be 0; row_stride is in floats. "
        "ValueError (sizes) is raised before anything is written.");
    module.def("has_tiles", &actcache::has_tiles, "Whether linear() has matrix tiles; without, it is slow.");
    module.def(
        "encode_words",
        [](std::uintptr_t words, std::size_t n_words, std::size_t row_words) {
            return encode({reinterpret_cast<const unsigned char*>(words), nullptr, nullptr, n_words, row_words});
        },
        py::arg("words_ptr"), py::arg("n_words"), py::arg("row_words"),
        "A chunk of bf16 words, of any alignment, as PLANES.md lays it out. ValueError for sizes.");
    module.def(
        "encode_planes",
        [](std::uintptr_t exponents, std::uintptr_t rests, std::size_t n_words, std::size_t row_words) {
            return encode({nullptr, reinterpret_cast<const std::uint8_t*>(exponents),
                           reinterpret_cast<const std::uint8_t*>(rests), n_words, row_words});
        },
        py::arg("exponents_ptr"), py::arg("rests_ptr"), py::arg("n_words"), py::arg("row_words"),
        "As encode_words, from planes that gather_planes has split.");
    module.def(
        "decode_words",
        [](std::uintptr_t data, std::size_t n_bytes, std::size_t n_words, std::uintptr_t words) {
            const char* refusal = nullptr;
            {
                const py::gil_scoped_release unlocked;
                refusal = actcache::decode_planes(reinterpret_cast<const unsigned char*>(data), n_bytes, n_words,
                                                  reinterpret_cast<unsigned char*>(words));
            }
            if (refusal != nullptr) throw py::value_error(refusal);
        },
        py::arg("data_ptr"), py::arg("n_bytes"), py::arg("n_words"), py::arg("words_ptr"),
        "The way back, into n_words words. ValueError where the data are no chunk of so many; nothing is written "
        "then.");
    module.def(
        "limit_isa", [](int widest) { actcache::limit_isa(static_cast<actcache::Isa>(widest)); }, py::arg("widest"),
        "For tests: use no wider instructions than portable (0), AVX2 (1) or AVX-512 (2).");
    module.def(
        "isa", [] { return static_cast<int>(actcache::isa()); }, "The instructions in use, numbered as in limit_isa.");
}
