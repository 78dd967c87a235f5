// Depthwise convolution for CPUs, forward and backward, called by XLA through its foreign function interface (see
// native.py).
//
// A task is one image times a range of channels, and forward also of columns. It walks down the rows and keeps the last
// ones, as many as the filter has, in float32 with the neighbouring columns or zeros at both ends, so that the loops need
// neither bounds nor conversions. A vector register holds neighbouring channels; the taps stay in registers along a row. The backward pass computes a row of the output
// again, then the gradient before the activation, what the row adds to the gradients of the taps, and the next complete
// row of the input's gradient; nothing else reaches memory. Every task writes its own results (the caller sums those of
// the taps over images), so that they are the same to the bit whatever the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "../threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef float MemoryVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(kLanes * 4)));

struct Bfloat16 {
  uint16_t bits;
};

inline float ToFloat(float x) { return x; }
inline float ToFloat(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
inline void FromFloat(float x, float* result) { *result = x; }
inline void FromFloat(float x, Bfloat16* result) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  result->bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

// What the loops need of V, a Vec or, for channels that do not fill one, a float.
template <class V>
constexpr int kWidth = sizeof(V) / sizeof(float);
template <class V>
V Load(const float* p);
template <>
inline Vec Load<Vec>(const float* p) { return *reinterpret_cast<const MemoryVec*>(p); }
template <>
inline float Load<float>(const float* p) { return *p; }
inline void Store(Vec x, float* p) { *reinterpret_cast<MemoryVec*>(p) = x; }
inline void Store(float x, float* p) { *p = x; }

inline float Exp(float x) { return std::exp(x); }

// 2^n 2^f with n the nearest integer to x log2(e), and a minimax polynomial for 2^f. Relative error 2e-7; a NaN stays.
inline Vec Exp(Vec x) {
  const Vec low = Vec{} - 87.0f, high = Vec{} + 88.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const float rounder = 12582912.0f;  // 1.5 2^23: a sum with it has no fraction
  const Vec shifted = x * 1.44269504f + rounder, n = shifted - rounder;
  const Vec f = (x - n * 0.693359375f + n * 2.12194440e-4f) * 1.44269504f;
  Vec q = 0.0013264727f * f + 0.0096715128f;
  q = q * f + 0.0555073374f;
  q = q * f + 0.2402224208f;
  q = q * f + 0.6931469776f;
  const Int exponent = ((Int)shifted - 0x4b400000 + 127) << 23;
  return (q * f + 1.0f) * (Vec)exponent;
}

template <class V>
V Sigmoid(V x) { return 1.0f / (1.0f + Exp(-x)); }

// ---------------------------------------------------------------------------------------------------------------------

// Groups of channels are convolved like images of their own, each in its own order of positions: arrays are (groups *
// batch, positions, channels), with `channels` those of one group; `width` are all, the last axis of everything else.
struct Shape {
  int64_t images, batch, rows, columns, channels, width;
  int64_t top, left;  // zeros before the first row and column
  bool silu;
  bool shared;           // all groups read the same x
  const int32_t* order;  // (groups, positions): where each position of a group's map is; null if it is there

  int64_t positions() const { return rows * columns; }
  int64_t groups() const { return width / channels; }
};

// The last kRows rows of a range of channels and columns, each with the kColumns - 1 columns that a filter reads beyond it.
template <int kRows, int kColumns>
class Rows {
 public:
  Rows(int64_t rows, int64_t columns, int64_t channels)
      : count_(rows), pitch_((columns + kColumns - 1) * channels), data_((kRows + 1) * pitch_) {}
  // Row i from the first column that is read, all zeros where there is no such row.
  const float* Padded(int64_t i) const { return data_.data() + Slot(i) * pitch_; }
  float* Padded(int64_t i) { return data_.data() + Slot(i) * pitch_; }

 private:
  int64_t Slot(int64_t i) const { return i < 0 || i >= count_ ? kRows : i % kRows; }
  const int64_t count_, pitch_;
  std::vector<float> data_;
};

// Calls body(V{}, c) for ranges of channels of the width of V.
template <class Body>
inline void ForChannels(int64_t channels, Body body) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) body(Vec{}, c);
  for (; c < channels; ++c) body(0.0f, c);
}

// A range of channels or of columns.
struct Range {
  int64_t first, count;
};

// One image and ranges of channels and columns. Pointers are to its first channel.
template <class T, int kRows, int kColumns>
class Task {
 public:
  Task(const Shape& shape, int64_t group, int64_t channels, Range columns, const T* x, const float* kernel, const float* bias)
      : shape_(shape), channels_(channels), columns_(columns),
        order_(shape.order ? shape.order + group * shape.positions() : nullptr), x_(x), kernel_(kernel), bias_(bias),
        inputs_(shape.rows, columns.count, channels), row_(columns.count * channels) {}

  void Forward(T* y) {
    for (int64_t row = 0; row < shape_.rows; ++row) {
      ReadInputs(row);
      Convolve<false>(inputs_, row - shape_.top, bias_, shape_.silu, row_.data());
      Write(row_.data(), y, row);
    }
  }

  // Of all columns.
  void Backward(const T* dy, T* dx, float* dkernel, float* dbias) {
    Rows<kRows, kColumns> gradients(shape_.rows, columns_.count, channels_);
    std::vector<float> sums((kRows * kColumns + 1) * channels_);
    const int64_t above = kRows - 1 - shape_.top;  // the flipped filter's rows of zeros
    for (int64_t row = 0; row < shape_.rows + shape_.top; ++row) {
      if (row < shape_.rows) {
        ReadInputs(row);
        float* gradient = gradients.Padded(row) + (kColumns - 1 - shape_.left) * channels_;
        Read(dy, row, columns_, gradient);
        if (shape_.silu) {
          Convolve<false>(inputs_, row - shape_.top, bias_, false, row_.data());
          TimesSlope(row_.data(), gradient);
        }
        AddToSums(row - shape_.top, gradient, sums.data());
      }
      if (const int64_t complete = row - shape_.top; complete >= 0) {
        Convolve<true>(gradients, complete - above, nullptr, false, row_.data());
        Write(row_.data(), dx, complete);
      }
    }
    for (int tap = 0; tap < kRows * kColumns; ++tap)
      std::copy_n(sums.data() + tap * channels_, channels_, dkernel + tap * shape_.width);
    std::copy_n(sums.data() + kRows * kColumns * channels_, channels_, dbias);
  }

 private:
  // Reads the rows that the output's next row needs and no earlier one did.
  void ReadInputs(int64_t row) {
    const int64_t last = std::min(row - shape_.top + kRows, shape_.rows), start = columns_.first - shape_.left;
    const int64_t first = std::max<int64_t>(start, 0);
    const int64_t count = std::min(start + columns_.count + kColumns - 1, shape_.columns) - first;
    for (; read_ < last; ++read_)
      Read(x_, read_, {first, count}, inputs_.Padded(read_) + (first - start) * channels_);
  }

  void Read(const T* from, int64_t row, Range columns, float* to) const {
    for (int64_t w = 0; w < columns.count; ++w, to += channels_) {
      const T* position = from + At(row, columns.first + w);
      for (int64_t c = 0; c < channels_; ++c) to[c] = ToFloat(position[c]);
    }
  }

  void Write(const float* from, T* to, int64_t row) const {
    for (int64_t w = 0; w < columns_.count; ++w, from += channels_) {
      T* position = to + At(row, columns_.first + w);
      for (int64_t c = 0; c < channels_; ++c) FromFloat(from[c], position + c);
    }
  }

  int64_t At(int64_t row, int64_t column) const {
    const int64_t position = row * shape_.columns + column;
    return (order_ ? order_[position] : position) * shape_.channels;
  }

  // The convolution of the rows from `first` on, with the filter or the flipped filter.
  template <bool kFlipped>
  void Convolve(const Rows<kRows, kColumns>& rows, int64_t first, const float* bias, bool silu, float* result) const {
    const float* from[kRows];
    for (int i = 0; i < kRows; ++i) from[i] = rows.Padded(first + i);
    ForChannels(channels_, [&](auto zero, int64_t c) {
      using V = decltype(zero);
      V taps[kRows][kColumns];
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kColumns; ++j) {
          const int tap = i * kColumns + j;
          taps[i][j] = Load<V>(kernel_ + (kFlipped ? kRows * kColumns - 1 - tap : tap) * shape_.width + c);
        }
      const V offset = bias ? Load<V>(bias + c) : zero;
      for (int64_t w = 0; w < columns_.count; ++w) {
        V sum = offset;
        for (int i = 0; i < kRows; ++i)
          for (int j = 0; j < kColumns; ++j) sum += taps[i][j] * Load<V>(from[i] + (w + j) * channels_ + c);
        Store(silu ? sum * Sigmoid(sum) : sum, result + w * channels_ + c);
      }
    });
  }

  // Multiplies the gradient of the output by SiLU's slope at x.
  void TimesSlope(const float* x, float* gradient) const {
    ForChannels(shape_.columns * channels_, [&](auto zero, int64_t c) {
      using V = decltype(zero);
      const V value = Load<V>(x + c), s = Sigmoid(value);
      Store(Load<V>(gradient + c) * s * (1.0f + value * (1.0f - s)), gradient + c);
    });
  }

  // Adds what a row of the output adds to the gradients of the taps and, after them, of the bias.
  void AddToSums(int64_t first, const float* gradient, float* sums) const {
    const float* from[kRows];
    for (int i = 0; i < kRows; ++i) from[i] = inputs_.Padded(first + i);
    ForChannels(channels_, [&](auto zero, int64_t c) {
      using V = decltype(zero);
      V total[kRows][kColumns] = {}, of_bias = zero;
      for (int64_t w = 0; w < shape_.columns; ++w) {
        const V g = Load<V>(gradient + w * channels_ + c);
        of_bias += g;
        for (int i = 0; i < kRows; ++i)
          for (int j = 0; j < kColumns; ++j) total[i][j] += g * Load<V>(from[i] + (w + j) * channels_ + c);
      }
      const auto add = [&](V x, int tap) {
        float* sum = sums + tap * channels_ + c;
        Store(Load<V>(sum) + x, sum);
      };
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kColumns; ++j) add(total[i][j], i * kColumns + j);
      add(of_bias, kRows * kColumns);
    });
  }

  const Shape& shape_;
  const int64_t channels_;
  const Range columns_;
  const int32_t* order_;
  const T* x_;
  const float *kernel_, *bias_;
  Rows<kRows, kColumns> inputs_;
  std::vector<float> row_;
  int64_t read_ = 0;
};

// ---------------------------------------------------------------------------------------------------------------------

int64_t RangesOf(int64_t total, int64_t width) { return (total + width - 1) / width; }
Range RangeOf(int64_t total, int64_t width, int64_t i) { return {i * width, std::min(width, total - i * width)}; }

// The most that a task has.
struct Grain {
  int64_t channels, columns;
};
constexpr Grain kForwardGrain{64, 32};  // whose rows fit the fastest cache
// All columns, since their sums are of all; therefore fewer channels, if there are few tasks.
Grain BackwardGrain(const Shape& shape) { return {shape.images * shape.channels < 1024 ? 32 : 64, shape.columns}; }

// Calls run(image, channels, columns) for every task.
template <class Run>
void ForEachTask(ffi::ThreadPool& pool, const Shape& shape, Grain most, Run run) {
  const int64_t ranges = RangesOf(shape.channels, most.channels), bands = RangesOf(shape.columns, most.columns);
  const int64_t tasks = shape.images * ranges * bands;
  const bool small = shape.images * shape.positions() * shape.channels < (1 << 15);
  RunTasks(pool, tasks, small ? 1 : std::min(tasks, pool.num_threads()), [&](int64_t task, int64_t) {
    run(task / bands / ranges, RangeOf(shape.channels, most.channels, task / bands % ranges),
        RangeOf(shape.columns, most.columns, task % bands));
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// The door to XLA: x (groups * batch or batch, positions, channels) in float32 or bfloat16, kernel (rows, columns, width)
// and bias (width,) in float32, and an order (groups, positions) or nothing. native.py makes the shapes of the results.

using Floats = ffi::Buffer<ffi::F32>;
using Order = ffi::Buffer<ffi::S32>;
template <class T>
using Kind = T*;

// Whether every group's order names each position once; otherwise results would be missing, or written by two tasks.
bool VisitsAll(const Shape& shape) {
  std::vector<bool> visited;
  for (int64_t i = 0; shape.order && i < shape.groups() * shape.positions(); ++i) {
    if (i % shape.positions() == 0) visited.assign(shape.positions(), false);
    const int32_t position = shape.order[i];
    if (position < 0 || position >= shape.positions() || visited[position]) return false;
    visited[position] = true;
  }
  return true;
}

// The shape of a call by its arrays, of which `result` is y or the gradient of x; no images if they do not fit together.
Shape ShapeOf(const ffi::AnyBuffer& x, const Floats& kernel, const Floats& bias, const Order& order,
              const ffi::AnyBuffer& result, int64_t rows, int64_t top, int64_t left, bool silu) {
  const auto size = result.dimensions(), source = x.dimensions(), filter = kernel.dimensions();
  if (size.size() != 3 || source.size() != 3 || filter.size() != 3 || rows < 1 || size[1] % rows) return {};
  Shape shape{};
  shape.rows = rows;
  shape.columns = size[1] / rows;
  shape.channels = size[2];
  shape.width = filter[2];
  shape.top = top;
  shape.left = left;
  shape.silu = silu;
  if (!shape.channels || shape.width % shape.channels || source[1] != size[1] || source[2] != size[2] ||
      static_cast<int64_t>(bias.element_count()) != shape.width)
    return {};
  shape.batch = size[0] / shape.groups();
  shape.shared = source[0] == shape.batch;
  if (size[0] % shape.groups() || !(shape.shared || source[0] == size[0])) return {};
  if (order.element_count()) {
    if (static_cast<int64_t>(order.element_count()) != shape.groups() * shape.positions()) return {};
    shape.order = order.typed_data();
    if (!VisitsAll(shape)) return {};
  }
  shape.images = size[0];
  return shape;
}

// Calls perform(Kind<T>, rows of the filter, columns of the filter) with the last two as types.
template <class Perform>
ffi::Error Dispatch(const Shape& shape, const ffi::AnyBuffer& x, const Floats& kernel, Perform perform) {
  const auto is = [&](int64_t rows, int64_t columns) {
    return kernel.dimensions()[0] == rows && kernel.dimensions()[1] == columns;
  };
  if (x.element_count() && !shape.images)
    return ffi::Error::InvalidArgument("depthwise convolution: shape of an array, or an order that visits a position twice");
  if (!(is(3, 3) || is(1, 4))) return ffi::Error::InvalidArgument("depthwise convolution: shape of kernel");
  const auto of_type = [&](auto kind) {
    if (is(3, 3)) perform(kind, std::integral_constant<int, 3>(), std::integral_constant<int, 3>());
    else perform(kind, std::integral_constant<int, 1>(), std::integral_constant<int, 4>());
    return ffi::Error::Success();
  };
  switch (x.element_type()) {
    case ffi::DataType::F32: return of_type(Kind<float>());
    case ffi::DataType::BF16: return of_type(Kind<Bfloat16>());
    default: return ffi::Error::InvalidArgument("depthwise convolution: type of x");
  }
}

// Calls run(a task, where its result starts, its image, its first channel of all) for every task.
template <class T, int kRows, int kColumns, class Run>
void ForEachPart(ffi::ThreadPool& pool, const Shape& shape, Grain most, const ffi::AnyBuffer& x, const Floats& kernel,
                 const Floats& bias, Run run) {
  ForEachTask(pool, shape, most, [&](int64_t image, Range channels, Range columns) {
    const int64_t size = shape.positions() * shape.channels, group = image / shape.batch;
    const int64_t source = shape.shared ? image % shape.batch : image, start = group * shape.channels + channels.first;
    Task<T, kRows, kColumns> task(shape, group, channels.count, columns,
                                  static_cast<const T*>(x.untyped_data()) + source * size + channels.first,
                                  kernel.typed_data() + start, bias.typed_data() + start);
    run(task, image * size + channels.first, image % shape.batch, start);
  });
}

ffi::Error ForwardCall(ffi::ThreadPool pool, ffi::AnyBuffer x, Floats kernel, Floats bias, Order order,
                       ffi::Result<ffi::AnyBuffer> y, int64_t rows, int64_t top, int64_t left, bool silu) {
  const Shape shape = ShapeOf(x, kernel, bias, order, *y, rows, top, left, silu);
  return Dispatch(shape, x, kernel, [&](auto kind, auto kernel_rows, auto kernel_columns) {
    using T = std::remove_pointer_t<decltype(kind)>;
    ForEachPart<T, kernel_rows.value, kernel_columns.value>(
        pool, shape, kForwardGrain, x, kernel, bias,
        [&](auto& task, int64_t at, int64_t, int64_t) { task.Forward(static_cast<T*>(y->untyped_data()) + at); });
  });
}

ffi::Error BackwardCall(ffi::ThreadPool pool, ffi::AnyBuffer x, Floats kernel, Floats bias, Order order,
                        ffi::AnyBuffer dy, ffi::Result<ffi::AnyBuffer> dx, ffi::Result<Floats> dkernel,
                        ffi::Result<Floats> dbias, int64_t rows, int64_t top, int64_t left, bool silu) {
  const Shape shape = ShapeOf(x, kernel, bias, order, *dx, rows, top, left, silu);
  return Dispatch(shape, x, kernel, [&](auto kind, auto kernel_rows, auto kernel_columns) {
    using T = std::remove_pointer_t<decltype(kind)>;
    const int64_t taps = kernel_rows.value * kernel_columns.value;
    ForEachPart<T, kernel_rows.value, kernel_columns.value>(
        pool, shape, BackwardGrain(shape), x, kernel, bias, [&](auto& task, int64_t at, int64_t sequence, int64_t channel) {
          task.Backward(static_cast<const T*>(dy.untyped_data()) + at, static_cast<T*>(dx->untyped_data()) + at,
                        dkernel->typed_data() + sequence * taps * shape.width + channel,
                        dbias->typed_data() + sequence * shape.width + channel);
        });
  });
}

}  // namespace

#define OPTIONS .Attr<int64_t>("rows").Attr<int64_t>("top").Attr<int64_t>("left").Attr<bool>("silu")
#define ARRAYS .Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<Floats>().Arg<Floats>().Arg<Order>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(vimd_depthwise_convolution_forward, ForwardCall,
                              ffi::Ffi::Bind() ARRAYS.Ret<ffi::AnyBuffer>() OPTIONS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(vimd_depthwise_convolution_backward, BackwardCall,
                              ffi::Ffi::Bind() ARRAYS.Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<Floats>()
                                  .Ret<Floats>() OPTIONS);
