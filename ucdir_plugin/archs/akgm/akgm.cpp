// Adaptive kernel convolution (UCDIR, eq. 2) for CPUs, forward and backward. See akgm.py for the notation.
//
// A strip is some rows of one image, stored per channel with one zero behind each row, so that a neighbour at (dy, dx)
// is always dy * pitch + dx further on (pitch = width + 1) and vectors of positions run across row ends. Registers hold
// the N basis responses of a few vectors of positions: the C * N channels never reach memory. The gradients of weight and
// bias go another way, see there. Vectors are those of the compiler (GCC, Clang), their length follows the instruction
// set that it is told to use.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef _OPENMP
#include <omp.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, MAX_BASES = 8;  // 32 registers
#elif defined(__AVX__)
constexpr int BYTES = 32, MAX_BASES = 4;  // 16 registers
#else
#error "needs AVX2 or AVX-512"
#endif

template <typename T>
struct Vector {
  static constexpr long lanes = BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(BYTES)));
};
template <typename T>
using Vec = typename Vector<T>::type;

// memcpy, since type deduction loses the attribute of a type that need not be aligned.
template <typename T, typename V = Vec<T>>
INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <typename T, typename V>
INLINE void store(T* p, V v) { std::memcpy(p, &v, sizeof(V)); }

// The compiler would read an operand that is used twice from memory twice; the load ports are the bottleneck then.
template <typename V>
INLINE V in_register(V v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#else
  asm("" : "+x"(v));
#endif
  return v;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLE 1
#endif
#endif

// Integers, as many and as large as the numbers of a vector.
template <typename T>
using Lanes = decltype(Vec<T>{} < Vec<T>{});

// out[i] = v[which[i]]
template <typename T>
INLINE Vec<T> permute(Vec<T> v, Lanes<T> which) {
#if defined(__clang__)
  Vec<T> out;
  for (long i = 0; i < Vector<T>::lanes; i++) out[i] = v[which[i]];
  return out;
#else
  return __builtin_shuffle(v, which);
#endif
}

long round_up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }
long ceil_div(long n, long d) { return (n + d - 1) / d; }

int threads() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// Memory that each thread keeps between calls: fresh pages would cost more than the work on small inputs.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  template <typename T>
  T* get(long elements) {
    const size_t bytes = round_up(elements * sizeof(T), 64);
    if (bytes > size_) {
      std::free(memory_);
      memory_ = std::aligned_alloc(64, bytes);
      size_ = memory_ ? bytes : 0;
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};
thread_local Scratch worker_scratch, weight_scratch;

// Calls body(item, scratch) for each item; false where memory is short.
template <typename T, typename Body>
bool parallel(long items, long elements, Body body) {
  std::atomic<bool> good{true};
#pragma omp parallel if (items > 1)
  {
    T* scratch = worker_scratch.get<T>(elements);
    if (!scratch) good = false;
#pragma omp for schedule(dynamic)
    for (long item = 0; item < items; item++)
      if (scratch) body(item, scratch);
  }
  return good;
}

// dst[j][i] (or +=) src[i][j]
template <typename T>
INLINE void transpose_plain(const T* src, long src_ld, T* dst, long dst_ld, long rows, long cols, bool add) {
  for (long j = 0; j < cols; j++)
    for (long i = 0; i < rows; i++) dst[j * dst_ld + i] = src[i * src_ld + j] + (add ? dst[j * dst_ld + i] : T(0));
}

#if HAS_SHUFFLE
template <int QUADS>
struct QuadsOf;
template <>
struct QuadsOf<1> { typedef float type __attribute__((vector_size(16))); };
template <>
struct QuadsOf<2> { typedef float type __attribute__((vector_size(32))); };
template <>
struct QuadsOf<4> { typedef float type __attribute__((vector_size(64))); };
template <int QUADS>
using Quads = typename QuadsOf<QUADS>::type;

// Four rows, STEP apart, of four numbers behind each other: loads that insert do without the one port that shuffles.
template <int QUADS>
INLINE Quads<QUADS> load_quads(const float* p, long step) {
  if constexpr (QUADS == 1) return load<float, Quads<1>>(p);
#if defined(__AVX512F__)
  if constexpr (QUADS == 4) {
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
    v = _mm512_insertf32x4(v, _mm_loadu_ps(p + step), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 2 * step), 2);
    return _mm512_insertf32x4(v, _mm_loadu_ps(p + 3 * step), 3);
  }
#endif
  if constexpr (QUADS == 2)
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + step), 1);
}

// Within each quad of a and b, units of SIZE numbers taken in turns from the first or second halves.
template <int SIZE, int HALF, typename V, size_t... I>
INLINE V zip(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(
      a, b, (I / 4 * 4 + 2 * HALF + I % 4 / (2 * SIZE) * SIZE + I % SIZE + I % 4 / SIZE % 2 * sizeof...(I))...);
}

// 4 QUADS rows of four numbers.
template <int QUADS>
INLINE void transpose_quads(const float* src, long src_ld, float* dst, long dst_ld, bool add) {
  typedef Quads<QUADS> V;
  const std::make_index_sequence<4 * QUADS> all;
  V a[4];
  for (int i = 0; i < 4; i++) a[i] = load_quads<QUADS>(src + i * src_ld, 4 * src_ld);
  const V low[2] = {zip<1, 0>(a[0], a[1], all), zip<1, 0>(a[2], a[3], all)};
  const V high[2] = {zip<1, 1>(a[0], a[1], all), zip<1, 1>(a[2], a[3], all)};
  const V out[4] = {zip<2, 0>(low[0], low[1], all), zip<2, 1>(low[0], low[1], all), zip<2, 0>(high[0], high[1], all),
                    zip<2, 1>(high[0], high[1], all)};
  for (int j = 0; j < 4; j++) {
    float* p = dst + j * dst_ld;
    store(p, add ? load<float, V>(p) + out[j] : out[j]);
  }
}

template <int QUADS>
void transpose_rows(const float* src, long src_ld, float* dst, long dst_ld, long rows, long cols, bool add) {
  constexpr long R = 4 * QUADS;
  const long r = rows / R * R, c = cols / 4 * 4;
  for (long i = 0; i < r; i += R) {
    for (long j = 0; j < c; j += 4)
      transpose_quads<QUADS>(src + i * src_ld + j, src_ld, dst + j * dst_ld + i, dst_ld, add);
    transpose_plain(src + i * src_ld + c, src_ld, dst + c * dst_ld + i, dst_ld, R, cols - c, add);
  }
  src += r * src_ld, dst += r;
  if constexpr (QUADS > 1)
    transpose_rows<QUADS / 2>(src, src_ld, dst, dst_ld, rows - r, cols, add);
  else
    transpose_plain(src, src_ld, dst, dst_ld, rows - r, cols, add);
}
#endif

template <typename T>
void transpose(const T* src, long src_ld, T* dst, long dst_ld, long rows, long cols, bool add = false) {
#if HAS_SHUFFLE
  if constexpr (std::is_same_v<T, float>) {
    transpose_rows<BYTES / 16>(src, src_ld, dst, dst_ld, rows, cols, add);
    return;
  }
#endif
  transpose_plain(src, src_ld, dst, dst_ld, rows, cols, add);
}

template <typename T, int LENGTH>
INLINE void copy_runs_of(const T* src, long src_step, T* dst, long dst_step, long length, long runs) {
  for (long i = 0; i < runs; i++)
    std::memcpy(dst + i * dst_step, src + i * src_step, (LENGTH ? LENGTH : length) * sizeof(T));
}
template <typename T>
void copy_runs(const T* src, long src_step, T* dst, long dst_step, long length, long runs) {
  const auto copy = length == 2   ? copy_runs_of<T, 2>
                    : length == 4 ? copy_runs_of<T, 4>
                    : length == 8 ? copy_runs_of<T, 8>
                                  : copy_runs_of<T, 0>;
  copy(src, src_step, dst, dst_step, length, runs);
}

struct Shape {
  long batch, channels, bases, height, width;
  long per_group() const { return channels / bases; }
  long pitch() const { return width + 1; }
  // Length of mix, repeated, at which a vector may be read from each of its N numbers that begins one.
  long mix_period(long lanes) const {
    return lanes % bases == 0 ? lanes : bases % lanes == 0 ? bases : bases + lanes;
  }
  // Groups that are handled together: of channels-last memory whole cache lines are read.
  long chunk() const { return ceil_div(bases, std::max(1L, std::min(bases, channels / 16))); }
  long chunks() const { return ceil_div(bases, chunk()); }
};

// A (B, C, H, W) tensor, contiguous or channels-last.
template <typename T>
struct Image {
  T* data;
  long channels, height, width;
  bool channels_last;

  // A row of pixels of a channels-last tensor, of one channel of a contiguous one.
  T* pixel(long image, long row) const { return data + (image * height + row) * width * channels; }
  T* line(long image, long channel, long row) const {
    return data + ((image * channels + channel) * height + row) * width;
  }

  // Rows [top, bottom) of channels [first, first + count) -> planes, zeros beyond the image and behind each row.
  using Value = std::remove_const_t<T>;
  void pack(long image, long first, long count, long top, long bottom, Value* planes, long stride) const {
    const long pitch = width + 1;
    for (long row = top; row < bottom; row++) {
      Value* dst = planes + (row - top) * pitch;
      if (row < 0 || row >= height) {
        for (long ch = 0; ch < count; ch++) std::memset(dst + ch * stride, 0, pitch * sizeof(T));
        continue;
      }
      if (channels_last)
        transpose<Value>(pixel(image, row) + first, channels, dst, stride, width, count);
      else
        for (long ch = 0; ch < count; ch++)
          std::memcpy(dst + ch * stride, line(image, first + ch, row), width * sizeof(T));
      for (long ch = 0; ch < count; ch++) dst[ch * stride + width] = 0;
    }
  }

  // Rows [top, bottom) -> the channels of one position behind those of another, with zeros as in pack.
  void pack_pixels(long image, long first, long count, long top, long bottom, Value* dst, long step) const {
    for (long row = top; row < bottom; row++, dst += (width + 1) * step) {
      if (row < 0 || row >= height) {
        std::memset(dst, 0, (width + 1) * step * sizeof(T));
        continue;
      }
      if (channels_last)
        copy_runs<Value>(pixel(image, row) + first, channels, dst, step, count, width);
      else
        transpose<Value>(line(image, first, row), height * width, dst, step, count, width);
      std::memset(dst + width * step, 0, step * sizeof(T));
    }
  }

  // The opposite for one row that lies in the image.
  void unpack(long image, long first, long count, long row, const T* planes, long stride, bool add = false) const {
    if (channels_last) {
      transpose(planes, stride, pixel(image, row) + first, channels, count, width, add);
      return;
    }
    for (long ch = 0; ch < count; ch++) {
      T* dst = line(image, first + ch, row);
      const T* src = planes + ch * stride;
      for (long i = 0; i < width; i++) dst[i] = src[i] + (add ? dst[i] : T(0));
    }
  }
};

template <typename T>
void clear_ends(T* planes, long count, long stride, long begin, long end) {
  for (long ch = 0; ch < count; ch++) {
    std::memset(planes + ch * stride, 0, begin * sizeof(T));
    std::memset(planes + ch * stride + end, 0, (stride - end) * sizeof(T));
  }
}

// Length of a plane for so many positions: room for whole vectors, and no power of two, which would strain the cache.
template <typename T>
long plane(long positions) {
  return round_up(positions + 4 * Vector<T>::lanes, 2 * Vector<T>::lanes) + Vector<T>::lanes;
}

// Rows of a strip: equal strips, in which so many elements a position stay in the second-level cache.
long strip_rows(const Shape& s, long elements) {
  return ceil_div(s.height, ceil_div(s.height, std::max(1L, 100000 / (elements * s.pitch()))));
}

// ---------------------------------------------------------------------------------------------------------- forward

// y = sum_n mix[n] (bias[n] + sum_k w[k][n] x[k]) of one group at VECTORS vectors of positions.
template <typename T, int BASES, int VECTORS>
void mix_bases(const T* x, long x_stride, long pitch, const T* w, const T* bias, long bases, const T* mix, T* y,
               long stride, long per_group) {
  constexpr long L = Vector<T>::lanes;
  for (long co = 0; co < per_group; co++)
    for (long first = 0; first < bases; first += BASES) {
      Vec<T> z[BASES][VECTORS];
#pragma GCC unroll 8
      for (int n = 0; n < BASES; n++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) z[n][v] = bias[co * bases + first + n] - Vec<T>{};
      const T* plane = x - pitch - 1;
      for (long ci = 0; ci < per_group; ci++, plane += x_stride) {
        const T* row = plane;
        for (int dy = 0; dy < 3; dy++, row += pitch)
#pragma GCC unroll 3
          for (int dx = 0; dx < 3; dx++, w += BASES) {
            Vec<T> xv[VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) xv[v] = load(row + dx + v * L);
#pragma GCC unroll 8
            for (int n = 0; n < BASES; n++) {
              const Vec<T> wn = in_register(w[n] - Vec<T>{});
#pragma GCC unroll 8
              for (int v = 0; v < VECTORS; v++) z[n][v] += wn * xv[v];
            }
          }
      }
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) {
        T* to = y + co * stride + v * L;
        Vec<T> even = first > 0 ? load(to) : Vec<T>{}, odd = {};
#pragma GCC unroll 8
        for (int n = 0; n < BASES; n++) (n % 2 ? odd : even) += load(mix + (first + n) * stride + v * L) * z[n][v];
        store(to, even + odd);
      }
    }
}

// Weights (C N, c, 3, 3) -> output channels: blocks of BASES bases: k: bases.
template <typename T, int BASES>
void pack_weights(const Shape& s, const T* weight, T* out) {
  const long k = 9 * s.per_group(), blocks = s.channels * s.bases / BASES;
#pragma omp parallel for
  for (long i = 0; i < blocks; i++) transpose(weight + i * k * BASES, k, out + i * k * BASES, BASES, BASES, k);
}

template <typename T, int BASES>
bool forward(const Shape& s, const Image<const T>& x, const T* weight, const T* bias, const Image<const T>& mix,
             const Image<T>& y) {
  constexpr long L = Vector<T>::lanes;
  const long c = s.per_group(), k = 9 * c, pitch = s.pitch();
  const long chunk = s.chunk(), chunks = s.chunks(), width = chunk * c;
  const long rows = strip_rows(s, 2 * width + s.bases), strips = ceil_div(s.height, rows);
  const long lead = L, x_stride = plane<T>(lead + (rows + 2) * pitch), stride = plane<T>(rows * pitch);
  T* packed = weight_scratch.get<T>(s.channels * k * s.bases);
  if (!packed) return false;
  pack_weights<T, BASES>(s, weight, packed);
  // The chunks of a strip share its mix, unless there are too few strips for all threads.
  const long shares = s.batch * strips >= 3 * threads() ? 1 : chunks;
  return parallel<T>(
      s.batch * strips * shares, width * x_stride + (width + s.bases) * stride, [&](long item, T* scratch) {
        const long share = item % shares, image = item / shares / strips, top = item / shares % strips * rows;
        const long bottom = std::min(s.height, top + rows), vectors = ceil_div((bottom - top) * pitch, L);
        T *xs = scratch, *ms = xs + width * x_stride, *ys = ms + s.bases * stride;
        mix.pack(image, 0, s.bases, top, bottom, ms, stride);
        clear_ends(ms, s.bases, stride, 0, (bottom - top) * pitch);
        for (long first = share * chunk; first < s.bases; first += shares * chunk) {
          const long groups = std::min(chunk, s.bases - first);
          x.pack(image, first * c, groups * c, top - 1, bottom + 1, xs + lead, x_stride);
          clear_ends(xs, groups * c, x_stride, lead, lead + (bottom - top + 2) * pitch);
          for (long g = 0; g < groups; g++)
            for (long v = 0; v < vectors;) {
              const long left = vectors - v, take = left == 4 ? 2 : std::min(left, 3L);
              const auto block = take == 3   ? mix_bases<T, BASES, 3>
                                 : take == 2 ? mix_bases<T, BASES, 2>
                                             : mix_bases<T, BASES, 1>;
              block(xs + g * c * x_stride + lead + pitch + v * L, x_stride, pitch,
                    packed + (first + g) * c * k * s.bases,
                    bias + (first + g) * c * s.bases, s.bases, ms + v * L, ys + g * c * stride + v * L, stride, c);
              v += take;
            }
          for (long row = top; row < bottom; row++)
            y.unpack(image, first * c, groups * c, row, ys + (row - top) * pitch, stride);
        }
      });
}

// --------------------------------------------------------------------------------- backward: gradients of x and mix

// With U[n][k] = sum_co w[k][co][n] gy[co]: column[k] (+)= sum_n mix[n] U[n][k] and grad_mix[n] += sum_k x[k] U[n][k],
// for the nine k of one input channel; with a bias also grad_mix[n] += sum_co bias[co][n] gy[co]. FEW is the number of
// output channels if they fit into registers, else 0.
template <typename T, int BASES, int FEW>
void back_channel(const T* x, long pitch, const T* w, const T* bias, long bases, const T* mix, T* grad_mix, const T* gy,
                  long stride, T* columns, long column_stride, long per_group, long vectors, bool add) {
  constexpr long L = Vector<T>::lanes;
  for (long v = 0; v < vectors; v++, x += L, mix += L, grad_mix += L, gy += L, columns += L) {
    Vec<T> m[BASES], gm[BASES];
#pragma GCC unroll 8
    for (int n = 0; n < BASES; n++) m[n] = in_register(load(mix + n * stride)), gm[n] = load(grad_mix + n * stride);
    Vec<T> g[FEW > 0 ? FEW : 1];
#pragma GCC unroll 4
    for (int co = 0; co < FEW; co++) g[co] = in_register(load(gy + co * stride));
    if (bias)
      for (long co = 0; co < per_group; co++) {
        const Vec<T> go = in_register(load(gy + co * stride));
#pragma GCC unroll 8
        for (int n = 0; n < BASES; n++) gm[n] += bias[co * bases + n] * go;
      }
    const T *wk = w, *row = x - pitch - 1;
    T* column = columns;
    for (int dy = 0; dy < 3; dy++, row += pitch)
#pragma GCC unroll 3
      for (int dx = 0; dx < 3; dx++, column += column_stride) {
        Vec<T> u[BASES];
        const Vec<T> first = FEW > 0 ? g[0] : in_register(load(gy));
#pragma GCC unroll 8
        for (int n = 0; n < BASES; n++) u[n] = wk[n] * first;
        wk += BASES;
        if (FEW > 0) {
#pragma GCC unroll 4
          for (int co = 1; co < FEW; co++, wk += BASES)
#pragma GCC unroll 8
            for (int n = 0; n < BASES; n++) u[n] += wk[n] * g[co];
        } else {
          const T* from = gy + stride;
#pragma GCC unroll 4
          for (long co = 1; co < per_group; co++, wk += BASES, from += stride) {
            const Vec<T> go = in_register(load(from));
#pragma GCC unroll 8
            for (int n = 0; n < BASES; n++) u[n] += wk[n] * go;
          }
        }
        const Vec<T> xv = in_register(load(row + dx));
        Vec<T> even = m[0] * u[0];
        if (add) even += load(column);
        gm[0] += xv * u[0];
        if (BASES > 1) {
          Vec<T> odd = m[BASES > 1] * u[BASES > 1];
          gm[BASES > 1] += xv * u[BASES > 1];
#pragma GCC unroll 8
          for (int n = 2; n < BASES; n++) {
            (n % 2 ? odd : even) += m[n] * u[n];
            gm[n] += xv * u[n];
          }
          even += odd;
        }
        store(column, even);
      }
#pragma GCC unroll 8
    for (int n = 0; n < BASES; n++) store(grad_mix + n * stride, gm[n]);
  }
}

// x[p + dy * pitch + dx] += column[k][p], where columns are zero one vector before and behind their positions.
template <typename T>
void scatter(const T* columns, long column_stride, long vectors, T* x, long pitch) {
  constexpr long L = Vector<T>::lanes;
  for (long dy = 0; dy < 3; dy++) {
    const T *left = columns + 3 * dy * column_stride, *middle = left + column_stride, *right = middle + column_stride;
    T* to = x + (dy - 1) * pitch;
    for (long p = -L; p < (vectors + 1) * L; p += L)
      store(to + p, load(to + p) + (load(left + p + 1) + load(middle + p) + load(right + p - 1)));
  }
}

// Weights (C N, c, 3, 3) -> per group: blocks of BASES bases: k: output channels: bases.
template <typename T, int BASES>
void pack_weights_back(const Shape& s, const T* weight, T* out) {
  const long c = s.per_group(), k = 9 * c, blocks = s.bases / BASES;
#pragma omp parallel for
  for (long g = 0; g < s.bases; g++)
    for (long block = 0; block < blocks; block++)
      for (long co = 0; co < c; co++)
        transpose(weight + ((g * c + co) * s.bases + block * BASES) * k, k,
                  out + (g * blocks + block) * k * c * BASES + co * BASES, c * BASES, BASES, k);
}

template <typename T, int BASES>
bool backward_inputs(const Shape& s, const Image<const T>& x, const T* weight, const T* bias,
                     const Image<const T>& mix, const Image<const T>& gy, const Image<T>& gx, const Image<T>& grad_mix,
                     T* partial_mix, long splits) {
  constexpr long L = Vector<T>::lanes, BLOCK = 12;  // vectors whose columns stay in the first-level cache
  const long c = s.per_group(), k = 9 * c, pitch = s.pitch(), blocks = s.bases / BASES;
  const long chunk = s.chunk(), chunks = s.chunks(), width = chunk * c;
  const long rows = strip_rows(s, 3 * width + 2 * s.bases), lead = 2 * L;
  const long x_stride = plane<T>(lead + (rows + 2) * pitch), stride = plane<T>(rows * pitch);
  const long column_stride = (BLOCK + 3) * L;
  T* packed = weight_scratch.get<T>(s.channels * k * s.bases);
  if (!packed) return false;
  pack_weights_back<T, BASES>(s, weight, packed);
  const auto back = c == 1   ? back_channel<T, BASES, 1>
                    : c == 2 ? back_channel<T, BASES, 2>
                    : c == 3 ? back_channel<T, BASES, 3>
                    : c == 4 ? back_channel<T, BASES, 4>
                             : back_channel<T, BASES, 0>;
  const long elements = 2 * width * x_stride + (width + 2 * s.bases) * stride + 9 * column_stride + L;
  return parallel<T>(s.batch * splits, elements, [&](long item, T* scratch) {
    const long image = item / splits, split = item % splits;
    T *xs = scratch, *gxs = xs + width * x_stride, *gys = gxs + width * x_stride, *ms = gys + width * stride;
    T *gms = ms + s.bases * stride, *columns = gms + s.bases * stride;
    Image<T> gm_out = grad_mix;  // the chunks of one image may be shared between threads: each sums on its own
    if (split > 0) gm_out.data = partial_mix + (split - 1) * s.batch * s.bases * s.height * s.width;
    for (long top = 0; top < s.height; top += rows) {
      const long bottom = std::min(s.height, top + rows), positions = (bottom - top) * pitch;
      const long vectors = ceil_div(positions, L);
      mix.pack(image, 0, s.bases, top, bottom, ms, stride);
      clear_ends(ms, s.bases, stride, 0, positions);
      std::memset(gms, 0, s.bases * stride * sizeof(T));
      for (long which = split; which < chunks; which += splits) {
        const long first = which * chunk, groups = std::min(chunk, s.bases - first);
        x.pack(image, first * c, groups * c, top - 1, bottom + 1, xs + lead, x_stride);
        clear_ends(xs, groups * c, x_stride, lead, lead + positions + 2 * pitch);
        gy.pack(image, first * c, groups * c, top, bottom, gys, stride);
        clear_ends(gys, groups * c, stride, 0, positions);
        for (long ch = 0; ch < groups * c; ch++) std::memset(gxs + ch * x_stride, 0, x_stride * sizeof(T));
        for (long g = 0; g < groups; g++)
          for (long v = 0; v < vectors; v += BLOCK) {
            const long count = std::min(BLOCK, vectors - v);
            const T* gyg = gys + g * c * stride + v * L;
            std::memset(columns, 0, 9 * column_stride * sizeof(T));
            for (long ci = 0; ci < c; ci++) {
              const long at = (g * c + ci) * x_stride + lead + pitch + v * L;
              for (long b = 0; b < blocks; b++)
                back(xs + at, pitch, packed + (((first + g) * blocks + b) * k + ci * 9) * c * BASES,
                     ci > 0 ? nullptr : bias + (first + g) * c * s.bases + b * BASES, s.bases,
                     ms + b * BASES * stride + v * L, gms + b * BASES * stride + v * L, gyg, stride, columns + L,
                     column_stride, c, count, b > 0);
              scatter(columns + L, column_stride, count, gxs + at, pitch);
            }
          }
        for (long row = std::max(0L, top - 1); row < std::min(s.height, bottom + 1); row++)
          gx.unpack(image, first * c, groups * c, row, gxs + lead + (row - top + 1) * pitch, x_stride,
                    top > 0 && row <= top);
      }
      for (long row = top; row < bottom; row++)
        gm_out.unpack(image, 0, s.bases, row, gms + (row - top) * pitch, stride);
    }
  });
}

// ------------------------------------------------------------------------------ backward: gradients of weight and bias

// Here the lanes of a vector are neither positions nor channels but the C rows of A of one group: neighbouring (c, n).

// grad[row][ci][dx] += sum_p x[p + row * pitch + dx][ci] gz[p] for ROWS of the three rows and INPUTS channels.
template <typename T, int VECTORS, int ROWS, int INPUTS>
void outer(const T* x, long step, long row_step, const T* gz, long positions, T* grad, long grad_row) {
  constexpr long L = Vector<T>::lanes, BLOCK = VECTORS * L;
  Vec<T> sums[ROWS][INPUTS * 3][VECTORS];
#pragma GCC unroll 3
  for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 12
    for (int j = 0; j < INPUTS * 3; j++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sums[row][j][v] = load(grad + row * grad_row + j * BLOCK + v * L);
  for (long p = 0; p < positions; p++, x += step, gz += BLOCK) {
    Vec<T> z[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) z[v] = load(gz + v * L);
#pragma GCC unroll 3
    for (int row = 0; row < ROWS; row++) {
      const T* from = x + row * row_step;
      asm("" : "+r"(from));  // else there are more addresses than registers
#pragma GCC unroll 12
      for (int j = 0; j < INPUTS * 3; j++) {
        Vec<T> xv = from[j % 3 * step + j / 3] - Vec<T>{};
        if (VECTORS > 1) xv = in_register(xv);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sums[row][j][v] += z[v] * xv;
      }
    }
  }
#pragma GCC unroll 3
  for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 12
    for (int j = 0; j < INPUTS * 3; j++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) store(grad + row * grad_row + j * BLOCK + v * L, sums[row][j][v]);
}

// gz[p][lane] = gy[p][lane / N] mix[p][lane % N] for the lanes from `first` on, and their sums. `which` tells for each
// lane how many channels it is beyond the first lane of its vector.
template <typename T, int VECTORS>
void spread(const T* gy, long step, const T* mix, long mix_step, const T* which, long bases, long first, long positions,
            T* gz, T* grad_bias) {
  constexpr long L = Vector<T>::lanes;
  Vec<T> sums[VECTORS] = {};
  Lanes<T> lanes[VECTORS];
  const T *from[VECTORS], *with[VECTORS];
  for (long v = 0; v < VECTORS; v++) {
    from[v] = gy + (first + v * L) / bases, with[v] = mix + (first + v * L) % bases;
    lanes[v] = load<T, Lanes<T>>(which + first + v * L);
  }
  for (long p = 0; p < positions; p++, gz += VECTORS * L)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      const Vec<T> z = permute<T>(load(from[v] + p * step), lanes[v]) * load(with[v] + p * mix_step);
      store(gz + v * L, z);
      sums[v] += z;
    }
  for (long v = 0; v < VECTORS; v++) store(grad_bias + v * L, load(grad_bias + v * L) + sums[v]);
}

template <typename T, int VECTORS>
bool backward_weights(const Shape& s, const Image<const T>& x, const Image<const T>& mix, const Image<const T>& gy,
                      T* grad, T* grad_bias, long splits) {
  constexpr long L = Vector<T>::lanes, BLOCK = VECTORS * L, POSITIONS = 16384 / sizeof(T) / BLOCK;
  constexpr int ROWS = VECTORS == 1 ? 3 : 1, SOME = MAX_BASES / 4, MANY = VECTORS == 2 ? 2 * SOME : SOME;
  const long c = s.per_group(), pitch = s.pitch(), lanes = c * s.bases, blocks = ceil_div(lanes, BLOCK);
  const long chunk = s.chunk(), chunks = s.chunks(), width = chunk * c, mix_step = s.mix_period(L);
  const long rows = strip_rows(s, 2 * width + mix_step), strips = ceil_div(s.height, rows);
  const long grad_row = 3 * c * BLOCK, grad_block = 3 * grad_row + BLOCK;
  const long inputs = c % MANY == 0 ? MANY : c % SOME == 0 ? SOME : 1;
  const auto add = inputs == MANY   ? outer<T, VECTORS, ROWS, MANY>
                   : inputs == SOME ? outer<T, VECTORS, ROWS, SOME>
                                    : outer<T, VECTORS, ROWS, 1>;
  const long elements = chunk * blocks * grad_block + (POSITIONS + blocks) * BLOCK + rows * pitch * mix_step +
                        ((2 * rows + 2) * pitch + 2) * width + L;
  return parallel<T>(chunks * splits, elements, [&](long item, T* scratch) {
    const long first = item / splits * chunk, groups = std::min(chunk, s.bases - first), split = item % splits;
    T *grads = scratch, *gz = grads + chunk * blocks * grad_block, *which = gz + POSITIONS * BLOCK;
    T *ms = which + blocks * BLOCK, *xs = ms + rows * pitch * mix_step, *gys = xs + ((rows + 2) * pitch + 2) * width;
    std::memset(grads, 0, chunk * blocks * grad_block * sizeof(T));
    for (long lane = 0; lane < blocks * BLOCK; lane += L) {
      Lanes<T> channels;
      for (long i = 0; i < L; i++) channels[i] = (lane % s.bases + i) / s.bases;
      store(which + lane, channels);
    }
    for (long tile = split; tile < s.batch * strips; tile += splits) {
      const long image = tile / strips, top = tile % strips * rows, bottom = std::min(s.height, top + rows);
      const long positions = (bottom - top) * pitch;
      mix.pack_pixels(image, 0, s.bases, top, bottom, ms, mix_step);
      for (long n = s.bases; n < mix_step; n += s.bases)
        copy_runs(ms, mix_step, ms + n, mix_step, std::min(s.bases, mix_step - n), positions);
      x.pack_pixels(image, first * c, groups * c, top - 1, bottom + 1, xs + width, width);
      std::memset(xs, 0, width * sizeof(T));
      std::memset(xs + (positions + 2 * pitch + 1) * width, 0, width * sizeof(T));
      gy.pack_pixels(image, first * c, groups * c, top, bottom, gys, width);
      std::memset(gys + positions * width, 0, L * sizeof(T));
      for (long p = 0; p < positions; p += POSITIONS)
        for (long i = 0; i < groups * blocks; i++) {
          const long g = i / blocks, b = i % blocks, some = std::min(POSITIONS, positions - p);
          T* to = grads + i * grad_block;
          spread<T, VECTORS>(gys + p * width + g * c, width, ms + p * mix_step, mix_step, which, s.bases, b * BLOCK,
                             some, gz, to + 3 * grad_row);
          for (long row = 0; row < 3; row += ROWS)
            for (long ci = 0; ci < c; ci += inputs)
              add(xs + (p + row * pitch) * width + g * c + ci, width, pitch * width, gz, some,
                  to + row * grad_row + ci * 3 * BLOCK, grad_row);
        }
    }
    for (long g = 0; g < groups; g++)
      for (long lane = 0; lane < lanes; lane++) {
        const T* from = grads + (g * blocks + lane / BLOCK) * grad_block + lane % BLOCK;
        const long out = split * s.channels * s.bases + (first + g) * lanes + lane;
        for (long ci = 0; ci < c; ci++)
          for (long at = 0; at < 9; at++)
            grad[(out * c + ci) * 9 + at] = from[at / 3 * grad_row + (ci * 3 + at % 3) * BLOCK];
        grad_bias[out] = from[3 * grad_row];
      }
  });
}

// Gradients into grad (splits, C N, 9 c) and grad_bias (splits, C N); split i takes every i-th strip.
template <typename T>
bool backward_weights(const Shape& s, const Image<const T>& x, const Image<const T>& mix, const Image<const T>& gy,
                      T* grad, T* grad_bias, long splits) {
  const long vectors = ceil_div(s.channels, Vector<T>::lanes);
  const auto run = MAX_BASES == 8 && vectors % 4 == 0 ? backward_weights<T, 4>
                   : vectors % 3 == 0 ? backward_weights<T, 3>
                   : vectors % 2 == 0 ? backward_weights<T, 2>
                                      : backward_weights<T, 1>;
  return run(s, x, mix, gy, grad, grad_bias, splits);
}

// ------------------------------------------------------------------------------------------------------------ entries

template <typename T>
int run_forward(const Shape& s, const T* x, const T* weight, const T* bias, const T* mix, T* y, int x_last,
                int mix_last) {
  const Image<const T> xi{x, s.channels, s.height, s.width, x_last != 0};
  const Image<const T> mi{mix, s.bases, s.height, s.width, mix_last != 0};
  const Image<T> yi{y, s.channels, s.height, s.width, x_last != 0};
  if (MAX_BASES == 8 && s.bases % 8 == 0) return !forward<T, MAX_BASES>(s, xi, weight, bias, mi, yi);
  if (s.bases % 4 == 0) return !forward<T, 4>(s, xi, weight, bias, mi, yi);
  if (s.bases % 2 == 0) return !forward<T, 2>(s, xi, weight, bias, mi, yi);
  return !forward<T, 1>(s, xi, weight, bias, mi, yi);
}

template <typename T>
int run_backward(const Shape& s, const T* x, const T* weight, const T* bias, const T* mix, const T* gy, T* gx, T* gw,
                 T* gb, T* gm, T* partial_mix, long mix_splits, long weight_splits, int x_last, int mix_last) {
  const Image<const T> xi{x, s.channels, s.height, s.width, x_last != 0};
  const Image<const T> mi{mix, s.bases, s.height, s.width, mix_last != 0};
  const Image<const T> gyi{gy, s.channels, s.height, s.width, x_last != 0};
  const Image<T> gxi{gx, s.channels, s.height, s.width, x_last != 0};
  const Image<T> gmi{gm, s.bases, s.height, s.width, mix_last != 0};
  bool good = true;
  if (gw) good = backward_weights<T>(s, xi, mi, gyi, gw, gb, weight_splits);
  if (!gx || !good) return !good;
  if (MAX_BASES == 8 && s.bases % 8 == 0)
    return !backward_inputs<T, MAX_BASES>(s, xi, weight, bias, mi, gyi, gxi, gmi, partial_mix, mix_splits);
  if (s.bases % 4 == 0) return !backward_inputs<T, 4>(s, xi, weight, bias, mi, gyi, gxi, gmi, partial_mix, mix_splits);
  if (s.bases % 2 == 0) return !backward_inputs<T, 2>(s, xi, weight, bias, mi, gyi, gxi, gmi, partial_mix, mix_splits);
  return !backward_inputs<T, 1>(s, xi, weight, bias, mi, gyi, gxi, gmi, partial_mix, mix_splits);
}

}  // namespace

// Plain C functions: no header of torch, so that compiling takes seconds and no version of it can be missed. All return
// 0, or 1 where memory is short.
#define ENTRIES(T, SUFFIX)                                                                                            \
  extern "C" int akgm_forward_##SUFFIX(long batch, long channels, long bases, long height, long width, const T* x,    \
                                       const T* weight, const T* bias, const T* mix, T* y, int x_last,                \
                                       int mix_last) {                                                                \
    return run_forward<T>({batch, channels, bases, height, width}, x, weight, bias, mix, y, x_last, mix_last);        \
  }                                                                                                                   \
  extern "C" int akgm_backward_##SUFFIX(long batch, long channels, long bases, long height, long width, const T* x,   \
                                        const T* weight, const T* bias, const T* mix, const T* gy, T* gx, T* gw,      \
                                        T* gb, T* gm, T* partial_mix, long mix_splits, long weight_splits,            \
                                        int x_last, int mix_last) {                                                   \
    return run_backward<T>({batch, channels, bases, height, width}, x, weight, bias, mix, gy, gx, gw, gb, gm,         \
                           partial_mix, mix_splits, weight_splits, x_last, mix_last);                                 \
  }
ENTRIES(float, f32)
ENTRIES(double, f64)

// How many ways the two passes of the backward are split: the caller brings the memory for the sums.
extern "C" void akgm_splits(long batch, long channels, long bases, long height, long width, long* mix, long* weight) {
  const Shape s{batch, channels, bases, height, width};
  *mix = std::min(s.chunks(), ceil_div(threads(), batch));
  *weight = ceil_div(threads(), s.chunks());
}
