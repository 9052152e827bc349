/* relu(sum of batch-normalised maps) of a training step, forward and backward, in as few passes over memory as there
 * can be.
 *
 * Why C++: layer by layer, a block of three branches reads or writes its maps 38 times a step. A BatchNorm of torch's
 * takes 4 passes forward (mean, variance, and one to read and write) and 5 backward, three of them, two sums of 3 and a
 * ReLU of 2 and 3. All of that is one sum per channel followed by one expression per element, so 20 will do: each map is
 * read once for its statistics and once for the sum, and twice in the backward, which writes each gradient once.
 * torch.compile finds most of it too, after compiling at every start.
 *
 * A map is a matrix of R rows (images × height × width; channels_last memory) and C columns (channels). Sums over rows
 * are taken in fixed chunks, in double between blocks of rows, and added in the order of the chunks: the bits depend
 * neither on the number of threads nor, with contraction to fused multiply-add off (pyproject.toml), on the CPU.
 *
 * Letters: z a map before its BatchNorm, y the result, g the gradient of y where the ReLU let y through.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t LANES = 16;       /* channels at a time: one cache line of floats */
constexpr int64_t ROWS = 64;        /* that are summed up before they go into a double */
constexpr int64_t MAX_CHUNKS = 64;  /* of all rows; more than any machine's memory needs threads */
constexpr int64_t MAX_TERMS = 4;    /* that there is code for; see repvgg.model.fused */

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef double Doubles __attribute__((vector_size(LANES * 8)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

/* How elements are stored, and what they are computed in. */
struct Float32 {
    typedef float Stored;
    typedef float Number;
    typedef Floats Vector;
    static INLINE float get(float value) { return value; }
    static INLINE float put(float value) { return value; }
    static INLINE void load(Vector &v, const float *from) { std::memcpy(&v, from, sizeof v); }
    static INLINE void store(float *to, const Vector &v) { std::memcpy(to, &v, sizeof v); }
};

struct Float64 {
    typedef double Stored;
    typedef double Number;
    typedef Doubles Vector;
    static INLINE double get(double value) { return value; }
    static INLINE double put(double value) { return value; }
    static INLINE void load(Vector &v, const double *from) { std::memcpy(&v, from, sizeof v); }
    static INLINE void store(double *to, const Vector &v) { std::memcpy(to, &v, sizeof v); }
};

struct BFloat16 {
    typedef uint16_t Stored;
    typedef float Number;
    typedef Floats Vector;
    static INLINE float get(uint16_t value) {
        uint32_t word = (uint32_t)value << 16;
        float number;
        std::memcpy(&number, &word, sizeof number);
        return number;
    }
    static INLINE uint16_t put(float value) {
        uint32_t word;
        std::memcpy(&word, &value, sizeof word);
        if (value != value) return 0x7fc0;
        return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16); /* to nearest, ties to even, as torch does */
    }
    static INLINE void load(Vector &v, const uint16_t *from) {
        Halves halves;
        std::memcpy(&halves, from, sizeof halves);
        Words words = __builtin_convertvector(halves, Words) << 16;
        std::memcpy(&v, &words, sizeof v);
    }
    static INLINE void store(uint16_t *to, const Vector &v) {
        Words words;
        std::memcpy(&words, &v, sizeof words);
        Words rounded = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
        Words is_nan = (Words)(v != v);
        rounded = (rounded & ~is_nan) | (is_nan & 0x7fc0);
        Halves halves = __builtin_convertvector(rounded, Halves);
        std::memcpy(to, &halves, sizeof halves);
    }
};

/* One summand. Addresses of parameters and statistics are of Number, zero where there is no BatchNorm. */
template <class T> struct Term {
    const typename T::Stored *z;
    typename T::Stored *dz;                        /* backward; null: not wanted */
    const typename T::Number *gamma, *beta;        /* null: 1 and 0 */
    typename T::Number *running_mean, *running_var;
    typename T::Number *dgamma, *dbeta;
    double *mean, *rstd;                           /* C each: of the batch; null: no BatchNorm */
    double eps, momentum;
};

int64_t chunk_rows(int64_t rows) {
    int64_t least = (rows + MAX_CHUNKS - 1) / MAX_CHUNKS;
    return (std::max<int64_t>(least, 2 * ROWS) + ROWS - 1) / ROWS * ROWS;
}

/* ---- sums over the rows of a chunk ---------------------------------------------------------------------------- */

/* Σ (z − shift) and Σ (z − shift)², rows first … last, into sums[0] and sums[1] (C each). The shift, which takes the
 * cancellation out of the variance, is the map's first row. */
template <class T>
INLINE void moments(const typename T::Stored *z, int64_t columns, int64_t first, int64_t last, double *sum, double *square) {
    typedef typename T::Number Number;
    typedef typename T::Vector Vector;
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES) {
        Vector shift;
        T::load(shift, z + c);
        Doubles total = {}, squares = {};
        for (int64_t block = first; block < last; block += ROWS) {
            int64_t end = std::min(block + ROWS, last);
            Vector s = {}, q = {}, v;
            for (int64_t r = block; r < end; r++) {
                T::load(v, z + r * columns + c);
                v -= shift;
                s += v;
                q += v * v;
            }
            total += __builtin_convertvector(s, Doubles);
            squares += __builtin_convertvector(q, Doubles);
        }
        std::memcpy(sum + c, &total, sizeof total);
        std::memcpy(square + c, &squares, sizeof squares);
    }
    for (; c < columns; c++) {
        Number shift = T::get(z[c]);
        double total = 0, squares = 0;
        for (int64_t block = first; block < last; block += ROWS) {
            int64_t end = std::min(block + ROWS, last);
            Number s = 0, q = 0;
            for (int64_t r = block; r < end; r++) {
                Number v = T::get(z[r * columns + c]) - shift;
                s += v;
                q += v * v;
            }
            total += s;
            squares += q;
        }
        sum[c] = total;
        square[c] = squares;
    }
}

/* Σ g into sums[0] and Σ g (z − mean) of every term with a BatchNorm into sums[1 + term]. */
template <class T, int N>
INLINE void gradient_sums(const typename T::Stored *dy, const typename T::Stored *y, const Term<T> *terms,
                          int64_t columns, int64_t first, int64_t last, double *sums) {
    typedef typename T::Number Number;
    typedef typename T::Vector Vector;
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES) {
        Vector mean[N] = {};
        for (int k = 0; k < N; k++)
            for (int64_t lane = 0; lane < LANES; lane++) mean[k][lane] = terms[k].mean ? (Number)terms[k].mean[c + lane] : 0;
        Doubles total[N + 1] = {};
        for (int64_t block = first; block < last; block += ROWS) {
            int64_t end = std::min(block + ROWS, last);
            Vector s[N + 1] = {};
            for (int64_t r = block; r < end; r++) {
                int64_t at = r * columns + c;
                Vector g, z;
                T::load(g, dy + at);
                if (y) {
                    Vector out;
                    T::load(out, y + at);
                    g = out <= 0 ? (Vector){} : g;
                }
                s[0] += g;
                for (int k = 0; k < N; k++) {
                    T::load(z, terms[k].z + at);
                    s[k + 1] += g * (z - mean[k]);
                }
            }
            for (int k = 0; k <= N; k++) total[k] += __builtin_convertvector(s[k], Doubles);
        }
        for (int k = 0; k <= N; k++) std::memcpy(sums + k * columns + c, &total[k], sizeof total[k]);
    }
    for (; c < columns; c++) {
        double total[N + 1] = {};
        for (int64_t block = first; block < last; block += ROWS) {
            int64_t end = std::min(block + ROWS, last);
            Number s[N + 1] = {};
            for (int64_t r = block; r < end; r++) {
                int64_t at = r * columns + c;
                Number g = y && T::get(y[at]) <= 0 ? (Number)0 : T::get(dy[at]);
                s[0] += g;
                for (int k = 0; k < N; k++)
                    s[k + 1] += g * (T::get(terms[k].z[at]) - (terms[k].mean ? (Number)terms[k].mean[c] : 0));
            }
            for (int k = 0; k <= N; k++) total[k] += s[k];
        }
        for (int k = 0; k <= N; k++) sums[k * columns + c] = total[k];
    }
}

/* ---- one expression per element ------------------------------------------------------------------------------- */

/* y = relu(Σ scale · z + shift), coefficients of Number: N scales of C, then the shift. */
template <class T, int N>
INLINE void weighted_sum(typename T::Stored *y, const Term<T> *terms, const typename T::Number *coefficients, bool relu,
                         int64_t columns, int64_t first, int64_t last) {
    typedef typename T::Number Number;
    typedef typename T::Vector Vector;
    const Number *shift = coefficients + N * columns;
    for (int64_t r = first; r < last; r++) {
        int64_t c = 0;
        for (; c + LANES <= columns; c += LANES) {
            Vector v, z, scale;
            std::memcpy(&v, shift + c, sizeof v);
            for (int k = 0; k < N; k++) {
                T::load(z, terms[k].z + r * columns + c);
                std::memcpy(&scale, coefficients + k * columns + c, sizeof scale);
                v += scale * z;
            }
            if (relu) v = v < 0 ? (Vector){} : v; /* a NaN stays one */
            T::store(y + r * columns + c, v);
        }
        for (; c < columns; c++) {
            Number v = shift[c];
            for (int k = 0; k < N; k++) v += coefficients[k * columns + c] * T::get(terms[k].z[r * columns + c]);
            y[r * columns + c] = T::put(relu && v < 0 ? (Number)0 : v);
        }
    }
}

/* dz = scale · g + slope · (z − mean) + shift of every term; coefficients: these three of C, for each term. */
template <class T, int N>
INLINE void gradients(const typename T::Stored *dy, const typename T::Stored *y, const Term<T> *terms,
                      const typename T::Number *coefficients, int64_t columns, int64_t first, int64_t last) {
    typedef typename T::Number Number;
    typedef typename T::Vector Vector;
    for (int64_t r = first; r < last; r++) {
        int64_t c = 0;
        for (; c + LANES <= columns; c += LANES) {
            int64_t at = r * columns + c;
            Vector g;
            T::load(g, dy + at);
            if (y) {
                Vector out;
                T::load(out, y + at);
                g = out <= 0 ? (Vector){} : g;
            }
            for (int k = 0; k < N; k++) {
                if (!terms[k].dz) continue;
                Vector v = g;
                if (terms[k].mean) {
                    const Number *own = coefficients + 4 * k * columns + c;
                    Vector z, scale, slope, mean, shift;
                    T::load(z, terms[k].z + at);
                    std::memcpy(&scale, own, sizeof scale);
                    std::memcpy(&slope, own + columns, sizeof slope);
                    std::memcpy(&mean, own + 2 * columns, sizeof mean);
                    std::memcpy(&shift, own + 3 * columns, sizeof shift);
                    v = scale * g + slope * (z - mean) + shift;
                }
                T::store(terms[k].dz + at, v);
            }
        }
        for (; c < columns; c++) {
            int64_t at = r * columns + c;
            Number g = y && T::get(y[at]) <= 0 ? (Number)0 : T::get(dy[at]);
            for (int k = 0; k < N; k++) {
                if (!terms[k].dz) continue;
                const Number *own = coefficients + 4 * k * columns + c;
                Number v = g;
                if (terms[k].mean)
                    v = own[0] * g + own[columns] * (T::get(terms[k].z[at]) - own[2 * columns]) + own[3 * columns];
                terms[k].dz[at] = T::put(v);
            }
        }
    }
}

/* ---- chunks, which target_clones makes once for each kind of CPU ----------------------------------------------- */

#define CHUNKS_OF(T)                                                                                                   \
    FOR_EACH_CPU void moments_##T(const T::Stored *z, int64_t columns, int64_t first, int64_t last, double *sum,       \
                                  double *square) {                                                                    \
        moments<T>(z, columns, first, last, sum, square);                                                              \
    }                                                                                                                  \
    FOR_EACH_CPU void sums_##T(int count, const T::Stored *dy, const T::Stored *y, const Term<T> *terms,               \
                               int64_t columns, int64_t first, int64_t last, double *sums) {                           \
        switch (count) {                                                                                               \
        case 1: return gradient_sums<T, 1>(dy, y, terms, columns, first, last, sums);                                  \
        case 2: return gradient_sums<T, 2>(dy, y, terms, columns, first, last, sums);                                  \
        case 3: return gradient_sums<T, 3>(dy, y, terms, columns, first, last, sums);                                  \
        case 4: return gradient_sums<T, 4>(dy, y, terms, columns, first, last, sums);                                  \
        }                                                                                                              \
    }                                                                                                                  \
    FOR_EACH_CPU void forward_##T(int count, T::Stored *y, const Term<T> *terms, const T::Number *coefficients,        \
                                  bool relu, int64_t columns, int64_t first, int64_t last) {                           \
        switch (count) {                                                                                               \
        case 1: return weighted_sum<T, 1>(y, terms, coefficients, relu, columns, first, last);                         \
        case 2: return weighted_sum<T, 2>(y, terms, coefficients, relu, columns, first, last);                         \
        case 3: return weighted_sum<T, 3>(y, terms, coefficients, relu, columns, first, last);                         \
        case 4: return weighted_sum<T, 4>(y, terms, coefficients, relu, columns, first, last);                         \
        }                                                                                                              \
    }                                                                                                                  \
    FOR_EACH_CPU void backward_##T(int count, const T::Stored *dy, const T::Stored *y, const Term<T> *terms,           \
                                   const T::Number *coefficients, int64_t columns, int64_t first, int64_t last) {      \
        switch (count) {                                                                                               \
        case 1: return gradients<T, 1>(dy, y, terms, coefficients, columns, first, last);                              \
        case 2: return gradients<T, 2>(dy, y, terms, coefficients, columns, first, last);                              \
        case 3: return gradients<T, 3>(dy, y, terms, coefficients, columns, first, last);                              \
        case 4: return gradients<T, 4>(dy, y, terms, coefficients, columns, first, last);                              \
        }                                                                                                              \
    }
CHUNKS_OF(Float32)
CHUNKS_OF(Float64)
CHUNKS_OF(BFloat16)

template <class T> struct Chunks;
#define CHUNKS(T)                                                                                                      \
    template <> struct Chunks<T> {                                                                                     \
        static constexpr auto moments = moments_##T;                                                                   \
        static constexpr auto sums = sums_##T;                                                                         \
        static constexpr auto forward = forward_##T;                                                                   \
        static constexpr auto backward = backward_##T;                                                                 \
    };
CHUNKS(Float32)
CHUNKS(Float64)
CHUNKS(BFloat16)

/* ---- a whole direction ---------------------------------------------------------------------------------------- */

struct Shape {
    int64_t rows, columns, chunk, chunks;
    int threads;
    Shape(int64_t rows, int64_t columns, int threads)
        : rows(rows), columns(columns), chunk(chunk_rows(rows)), chunks((rows + chunk - 1) / chunk),
          threads(rows * columns < 32768 ? 1 : threads) {} /* as torch: less is not worth waking anyone */
};

/* The tasks of all chunks and, of each chunk, `parts` many, shared among the threads. */
template <class Task> void for_chunks(const Shape &shape, int64_t parts, Task task) {
#pragma omp parallel for num_threads(shape.threads) schedule(static)
    for (int64_t i = 0; i < shape.chunks * parts; i++) {
        int64_t chunk = i / parts;
        task(chunk, i % parts, chunk * shape.chunk, std::min((chunk + 1) * shape.chunk, shape.rows));
    }
}

template <class T>
void forward(const Shape &shape, bool relu, typename T::Stored *y, std::vector<Term<T>> &terms) {
    typedef typename T::Number Number;
    int64_t columns = shape.columns, count = (int64_t)terms.size();
    std::vector<double> sums(shape.chunks * count * 2 * columns);
    for_chunks(shape, count, [&](int64_t chunk, int64_t k, int64_t first, int64_t last) {
        double *own = &sums[(chunk * count + k) * 2 * columns];
        if (terms[k].mean) Chunks<T>::moments(terms[k].z, columns, first, last, own, own + columns);
    });
    std::vector<Number> coefficients((count + 1) * columns);
    std::vector<double> shift(columns);
    for (int64_t k = 0; k < count; k++) {
        Term<T> &term = terms[k];
        for (int64_t c = 0; c < columns; c++) {
            if (!term.mean) {
                coefficients[k * columns + c] = 1;
                continue;
            }
            double sum = 0, square = 0, n = (double)shape.rows;
            for (int64_t chunk = 0; chunk < shape.chunks; chunk++) {
                const double *own = &sums[(chunk * count + k) * 2 * columns];
                sum += own[c];
                square += own[columns + c];
            }
            double offset = sum / n;
            double mean = (double)T::get(term.z[c]) + offset;
            double variance = std::max(square / n - offset * offset, 0.0);
            if (sum != sum || square != square) variance = sum + square; /* max() would drop a NaN */
            double rstd = 1 / std::sqrt(variance + term.eps);
            double scale = (term.gamma ? (double)term.gamma[c] : 1) * rstd;
            term.mean[c] = mean;
            term.rstd[c] = rstd;
            coefficients[k * columns + c] = (Number)scale;
            shift[c] += (term.beta ? (double)term.beta[c] : 0) - mean * (double)(Number)scale;
            if (term.running_mean) {
                Number old_mean = term.running_mean[c], old_variance = term.running_var[c];
                term.running_mean[c] = (Number)((1 - term.momentum) * old_mean + term.momentum * mean);
                term.running_var[c] = (Number)((1 - term.momentum) * old_variance + term.momentum * variance * n / (n - 1));
            }
        }
    }
    for (int64_t c = 0; c < columns; c++) coefficients[count * columns + c] = (Number)shift[c];
    for_chunks(shape, 1, [&](int64_t, int64_t, int64_t first, int64_t last) {
        Chunks<T>::forward((int)count, y, terms.data(), coefficients.data(), relu, columns, first, last);
    });
}

template <class T>
void backward(const Shape &shape, const typename T::Stored *dy, const typename T::Stored *y, std::vector<Term<T>> &terms) {
    typedef typename T::Number Number;
    int64_t columns = shape.columns, count = (int64_t)terms.size(), width = (count + 1) * columns;
    std::vector<double> sums(shape.chunks * width);
    for_chunks(shape, 1, [&](int64_t chunk, int64_t, int64_t first, int64_t last) {
        Chunks<T>::sums((int)count, dy, y, terms.data(), columns, first, last, &sums[chunk * width]);
    });
    for (int64_t chunk = 1; chunk < shape.chunks; chunk++)
        for (int64_t i = 0; i < width; i++) sums[i] += sums[chunk * width + i];
    /* With x̂ = (z − mean) · rstd: dz = γ · rstd · (g − Σg / R − x̂ · Σ(g · x̂) / R) (Ioffe and Szegedy 2015). */
    std::vector<Number> coefficients(4 * count * columns);
    double n = (double)shape.rows;
    for (int64_t k = 0; k < count; k++) {
        Term<T> &term = terms[k];
        if (!term.mean) continue;
        Number *own = &coefficients[4 * k * columns];
        for (int64_t c = 0; c < columns; c++) {
            double total = sums[c], rstd = term.rstd[c];
            double along = sums[(k + 1) * columns + c] * rstd; /* Σ g · x̂ */
            double scale = (term.gamma ? (double)term.gamma[c] : 1) * rstd;
            own[c] = (Number)scale;
            own[columns + c] = (Number)(-scale * rstd * along / n);
            own[2 * columns + c] = (Number)term.mean[c];
            own[3 * columns + c] = (Number)(-scale * total / n);
            if (term.dgamma) term.dgamma[c] = (Number)along;
            if (term.dbeta) term.dbeta[c] = (Number)total;
        }
    }
    for_chunks(shape, 1, [&](int64_t, int64_t, int64_t first, int64_t last) {
        Chunks<T>::backward((int)count, dy, y, terms.data(), coefficients.data(), columns, first, last);
    });
}

/* ---- Python --------------------------------------------------------------------------------------------------- */

struct Call {
    int dtype, threads, relu;
    int64_t rows, columns;
    unsigned long long dy, y;
    PyObject *terms;
};

template <class T> bool read_terms(const Call &call, std::vector<Term<T>> &terms) {
    typedef typename T::Stored Stored;
    typedef typename T::Number Number;
    Py_ssize_t count = PyTuple_Size(call.terms);
    if (count < 1 || count > MAX_TERMS) {
        PyErr_Format(PyExc_ValueError, "%zd terms: 1 to %d are known", count, (int)MAX_TERMS);
        return false;
    }
    for (Py_ssize_t k = 0; k < count; k++) {
        unsigned long long a[9];
        double eps, momentum;
        if (!PyArg_ParseTuple(PyTuple_GetItem(call.terms, k), "KKKKKKKKKdd", a, a + 1, a + 2, a + 3, a + 4, a + 5, a + 6,
                              a + 7, a + 8, &eps, &momentum))
            return false;
        terms.push_back({(const Stored *)a[0], (Stored *)a[1], (const Number *)a[2], (const Number *)a[3],
                         (Number *)a[4], (Number *)a[5], (Number *)a[6], (Number *)a[7], (double *)a[8],
                         a[8] ? (double *)a[8] + call.columns : nullptr, eps, momentum});
    }
    return true;
}

template <class T> PyObject *run(const Call &call, bool forwards) {
    typedef typename T::Stored Stored;
    std::vector<Term<T>> terms;
    if (!read_terms<T>(call, terms)) return nullptr;
    bool in_memory = true;
    Py_BEGIN_ALLOW_THREADS;
    try {
        Shape shape(call.rows, call.columns, call.threads);
        if (forwards)
            forward<T>(shape, call.relu, (Stored *)call.y, terms);
        else
            backward<T>(shape, (const Stored *)call.dy, call.relu ? (const Stored *)call.y : nullptr, terms);
    } catch (const std::bad_alloc &) {
        in_memory = false;
    }
    Py_END_ALLOW_THREADS;
    if (!in_memory) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

PyObject *dispatch(PyObject *args, bool forwards) {
    Call call;
    if (!PyArg_ParseTuple(args, "iipLLKKO!", &call.dtype, &call.threads, &call.relu, &call.rows, &call.columns, &call.dy,
                          &call.y, &PyTuple_Type, &call.terms))
        return nullptr;
    switch (call.dtype) {
    case 0: return run<Float32>(call, forwards);
    case 1: return run<Float64>(call, forwards);
    case 2: return run<BFloat16>(call, forwards);
    }
    return PyErr_Format(PyExc_ValueError, "dtype %d: 0 (float32), 1 (float64) and 2 (bfloat16) are known", call.dtype);
}

PyObject *py_forward(PyObject *, PyObject *args) { return dispatch(args, true); }
PyObject *py_backward(PyObject *, PyObject *args) { return dispatch(args, false); }

PyMethodDef METHODS[] = {
    {"forward", py_forward, METH_VARARGS, "Statistics of the batch, running ones, and y."},
    {"backward", py_backward, METH_VARARGS, "Gradients of maps and of BatchNorms' parameters."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_normsum", nullptr, -1, METHODS, nullptr, nullptr, nullptr, nullptr};

} // namespace

PyMODINIT_FUNC PyInit__normsum(void) { return PyModule_Create(&MODULE); }
