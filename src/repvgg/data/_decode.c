/* From a stored record to size × size pixels: partial JPEG decode, antialiased resize and mirror, one image at a time.
 *
 * Why C: half of a decode is spent on pixels that no crop shows. libjpeg-turbo can leave them out (jpeg_crop_scanline,
 * jpeg_skip_scanlines, and stopping after the last row), but only through an API that takes a struct and leaves errors
 * by longjmp, which neither numba nor ctypes can express. Compiled once at installation, nothing is compiled at a
 * start-up.
 *
 * The resize is the one torchvision and timm train and evaluate with: PIL's BILINEAR, a triangle filter as wide as
 * the scale (so it does not alias), separable. Sums are in float32 and rounded once; PIL rounds after each of its two
 * passes, so results differ by at most one level.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h> /* jpeglib.h needs FILE */
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

/* One source, two machine codes, the same results: contraction to fused multiply-add is off (pyproject.toml). */
#if defined(__x86_64__) && defined(__GNUC__)
#define FOR_EACH_CPU __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_CPU
#endif

enum { CHANNELS = 3, DECODED = 0, BROKEN = 1, WRONG_SIZE = 2, NO_MEMORY = 3 };

/* decode.JOB in Python has these fields in this order. */
typedef struct {
    uint64_t address; /* of the record's bytes */
    uint64_t bytes;
    int64_t jpg; /* else raw pixels */
    int64_t height, width; /* of the stored image */
    int64_t window_top, window_left, window_bottom, window_right; /* pixels the resize may look at */
    double top, left, box_height, box_width; /* what becomes the output */
    int64_t mirrored;
} Job;

typedef struct { int64_t first, last; } Range; /* last is exclusive */

typedef struct { uint8_t *data; size_t bytes; } Buffer;

static uint8_t *reserve(Buffer *buffer, size_t bytes) {
    if (bytes > buffer->bytes) {
        free(buffer->data);
        buffer->data = malloc(bytes);
        buffer->bytes = buffer->data ? bytes : 0;
    }
    return buffer->data;
}

/* ---- JPEG ---------------------------------------------------------------------------------------------------- */

typedef struct {
    struct jpeg_error_mgr base;
    jmp_buf leave;
} Errors;

static void leave(j_common_ptr jpeg) { longjmp(((Errors *)jpeg->err)->leave, 1); }

/* Warnings too: libjpeg paints damaged data gray and goes on. */
static void on_message(j_common_ptr jpeg, int level) {
    if (level < 0) leave(jpeg);
}

/* Decode at least rows × columns; *origin is set to the column at which a row of `out` begins, *stride to its bytes.
 * The rows of `out` begin with rows.first. Bit for bit what a full decode has there. */
static int decode_jpeg(const Job *job, Range rows, Range columns, Buffer *scratch, int64_t *origin, size_t *stride) {
    struct jpeg_decompress_struct jpeg;
    Errors errors;
    jpeg.err = jpeg_std_error(&errors.base);
    errors.base.error_exit = leave;
    errors.base.emit_message = on_message;
    if (setjmp(errors.leave)) {
        jpeg_destroy_decompress(&jpeg);
        return BROKEN;
    }
    jpeg_create_decompress(&jpeg);
    jpeg_mem_src(&jpeg, (const unsigned char *)(uintptr_t)job->address, job->bytes);
    jpeg_read_header(&jpeg, TRUE);
    if (jpeg.image_height != job->height || jpeg.image_width != job->width) {
        jpeg_destroy_decompress(&jpeg);
        return WRONG_SIZE;
    }
    jpeg.out_color_space = JCS_RGB;
    jpeg_start_decompress(&jpeg);
    /* At the edges of what is decoded, chroma is interpolated as at the edge of an image: keep one MCU away. */
    const int64_t margin = 2 * DCTSIZE;
    JDIMENSION left = (JDIMENSION)(columns.first > margin ? columns.first - margin : 0);
    int64_t right = columns.last + margin < job->width ? columns.last + margin : job->width;
    JDIMENSION width = (JDIMENSION)(right - left);
    if (width < jpeg.output_width) jpeg_crop_scanline(&jpeg, &left, &width);
    JDIMENSION above = (JDIMENSION)(rows.first > margin ? (rows.first - margin) / margin * margin : 0);
    if (above) jpeg_skip_scanlines(&jpeg, above);
    *origin = left;
    *stride = (size_t)width * CHANNELS;
    uint8_t *out = reserve(scratch, *stride * (size_t)(rows.last - rows.first) + *stride);
    if (!out) {
        jpeg_destroy_decompress(&jpeg);
        return NO_MEMORY;
    }
    while (jpeg.output_scanline < rows.last) {
        int64_t row = (int64_t)jpeg.output_scanline - rows.first;
        /* Rows of the margin are overwritten by the first one that counts. */
        JSAMPROW target = out + (row > 0 ? row : 0) * *stride;
        jpeg_read_scanlines(&jpeg, &target, 1);
    }
    jpeg_destroy_decompress(&jpeg); /* what lies below the last row is not decoded */
    return DECODED;
}

/* ---- resize -------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t *first;  /* input position at which output position i begins to look */
    float *weights;  /* `taps` per output position, zero where it does not look; they sum to 1 */
    int taps;
    Range all;       /* of input positions that any output position looks at */
} Axis;

static double triangle(double distance, double reach) {
    double height = 1 - (distance < 0 ? -distance : distance) / reach;
    return height > 0 ? height : 0;
}

/* Output position i looks at start + (i + 1/2)·length/size through a triangle that reaches `scale` (at least 1)
 * input positions to each side; positions outside [low, high) do not exist. PIL's ImagingResample. */
static int make_axis(Axis *axis, double start, double length, int64_t low, int64_t high, int size, int mirrored) {
    double scale = length / size, reach = scale > 1 ? scale : 1;
    axis->taps = (int)(2 * reach) + 1; /* the most that fit into 2·reach */
    axis->first = malloc(sizeof(int64_t) * (size_t)size);
    axis->weights = calloc((size_t)size * (size_t)axis->taps, sizeof(float));
    if (!axis->first || !axis->weights) return NO_MEMORY;
    axis->all = (Range){high, low};
    for (int i = 0; i < size; i++) {
        double centre = start + (i + 0.5) * scale, from = centre - reach + 0.5, to = centre + reach + 0.5;
        Range range = {from > low ? (int64_t)from : low, to < high ? (int64_t)to : high};
        int position = mirrored ? size - 1 - i : i;
        float *weights = axis->weights + (size_t)position * (size_t)axis->taps;
        double sum = 0;
        for (int64_t k = range.first; k < range.last; k++) sum += triangle((double)k + 0.5 - centre, reach);
        for (int64_t k = range.first; k < range.last; k++)
            weights[k - range.first] = (float)(triangle((double)k + 0.5 - centre, reach) / sum);
        while (range.last > range.first + 1 && weights[range.last - range.first - 1] == 0) range.last--;
        axis->first[position] = range.first;
        if (range.first < axis->all.first) axis->all.first = range.first;
        if (range.last > axis->all.last) axis->all.last = range.last;
    }
    return DECODED;
}

static void free_axis(Axis *axis) {
    free(axis->first);
    free(axis->weights);
}

/* sums[x] = Σ_k weights[k] · rows[k][x] */
FOR_EACH_CPU static void weigh_rows(const uint8_t *rows, size_t stride, const float *weights, int count, size_t width,
                                    float *restrict sums) {
    for (size_t x = 0; x < width; x++) sums[x] = weights[0] * (float)rows[x];
    for (int k = 1; k < count; k++) {
        const uint8_t *row = rows + (size_t)k * stride;
        float weight = weights[k];
        for (size_t x = 0; x < width; x++) sums[x] += weight * (float)row[x];
    }
}

typedef float Pixel __attribute__((vector_size(16), aligned(4))); /* red, green, blue and whatever comes next */
typedef int32_t Levels __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

/* With `taps` known to the compiler, the inner loop is gone. */
static inline __attribute__((always_inline)) void weigh_columns(const float *row, const Axis *axis, int taps, int size,
                                                                uint8_t *out) {
    for (int i = 0; i < size; i++) {
        const float *weights = axis->weights + (size_t)i * (size_t)axis->taps;
        const float *from = row + (axis->first[i] - axis->all.first) * CHANNELS;
        Pixel sum = {0.5f, 0.5f, 0.5f, 0.5f};
        for (int k = 0; k < taps; k++) sum += *(const Pixel *)(from + k * CHANNELS) * weights[k];
        /* At most 255: the weights sum to 1, but for rounding. The four low bytes go out at once; the fourth is
         * overwritten by the next pixel. */
        Bytes levels = (Bytes)__builtin_convertvector(sum, Levels);
        levels = __builtin_shuffle(levels, (Bytes){0, 4, 8, 12});
        memcpy(out + i * CHANNELS, &levels, i + 1 < size ? CHANNELS + 1 : CHANNELS);
    }
}

FOR_EACH_CPU static void weigh_columns_of(const float *row, const Axis *axis, int size, uint8_t *out) {
    switch (axis->taps) {
        case 3: weigh_columns(row, axis, 3, size, out); break;
        case 4: weigh_columns(row, axis, 4, size, out); break;
        case 5: weigh_columns(row, axis, 5, size, out); break;
        default: weigh_columns(row, axis, axis->taps, size, out);
    }
}

static void resize(const uint8_t *pixels, size_t stride, const Axis *rows, const Axis *columns, int size, float *sums,
                   uint8_t *out) {
    size_t width = (size_t)(columns->all.last - columns->all.first) * CHANNELS;
    for (int y = 0; y < size; y++, out += (size_t)size * CHANNELS) {
        const float *weights = rows->weights + (size_t)y * (size_t)rows->taps;
        int count = rows->taps;
        while (count > 1 && weights[count - 1] == 0) count--; /* there may be no such row */
        weigh_rows(pixels + (size_t)(rows->first[y] - rows->all.first) * stride, stride, weights, count, width, sums);
        weigh_columns_of(sums, columns, size, out);
    }
}

/* ---- one image ----------------------------------------------------------------------------------------------- */

static int64_t clamp(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
}

/* The pixels of rows × columns: `*pixels` is the first of them. */
static int fetch(const Job *job, Range rows, Range columns, Buffer *scratch, const uint8_t **pixels, size_t *stride) {
    if (!job->jpg) {
        *stride = (size_t)job->width * CHANNELS;
        *pixels = (const uint8_t *)(uintptr_t)job->address + (size_t)rows.first * *stride + columns.first * CHANNELS;
        return DECODED;
    }
    int64_t origin;
    int status = decode_jpeg(job, rows, columns, scratch, &origin, stride);
    *pixels = scratch->data + (columns.first - origin) * CHANNELS;
    return status;
}

/* A box of the output's own size on whole pixels: copied; black where it reaches over the image's edge. */
static int copy(const Job *job, int size, Buffer *scratch, uint8_t *out) {
    int64_t top = (int64_t)job->top, left = (int64_t)job->left;
    Range rows = {clamp(top, 0, job->height), clamp(top + size, 0, job->height)};
    Range columns = {clamp(left, 0, job->width), clamp(left + size, 0, job->width)};
    memset(out, 0, (size_t)size * (size_t)size * CHANNELS);
    if (rows.first == rows.last || columns.first == columns.last) return DECODED;
    const uint8_t *pixels;
    size_t stride;
    int status = fetch(job, rows, columns, scratch, &pixels, &stride);
    if (status != DECODED) return status;
    for (int64_t row = rows.first; row < rows.last; row++, pixels += stride) {
        uint8_t *target = out + (size_t)(row - top) * (size_t)size * CHANNELS;
        if (!job->mirrored) {
            memcpy(target + (columns.first - left) * CHANNELS, pixels, (size_t)(columns.last - columns.first) * CHANNELS);
            continue;
        }
        for (int64_t column = columns.first; column < columns.last; column++)
            memcpy(target + (size - 1 - (column - left)) * CHANNELS, pixels + (column - columns.first) * CHANNELS, CHANNELS);
    }
    return DECODED;
}

static int resample(const Job *job, int size, Buffer *scratch, Buffer *sums, uint8_t *out) {
    Axis rows = {0}, columns = {0};
    const uint8_t *pixels;
    size_t stride;
    int status = make_axis(&rows, job->top, job->box_height, job->window_top, job->window_bottom, size, 0);
    if (status == DECODED)
        status = make_axis(&columns, job->left, job->box_width, job->window_left, job->window_right, size,
                           (int)job->mirrored);
    if (status == DECODED) status = fetch(job, rows.all, columns.all, scratch, &pixels, &stride);
    if (status == DECODED) {
        size_t width = (size_t)(columns.all.last - columns.all.first) * CHANNELS;
        size_t beyond = (size_t)columns.taps * CHANNELS + 1; /* what zero weights and a Pixel's fourth value read */
        float *row = (float *)reserve(sums, sizeof(float) * (width + beyond));
        if (row) {
            memset(row + width, 0, sizeof(float) * beyond);
            resize(pixels, stride, &rows, &columns, size, row, out);
        } else {
            status = NO_MEMORY;
        }
    }
    free_axis(&rows);
    free_axis(&columns);
    return status;
}

static int decode_one(const Job *job, int size, Buffer *scratch, Buffer *sums, uint8_t *out) {
    int own_size = job->box_height == size && job->box_width == size;
    int whole = job->top == (double)(int64_t)job->top && job->left == (double)(int64_t)job->left;
    return own_size && whole ? copy(job, size, scratch, out) : resample(job, size, scratch, sums, out);
}

/* ---- Python -------------------------------------------------------------------------------------------------- */

PyDoc_STRVAR(decode_doc,
             "decode(jobs, cursor, out, status, size)\n\n"
             "Take the next job that nobody has taken, until there are none; several threads may share the arrays.\n"
             "jobs: N × JOB; cursor: one int64, 0 at first; out: N × size × size × 3, uint8; status: N int32,\n"
             "0 decoded, 1 broken, 2 of another size than announced, 3 out of memory.");

static PyObject *decode(PyObject *self, PyObject *args) {
    Py_buffer jobs, cursor, out, status;
    int size;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*w*w*w*i", &jobs, &cursor, &out, &status, &size)) return NULL;
    int64_t count = jobs.len / (Py_ssize_t)sizeof(Job);
    size_t image = (size_t)size * (size_t)size * CHANNELS;
    int fits = size > 0 && jobs.len == count * (Py_ssize_t)sizeof(Job) && cursor.len == sizeof(int64_t) &&
               (size_t)out.len == (size_t)count * image && status.len == count * (Py_ssize_t)sizeof(int32_t);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS;
        Buffer scratch = {0}, sums = {0};
        int64_t i;
        while ((i = __atomic_fetch_add((int64_t *)cursor.buf, 1, __ATOMIC_RELAXED)) < count)
            ((int32_t *)status.buf)[i] = decode_one((const Job *)jobs.buf + i, size, &scratch, &sums,
                                                    (uint8_t *)out.buf + (size_t)i * image);
        free(scratch.data);
        free(sums.data);
        Py_END_ALLOW_THREADS;
    } else {
        PyErr_SetString(PyExc_ValueError, "jobs, cursor, out and status do not fit each other");
    }
    PyBuffer_Release(&jobs);
    PyBuffer_Release(&cursor);
    PyBuffer_Release(&out);
    PyBuffer_Release(&status);
    if (!fits) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"decode", decode, METH_VARARGS, decode_doc}, {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_decode", "See decode.py.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__decode(void) { return PyModule_Create(&module); }
