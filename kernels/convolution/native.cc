// Depthwise convolution for CPUs, forward and backward, called by XLA through its foreign function interface (see
// native.py).
//
// A task is one image times a range of channels. It walks down the rows and keeps the last ones, as many as the filter
// has, in float32 with zeros at both ends, so that the loops need neither bounds nor conversions. A vector register
// holds neighbouring channels; the taps stay in registers along a row. The backward pass computes a row of the output
// again, then the gradient before the activation, what the row adds to the gradients of the taps, and the next complete
// row of the input's gradient; nothing else reaches memory. Every task writes its own results (the caller sums those of
// the taps over images), so that they are the same to the bit whatever the number of threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

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

struct Shape {
  int64_t batch, rows, columns, channels, top, left;  // the last two: zeros before the first row and column
  bool silu;
};

// The last kRows rows of a range of channels, each with zeros before and after its columns.
template <int kRows, int kColumns>
class Rows {
 public:
  Rows(int64_t rows, int64_t columns, int64_t channels, int64_t before)
      : count_(rows), channels_(channels), pitch_((columns + kColumns - 1) * channels), first_(before * channels),
        data_((kRows + 1) * pitch_) {}
  // Row i from its first zeros, all zeros where there is no such row.
  const float* Padded(int64_t i) const { return data_.data() + Slot(i) * pitch_; }
  float* Columns(int64_t i) { return data_.data() + Slot(i) * pitch_ + first_; }

 private:
  int64_t Slot(int64_t i) const { return i < 0 || i >= count_ ? kRows : i % kRows; }
  const int64_t count_, channels_, pitch_, first_;
  std::vector<float> data_;
};

// Calls body(V{}, c) for ranges of channels of the width of V.
template <class Body>
inline void ForChannels(int64_t channels, Body body) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) body(Vec{}, c);
  for (; c < channels; ++c) body(0.0f, c);
}

// One image and range of channels. Pointers are to its first element.
template <class T, int kRows, int kColumns>
class Task {
 public:
  Task(const Shape& shape, int64_t channels, const T* x, const float* kernel, const float* bias)
      : shape_(shape), channels_(channels), x_(x), kernel_(kernel), bias_(bias),
        inputs_(shape.rows, shape.columns, channels, shape.left), row_(shape.columns * channels) {}

  void Forward(T* y) {
    for (int64_t row = 0; row < shape_.rows; ++row) {
      ReadInputs(row);
      Convolve<false>(inputs_, row - shape_.top, bias_, shape_.silu, row_.data());
      Write(row_.data(), y, row);
    }
  }

  void Backward(const T* dy, T* dx, float* dkernel, float* dbias) {
    Rows<kRows, kColumns> gradients(shape_.rows, shape_.columns, channels_, kColumns - 1 - shape_.left);
    std::vector<float> sums((kRows * kColumns + 1) * channels_);
    const int64_t above = kRows - 1 - shape_.top;  // the flipped filter's rows of zeros
    for (int64_t row = 0; row < shape_.rows + shape_.top; ++row) {
      if (row < shape_.rows) {
        ReadInputs(row);
        float* gradient = gradients.Columns(row);
        Read(dy, row, gradient);
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
      std::copy_n(sums.data() + tap * channels_, channels_, dkernel + tap * shape_.channels);
    std::copy_n(sums.data() + kRows * kColumns * channels_, channels_, dbias);
  }

 private:
  // Reads the rows that the output's next row needs and no earlier one did.
  void ReadInputs(int64_t row) {
    const int64_t last = std::min(row - shape_.top + kRows, shape_.rows);
    for (; read_ < last; ++read_) Read(x_, read_, inputs_.Columns(read_));
  }

  void Read(const T* from, int64_t row, float* to) const {
    from += row * shape_.columns * shape_.channels;
    for (int64_t w = 0; w < shape_.columns; ++w, from += shape_.channels, to += channels_)
      for (int64_t c = 0; c < channels_; ++c) to[c] = ToFloat(from[c]);
  }

  void Write(const float* from, T* to, int64_t row) const {
    to += row * shape_.columns * shape_.channels;
    for (int64_t w = 0; w < shape_.columns; ++w, from += channels_, to += shape_.channels)
      for (int64_t c = 0; c < channels_; ++c) FromFloat(from[c], to + c);
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
          taps[i][j] = Load<V>(kernel_ + (kFlipped ? kRows * kColumns - 1 - tap : tap) * shape_.channels + c);
        }
      const V offset = bias ? Load<V>(bias + c) : zero;
      for (int64_t w = 0; w < shape_.columns; ++w) {
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
  const T* x_;
  const float *kernel_, *bias_;
  Rows<kRows, kColumns> inputs_;
  std::vector<float> row_;
  int64_t read_ = 0;
};

// ---------------------------------------------------------------------------------------------------------------------
// Threads: XLA's own pool. The calling thread takes part and waits only for helpers that have begun, so that it never
// depends on a pool that is busy, or that a fork has left without threads.

struct Team {
  std::mutex mutex;
  std::condition_variable left;
  std::atomic<int64_t> next{0};
  int64_t active = 0;
  bool closed = false;
};

// Calls run(image, first channel, channels) for every task.
template <class Run>
void ForEachTask(ffi::ThreadPool& pool, const Shape& shape, Run run) {
  const int64_t range = shape.batch * shape.channels < 1024 ? 32 : 64, ranges = (shape.channels + range - 1) / range;
  const int64_t tasks = shape.batch * ranges;
  const bool small = shape.batch * shape.rows * shape.columns * shape.channels < (1 << 15);
  const auto team = std::make_shared<Team>();
  const auto work = [&, team = team.get()] {
    for (int64_t task; (task = team->next.fetch_add(1)) < tasks;) {
      const int64_t first = task % ranges * range;
      run(task / ranges, first, std::min(range, shape.channels - first));
    }
  };
  for (int64_t i = 1; !small && i < std::min(tasks, pool.num_threads()); ++i) {
    pool.Schedule([team, &work] {
      std::unique_lock<std::mutex> lock(team->mutex);
      if (team->closed) return;  // the call is over, and `work` with it
      ++team->active;
      lock.unlock();
      work();
      lock.lock();
      if (--team->active == 0) team->left.notify_one();
    });
  }
  work();
  std::unique_lock<std::mutex> lock(team->mutex);
  team->closed = true;
  team->left.wait(lock, [&] { return team->active == 0; });
}

// ---------------------------------------------------------------------------------------------------------------------
// The door to XLA: x (batch, rows columns, channels) in float32 or bfloat16, kernel (rows, columns, channels) and bias
// (channels,) in float32. native.py makes the shapes of the results.

using Floats = ffi::Buffer<ffi::F32>;
template <class T>
using Kind = T*;

// Calls perform(Kind<T>, rows of the filter, columns of the filter) with the last two as types.
template <class Perform>
ffi::Error Dispatch(const ffi::AnyBuffer& x, const Floats& kernel, const Floats& bias, Perform perform) {
  const auto sizes = kernel.dimensions();
  const auto is = [&](int64_t rows, int64_t columns) { return sizes[0] == rows && sizes[1] == columns; };
  if (x.dimensions().size() != 3 || sizes.size() != 3 || !(is(3, 3) || is(1, 4)) || sizes[2] != x.dimensions()[2] ||
      static_cast<int64_t>(bias.element_count()) != sizes[2])
    return ffi::Error::InvalidArgument("depthwise convolution: shape of x, kernel or bias");
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

Shape ShapeOf(const ffi::AnyBuffer& x, int64_t rows, int64_t top, int64_t left, bool silu) {
  const auto size = x.dimensions();
  return {size[0], rows, rows ? size[1] / rows : 0, size[2], top, left, silu};
}

ffi::Error ForwardCall(ffi::ThreadPool pool, ffi::AnyBuffer x, Floats kernel, Floats bias,
                       ffi::Result<ffi::AnyBuffer> y, int64_t rows, int64_t top, int64_t left, bool silu) {
  return Dispatch(x, kernel, bias, [&](auto kind, auto kernel_rows, auto kernel_columns) {
    using T = std::remove_pointer_t<decltype(kind)>;
    const Shape shape = ShapeOf(x, rows, top, left, silu);
    ForEachTask(pool, shape, [&](int64_t image, int64_t first, int64_t channels) {
      const int64_t start = image * shape.rows * shape.columns * shape.channels + first;
      Task<T, kernel_rows.value, kernel_columns.value> task(
          shape, channels, static_cast<const T*>(x.untyped_data()) + start, kernel.typed_data() + first,
          bias.typed_data() + first);
      task.Forward(static_cast<T*>(y->untyped_data()) + start);
    });
  });
}

ffi::Error BackwardCall(ffi::ThreadPool pool, ffi::AnyBuffer x, Floats kernel, Floats bias, ffi::AnyBuffer dy,
                        ffi::Result<ffi::AnyBuffer> dx, ffi::Result<Floats> dkernel, ffi::Result<Floats> dbias,
                        int64_t rows, int64_t top, int64_t left, bool silu) {
  return Dispatch(x, kernel, bias, [&](auto kind, auto kernel_rows, auto kernel_columns) {
    using T = std::remove_pointer_t<decltype(kind)>;
    const Shape shape = ShapeOf(x, rows, top, left, silu);
    ForEachTask(pool, shape, [&](int64_t image, int64_t first, int64_t channels) {
      const int64_t start = image * shape.rows * shape.columns * shape.channels + first;
      Task<T, kernel_rows.value, kernel_columns.value> task(
          shape, channels, static_cast<const T*>(x.untyped_data()) + start, kernel.typed_data() + first,
          bias.typed_data() + first);
      const int64_t taps = kernel_rows.value * kernel_columns.value;
      task.Backward(static_cast<const T*>(dy.untyped_data()) + start, static_cast<T*>(dx->untyped_data()) + start,
                    dkernel->typed_data() + image * taps * shape.channels + first,
                    dbias->typed_data() + image * shape.channels + first);
    });
  });
}

}  // namespace

#define OPTIONS .Attr<int64_t>("rows").Attr<int64_t>("top").Attr<int64_t>("left").Attr<bool>("silu")
#define ARRAYS .Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<Floats>().Arg<Floats>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(vimd_depthwise_convolution_forward, ForwardCall,
                              ffi::Ffi::Bind() ARRAYS.Ret<ffi::AnyBuffer>() OPTIONS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(vimd_depthwise_convolution_backward, BackwardCall,
                              ffi::Ffi::Bind() ARRAYS.Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<Floats>()
                                  .Ret<Floats>() OPTIONS);
