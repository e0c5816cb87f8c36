// sgd_momentum_: one step of SGD with momentum for a list of tensors, in place.
//
//   g = grad + weight_decay · weight;   buffer ← momentum · buffer + g;   weight ← weight − lr · buffer
//
// Map: the elements of all tensors, in order, are divided among the threads. Each is read once and written once; then a
// thread writes the casts of its elements. The random bits of stochastic rounding are drawn a block at a time and stay in
// the L1 cache.
#include "tensor.h"

namespace skipkernels {
namespace {

constexpr const char* NAME = "sgd_momentum_";
constexpr int64_t RANDOM_BLOCK = 512; // elements: 2 KiB
constexpr int64_t GRAIN = 1 << 15; // minimum elements per thread: about 10 µs

template <class A>
struct Rates {
  A lr, momentum, weight_decay;
};

// Random bits of n groups of four elements: splitmix64(seed, group), 16 bits for each element, the lowest first.
SKIPKERNELS_INLINE void fill_random_body(uint16_t* random, uint64_t seed, uint64_t group, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    uint64_t x = seed + (group + uint64_t(i) + 1) * 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    x ^= x >> 31;
    std::memcpy(random + 4 * i, &x, sizeof(x));
  }
}
MULTIVERSION void fill_random(uint16_t* random, uint64_t seed, uint64_t group, int64_t n) {
  fill_random_body(random, seed, group, n);
}

// Rounds to bf16 at random: the result is in the upper half; the caller truncates the lower half. x is a sum, so a NaN
// has a mantissa bit set in the upper half.
SKIPKERNELS_INLINE uint32_t round_at_random(float x, uint32_t random) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? bits + random : bits; // up with a probability equal to the truncated fraction
}

// Each product is rounded before it is added (no fused multiply-add), as in PyTorch's operators and the Triton kernel:
// all are bit-equal.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

template <class A>
SKIPKERNELS_INLINE A moved(A weight, A grad, A buffer, const Rates<A>& rates) {
  return rates.momentum * buffer + (grad + rates.weight_decay * weight);
}

// Updates n elements; rounds to nearest, or at random if random bits are given.
template <class W, class G, class M, class A = accumulate_t<W>>
SKIPKERNELS_INLINE void steps_body(W* weight, const G* grad, M* buffer, const Rates<A> rates, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A b = moved(widen(weight[i]), A(widen(grad[i])), A(widen(buffer[i])), rates);
    weight[i] = narrow<W>(widen(weight[i]) - rates.lr * b);
    buffer[i] = narrow<M>(b);
  }
}
template <class G, class M>
SKIPKERNELS_INLINE void steps_body(
    BFloat16* weight, const G* grad, M* buffer, const Rates<float> rates, const uint16_t* random, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float b = moved(widen(weight[i]), widen(grad[i]), widen(buffer[i]), rates);
    weight[i].x = uint16_t(round_at_random(widen(weight[i]) - rates.lr * b, random[i]) >> 16);
    buffer[i] = narrow<M>(b);
  }
}

SKIPKERNELS_INLINE uint32_t load_word(const void* memory) {
  uint32_t word;
  std::memcpy(&word, memory, sizeof(word));
  return word;
}
SKIPKERNELS_INLINE void store_word(void* memory, uint32_t word) {
  std::memcpy(memory, &word, sizeof(word));
}
// Rounds to bf16; the result is in the upper half.
SKIPKERNELS_INLINE uint32_t to_nearest(float x) {
  return round_to_bfloat16(bits_as<uint32_t>(x));
}

// Weight, gradient and buffer in bf16: a shift and a mask unpack two neighbours from one word, so that no number
// changes its vector lane. Infinity and NaN need no special case: widened from bf16 they have zeros in the lower half,
// so nothing carries out of it.
template <bool RANDOM>
SKIPKERNELS_INLINE void paired_steps_body(
    BFloat16* weight, const BFloat16* grad, BFloat16* buffer, const Rates<float> rates, const uint16_t* random,
    int64_t n) {
  constexpr uint32_t UPPER = 0xffff0000u;
#pragma omp simd
  for (int64_t i = 0; i < n / 2; ++i) {
    const uint32_t w = load_word(weight + 2 * i), g = load_word(grad + 2 * i), b = load_word(buffer + 2 * i);
    const float b0 = moved(bits_as<float>(w << 16), bits_as<float>(g << 16), bits_as<float>(b << 16), rates);
    const float b1 = moved(bits_as<float>(w & UPPER), bits_as<float>(g & UPPER), bits_as<float>(b & UPPER), rates);
    const float w0 = bits_as<float>(w << 16) - rates.lr * b0, w1 = bits_as<float>(w & UPPER) - rates.lr * b1;
    store_word(buffer + 2 * i, to_nearest(b0) >> 16 | (to_nearest(b1) & UPPER));
    if constexpr (RANDOM) {
      const uint32_t r = load_word(random + 2 * i);
      const uint32_t r0 = bits_as<uint32_t>(w0) + (r & 0xffffu), r1 = bits_as<uint32_t>(w1) + (r >> 16);
      store_word(weight + 2 * i, r0 >> 16 | (r1 & UPPER));
    } else {
      store_word(weight + 2 * i, to_nearest(w0) >> 16 | (to_nearest(w1) & UPPER));
    }
  }
  if constexpr (RANDOM)
    steps_body(weight + n / 2 * 2, grad + n / 2 * 2, buffer + n / 2 * 2, rates, random + n / 2 * 2, n % 2);
  else
    steps_body(weight + n / 2 * 2, grad + n / 2 * 2, buffer + n / 2 * 2, rates, n % 2);
}

#define DEFINE_STEPS(CLONES, W, G, M)                                                                            \
  CLONES void steps(W* weight, const G* grad, M* buffer, const Rates<accumulate_t<W>>& rates, int64_t n) { \
    steps_body(weight, grad, buffer, rates, n);                                                            \
  }
#define DEFINE_RANDOM_STEPS(G, M)                                                                                 \
  MULTIVERSION void steps(                                                                                        \
      BFloat16* weight, const G* grad, M* buffer, const Rates<float>& rates, const uint16_t* random, int64_t n) { \
    steps_body(weight, grad, buffer, rates, random, n);                                                           \
  }

DEFINE_STEPS(MULTIVERSION_256, float, float, float)
DEFINE_STEPS(MULTIVERSION_256, double, double, double)
DEFINE_STEPS(MULTIVERSION, Half, Half, Half)
DEFINE_STEPS(MULTIVERSION, Half, Half, float)
DEFINE_STEPS(MULTIVERSION, Half, float, Half)
DEFINE_STEPS(MULTIVERSION, Half, float, float)
DEFINE_STEPS(MULTIVERSION, BFloat16, BFloat16, float)
DEFINE_STEPS(MULTIVERSION, BFloat16, float, BFloat16)
DEFINE_STEPS(MULTIVERSION, BFloat16, float, float)
DEFINE_RANDOM_STEPS(BFloat16, float)
DEFINE_RANDOM_STEPS(float, BFloat16)
DEFINE_RANDOM_STEPS(float, float)

MULTIVERSION void steps(
    BFloat16* weight, const BFloat16* grad, BFloat16* buffer, const Rates<float>& rates, int64_t n) {
  paired_steps_body<false>(weight, grad, buffer, rates, nullptr, n);
}
MULTIVERSION void steps(
    BFloat16* weight, const BFloat16* grad, BFloat16* buffer, const Rates<float>& rates, const uint16_t* random,
    int64_t n) {
  paired_steps_body<true>(weight, grad, buffer, rates, random, n);
}

#if !defined(__clang__)
#pragma GCC pop_options
#endif

// Copies n updated weights in 16 bits.
template <class C>
SKIPKERNELS_INLINE void cast_body(const float* weight, C* cast, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    cast[i] = narrow<C>(weight[i]);
}
MULTIVERSION void cast_weights(const float* weight, BFloat16* cast, int64_t n) {
  cast_body(weight, cast, n);
}
MULTIVERSION void cast_weights(const float* weight, Half* cast, int64_t n) {
  cast_body(weight, cast, n);
}

struct Options {
  double lr, momentum, weight_decay;
  std::optional<uint64_t> seed;
};

// One tensor of the list; gradient and buffer have the type of the weights or of the arithmetic.
struct Parameter {
  void *weight, *grad, *buffer;
  void* cast; // copy of fp32 weights in 16 bits, or null
  ScalarType type, grad_type, buffer_type, cast_type;
  int64_t begin, numel; // begin: index of the first element among those of the list
  int64_t first; // index of the first element among those that share the seed
};

template <class W, class G, class M>
void run(const Parameter& parameter, const Options& options, int64_t begin, int64_t end) {
  using A = accumulate_t<W>;
  const Rates<A> rates{A(options.lr), A(options.momentum), A(options.weight_decay)};
  W* const weight = static_cast<W*>(parameter.weight);
  const G* const grad = static_cast<const G*>(parameter.grad);
  M* const buffer = static_cast<M*>(parameter.buffer);
  if constexpr (std::is_same_v<W, BFloat16>)
    if (options.seed) {
      alignas(64) uint16_t random[RANDOM_BLOCK + 4];
      for (int64_t i = begin; i < end; i += RANDOM_BLOCK) {
        const int64_t n = std::min(RANDOM_BLOCK, end - i), number = parameter.first + i;
        fill_random(random, *options.seed, number / 4, divide_up(number % 4 + n, 4));
        steps(weight + i, grad + i, buffer + i, rates, random + number % 4, n);
      }
      return;
    }
  steps(weight + begin, grad + begin, buffer + begin, rates, end - begin);
}

template <class W>
void run(const Parameter& parameter, const Options& options, int64_t begin, int64_t end) {
  using A = accumulate_t<W>;
  const bool own_grad = parameter.grad_type == parameter.type, own_buffer = parameter.buffer_type == parameter.type;
  if (own_grad)
    return own_buffer ? run<W, W, W>(parameter, options, begin, end) : run<W, W, A>(parameter, options, begin, end);
  return own_buffer ? run<W, A, W>(parameter, options, begin, end) : run<W, A, A>(parameter, options, begin, end);
}

void run(const Parameter& parameter, const Options& options, int64_t begin, int64_t end) {
  switch (parameter.type) {
    case ScalarType::Double: return run<double>(parameter, options, begin, end);
    case ScalarType::BFloat16: return run<BFloat16>(parameter, options, begin, end);
    case ScalarType::Half: return run<Half>(parameter, options, begin, end);
    default: run<float>(parameter, options, begin, end);
  }
  if (parameter.cast == nullptr)
    return;
  const float* const weight = static_cast<const float*>(parameter.weight) + begin;
  if (parameter.cast_type == ScalarType::BFloat16)
    cast_weights(weight, static_cast<BFloat16*>(parameter.cast) + begin, end - begin);
  else
    cast_weights(weight, static_cast<Half*>(parameter.cast) + begin, end - begin);
}

bool is_number(const Tensor& x) {
  return x.is_cpu() && x.numel() == 1 && x.dim() <= 1;
}

// Memory of the tensors for the kernel: their own, or that of copies, which are written back after the update.
class Changed {
 public:
  // Elements of the tensor, contiguous and in the type of the weights or of the arithmetic; sets `type`.
  void* numbers(const Tensor& tensor, ScalarType& type, bool changed, ScalarType weight_type) {
    const ScalarType wide = weight_type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    type = tensor.scalar_type();
    const bool fits = type == weight_type || type == wide;
    if (fits && tensor.is_contiguous())
      return changed ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr()); // the latter only read
    type = fits ? type : wide;
    copies_.push_back({tensor, as_contiguous(allocated([&] { return torch::stable::to(tensor, type); })), changed});
    return copies_.back().copy.mutable_data_ptr();
  }

  void write_back() {
    for (Copy& x : copies_)
      if (x.changed)
        torch::stable::copy_(x.tensor, x.copy);
  }

 private:
  struct Copy {
    Tensor tensor, copy;
    bool changed;
  };
  std::vector<Copy> copies_;
};

void sgd_momentum_(
    std::vector<Tensor> weights, std::vector<Tensor> grads, std::vector<Tensor> buffers, const Tensor& lr,
    const Tensor& momentum, const Tensor& weight_decay, const std::optional<Tensor>& seed,
    const std::optional<std::vector<int64_t>>& offsets, std::vector<Tensor> casts) {
  STD_TORCH_CHECK(
      weights.size() == grads.size() && weights.size() == buffers.size(), NAME, ": the lists must be of one length.");
  for (const Tensor* option : {&lr, &momentum, &weight_decay})
    STD_TORCH_CHECK(is_number(*option), NAME, ": lr, momentum and weight_decay must have one element each.");
  STD_TORCH_CHECK(
      !seed || (is_number(*seed) && seed->scalar_type() == ScalarType::Long), NAME, ": seed must be one int64.");
  STD_TORCH_CHECK(!offsets || offsets->size() == weights.size(), NAME, ": there must be one offset for each weight.");
  STD_TORCH_CHECK(
      casts.empty() || casts.size() == weights.size(), NAME, ": there must be one cast for each weight, or none.");
  Options options{numbers(lr)[0], numbers(momentum)[0], numbers(weight_decay)[0], std::nullopt};
  if (seed)
    options.seed = uint64_t(*seed->const_data_ptr<int64_t>());

  Changed changed;
  std::vector<Parameter> parameters(weights.size());
  int64_t total = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    Parameter& p = parameters[i];
    const Tensor &weight = weights[i], &grad = grads[i], &buffer = buffers[i];
    p.type = weight.scalar_type();
    dispatch_features(weight, NAME, [](auto) {});
    STD_TORCH_CHECK(!seed || p.type == ScalarType::BFloat16, NAME, ": seed is for bfloat16 weights.");
    STD_TORCH_CHECK(
        grad.is_cpu() && buffer.is_cpu() && grad.sizes().equals(weight.sizes()) &&
            buffer.sizes().equals(weight.sizes()),
        NAME, ": all must have the shape of the weight.");
    p.begin = total;
    p.first = offsets ? (*offsets)[i] : total;
    p.numel = weight.numel();
    STD_TORCH_CHECK(
        p.first >= 0 && p.first <= std::numeric_limits<int64_t>::max() - p.numel, NAME,
        ": offsets must be at least 0, and the index of each element an int64; got ", p.first, ".");
    p.weight = changed.numbers(weight, p.type, true, p.type);
    p.grad = changed.numbers(grad, p.grad_type, false, p.type);
    p.buffer = changed.numbers(buffer, p.buffer_type, true, p.type);
    p.cast = nullptr;
    if (!casts.empty() && casts[i].numel() > 0) {
      p.cast_type = casts[i].scalar_type();
      STD_TORCH_CHECK(
          p.type == ScalarType::Float && weight.is_contiguous() && casts[i].is_cpu() && casts[i].is_contiguous() &&
              casts[i].numel() == p.numel && (p.cast_type == ScalarType::BFloat16 || p.cast_type == ScalarType::Half),
          NAME, ": a cast must be contiguous, in 16 bits, and of a contiguous fp32 weight.");
      p.cast = casts[i].mutable_data_ptr();
    }
    total += p.numel;
  }

  parallel_for(0, total, GRAIN, [&](int64_t begin, int64_t end) {
    auto p = std::upper_bound(
        parameters.begin(), parameters.end(), begin, [](int64_t at, const Parameter& x) { return at < x.begin; });
    for (--p; p != parameters.end() && p->begin < end; ++p)
      run(*p, options, std::max<int64_t>(begin - p->begin, 0), std::min(end - p->begin, p->numel));
  });
  changed.write_back();
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(skipkernels, CPU, m) {
  m.impl("sgd_momentum_", TORCH_BOX(&sgd_momentum_));
}

} // namespace skipkernels
