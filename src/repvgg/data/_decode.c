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
    Range *ranges;  /* of input positions, one per output position */
    float *weights; /* `taps` per output position; they sum to 1 */
    int taps;
    Range all;
} Axis;

/* Output position i looks at start + (i + 1/2)·length/size through a triangle that reaches `scale` (at least 1)
 * input positions to each side; positions outside [low, high) do not exist. PIL's ImagingResample. */
static int make_axis(Axis *axis, double start, double length, int64_t low, int64_t high, int size) {
    double scale = length / size, reach = scale > 1 ? scale : 1;
    axis->taps = 2 * (int)(reach + 1) + 1;
    axis->ranges = malloc(sizeof(Range) * (size_t)size);
    axis->weights = malloc(sizeof(float) * (size_t)size * (size_t)axis->taps);
    if (!axis->ranges || !axis->weights) return NO_MEMORY;
    axis->all.first = high;
    axis->all.last = low;
    for (int i = 0; i < size; i++) {
        double centre = start + (i + 0.5) * scale, from = centre - reach + 0.5, to = centre + reach + 0.5;
        Range range = {from > low ? (int64_t)from : low, to < high ? (int64_t)to : high};
        float *weights = axis->weights + (size_t)i * (size_t)axis->taps;
        double sum = 0;
        for (int64_t k = range.first; k < range.last; k++) {
            double distance = ((double)k + 0.5 - centre) / reach;
            double weight = 1 - (distance < 0 ? -distance : distance);
            weights[k - range.first] = (float)(weight > 0 ? weight : 0);
            sum += weight > 0 ? weight : 0;
        }
        while (range.last > range.first + 1 && weights[range.last - range.first - 1] == 0) range.last--;
        for (int64_t k = range.first; k < range.last; k++) weights[k - range.first] /= (float)sum;
        axis->ranges[i] = range;
        if (range.first < axis->all.first) axis->all.first = range.first;
        if (range.last > axis->all.last) axis->all.last = range.last;
    }
    return DECODED;
}

static void free_axis(Axis *axis) {
    free(axis->ranges);
    free(axis->weights);
}

/* sums[x] = Σ_k weights[k] · rows[k][x] */
FOR_EACH_CPU static void weigh_rows(const uint8_t *rows, size_t stride, const float *weights, int64_t count,
                                    size_t width, float *restrict sums) {
    for (size_t x = 0; x < width; x++) sums[x] = weights[0] * (float)rows[x];
    for (int64_t k = 1; k < count; k++) {
        const uint8_t *row = rows + (size_t)k * stride;
        float weight = weights[k];
        for (size_t x = 0; x < width; x++) sums[x] += weight * (float)row[x];
    }
}

typedef float Pixel __attribute__((vector_size(16), aligned(4))); /* red, green, blue and whatever comes next */

FOR_EACH_CPU static void weigh_columns(const float *row, const Axis *axis, int size, int mirrored, uint8_t *out) {
    int step = mirrored ? -CHANNELS : CHANNELS;
    if (mirrored) out += (size_t)(size - 1) * CHANNELS;
    for (int i = 0; i < size; i++, out += step) {
        const float *weights = axis->weights + (size_t)i * (size_t)axis->taps;
        const float *from = row + (axis->ranges[i].first - axis->all.first) * CHANNELS;
        int64_t count = axis->ranges[i].last - axis->ranges[i].first;
        Pixel sum = {0.5f, 0.5f, 0.5f, 0.5f};
        for (int64_t k = 0; k < count; k++) sum += *(const Pixel *)(from + k * CHANNELS) * weights[k];
        for (int c = 0; c < CHANNELS; c++) out[c] = (uint8_t)(sum[c] < 255.0f ? sum[c] : 255.0f);
    }
}

static void resize(const uint8_t *pixels, size_t stride, const Axis *rows, const Axis *columns, int size,
                   int mirrored, float *sums, uint8_t *out) {
    size_t width = (size_t)(columns->all.last - columns->all.first) * CHANNELS;
    for (int y = 0; y < size; y++, out += (size_t)size * CHANNELS) {
        Range range = rows->ranges[y];
        weigh_rows(pixels + (size_t)(range.first - rows->all.first) * stride, stride,
                   rows->weights + (size_t)y * (size_t)rows->taps, range.last - range.first, width, sums);
        weigh_columns(sums, columns, size, mirrored, out);
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
    int status = make_axis(&rows, job->top, job->box_height, job->window_top, job->window_bottom, size);
    if (status == DECODED)
        status = make_axis(&columns, job->left, job->box_width, job->window_left, job->window_right, size);
    if (status == DECODED) status = fetch(job, rows.all, columns.all, scratch, &pixels, &stride);
    if (status == DECODED) {
        size_t width = (size_t)(columns.all.last - columns.all.first) * CHANNELS;
        float *row = (float *)reserve(sums, sizeof(float) * (width + 1)); /* Pixel reads one beyond */
        if (row) {
            row[width] = 0;
            resize(pixels, stride, &rows, &columns, size, (int)job->mirrored, row, out);
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
