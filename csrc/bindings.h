// What both Python modules do with their arguments: integers become checked parameters, and memory on the host that is
// written comes as an object with a buffer, which says whether it may be. (Nobody may write to `bytes`, and in a file
// that is mapped for reading it is the end of the process.)
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <string>
#include <utility>

#include "gather.h"
#include "scatter.h"

namespace actcache {

// Where memory begins and ends.
struct Span {
    std::uintptr_t begin;
    std::uintptr_t end;
};

// Of `n_outer` times `n_inner` runs of bytes. Sums wrap around for strides that no memory has.
inline Span span_of(const void* start, std::int64_t n_outer, std::int64_t outer_stride, std::int64_t n_inner,
                    std::int64_t inner_stride, std::int64_t run_bytes) {
    const auto first = reinterpret_cast<std::uintptr_t>(start);
    Span span = {first, first};
    if (n_outer < 1 || n_inner < 1) return span;
    span.end += static_cast<std::uintptr_t>(run_bytes);
    for (const auto& [n, stride] : {std::pair(n_outer, outer_stride), std::pair(n_inner, inner_stride)}) {
        const std::uintptr_t reach = static_cast<std::uintptr_t>(n - 1) * static_cast<std::uintptr_t>(stride);
        (stride < 0 ? span.begin : span.end) += reach;
    }
    return span;
}

inline Span span_of(const void* start, std::int64_t n_bytes) { return span_of(start, 1, 0, 1, 0, n_bytes); }

inline Span span_of_table(const GatherParams& p) {
    return span_of(p.src, p.n_src_rows, p.row_stride, p.n_cols, p.col_stride, p.elem_bytes);
}

inline Span span_of_ids(const GatherParams& p) { return span_of(p.row_ids, p.n_rows, sizeof(std::int64_t), 1, 0, 8); }

// Host memory that a function writes: any object with a buffer that is writable. Lives while the GIL is held, and what
// runs without it ends before.
class Output {
   public:
    Output(const char* function, const char* name, const pybind11::object& object) : what_(function) {
        what_ += std::string(": ") + name;
        if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
            PyErr_Clear();
            refuse(std::string(" is of type ") + Py_TYPE(object.ptr())->tp_name + ", expected writable memory");
        }
        const bool has_objects = view_.format != nullptr && std::strchr(view_.format, 'O') != nullptr;
        if (view_.readonly != 0 || has_objects) {
            const char* found = has_objects ? "of Python objects" : "read-only memory";
            PyBuffer_Release(&view_);
            refuse(std::string(" is ") + found + ", expected writable memory");
        }
    }
    ~Output() { PyBuffer_Release(&view_); }
    Output(const Output&) = delete;
    Output& operator=(const Output&) = delete;

    unsigned char* data() const { return static_cast<unsigned char*>(view_.buf); }

    // Raises BufferError unless these bytes lie in the buffer; or, contiguous, are the buffer.
    void check_holds(Span written, bool contiguous = true) const {
        Span held = {address(), address()};
        if (view_.len > 0) held.end += static_cast<std::uintptr_t>(view_.itemsize);
        for (int axis = 0; view_.len > 0 && axis < view_.ndim; ++axis) {
            const Py_ssize_t stride = view_.strides[axis];
            (stride < 0 ? held.begin : held.end) += static_cast<std::uintptr_t>((view_.shape[axis] - 1) * stride);
        }
        const bool in_order = !contiguous || PyBuffer_IsContiguous(&view_, 'C') != 0;
        const bool fits = contiguous ? written.end - written.begin == static_cast<std::uintptr_t>(view_.len)
                                     : held.begin <= written.begin && written.end <= held.end;
        if (written.begin == written.end || (in_order && fits)) return;
        refuse(" has " + std::to_string(view_.len) + (in_order ? "" : " scattered") + " bytes, expected " +
               std::to_string(written.end - written.begin) + (contiguous ? " contiguous ones" : " from its first"));
    }

    // Raises BufferError where a byte that is written is also read.
    void check_apart(Span written, const char* other, Span read) const {
        if (written.begin < read.end && read.begin < written.end) {
            refuse(std::string(" shares memory with ") + other + ", expected memory of its own");
        }
    }

   private:
    [[noreturn]] void refuse(const std::string& found) const { throw pybind11::buffer_error(what_ + found); }
    std::uintptr_t address() const { return reinterpret_cast<std::uintptr_t>(view_.buf); }

    std::string what_;
    Py_buffer view_{};
};

inline GatherParams make_gather(std::uintptr_t src, std::int64_t n_src_rows, std::int64_t n_cols,
                                std::int64_t elem_bytes, std::int64_t row_stride, std::int64_t col_stride,
                                std::uintptr_t row_ids, std::int64_t n_rows, std::uintptr_t dst) {
    return {reinterpret_cast<const unsigned char*>(src),
            reinterpret_cast<const std::int64_t*>(row_ids),
            reinterpret_cast<unsigned char*>(dst),
            n_src_rows,
            n_rows,
            n_cols,
            row_stride,
            col_stride,
            elem_bytes};
}

inline ScatterParams make_scatter(std::uintptr_t dst, std::int64_t n_dst_rows, std::int64_t n_cols,
                                  std::int64_t elem_bytes, std::int64_t row_stride, std::int64_t col_stride,
                                  std::uintptr_t row_ids, std::int64_t n_rows, std::uintptr_t src) {
    return {reinterpret_cast<const unsigned char*>(src),
            reinterpret_cast<const std::int64_t*>(row_ids),
            reinterpret_cast<unsigned char*>(dst),
            n_dst_rows,
            n_rows,
            n_cols,
            row_stride,
            col_stride,
            elem_bytes};
}

// `name` is the function's; `table` its side of many rows, src or dst.
inline void raise_refusal(const char* name, const char* table, const GatherParams& p, const char* refusal) {
    if (refusal == nullptr) return;
    const auto number = [](const std::string& what, std::int64_t value) { return what + std::to_string(value); };
    throw pybind11::value_error(std::string(name) + ": " + refusal +
                                number(std::string(" (n_") + table + "_rows ", p.n_src_rows) +
                                number(", n_cols ", p.n_cols) + number(", elem_bytes ", p.elem_bytes) +
                                number(", row_stride_bytes ", p.row_stride) +
                                number(", col_stride_bytes ", p.col_stride) + number(", n_rows ", p.n_rows) + ")");
}

}  // namespace actcache
