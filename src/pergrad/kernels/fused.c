/* Loops over examples that torch has no op for.
 *
 * Norms of sums of outer products, Σ_ts (g_t·g_s)(a_t·a_s), without a Gram matrix in memory: its
 * entries are used while they are in the cache, and only those above the diagonal are formed. The
 * same for convolutions, whose Gram is a sum of Grams of pixels. And the sums of layer norms.
 *
 * C with the vectors of GCC and Clang, and no library. Compiled once per dtype, with -DREAL=float
 * -DSIZE=4 or -DREAL=double -DSIZE=8. It has no threads of its own: `parallel` is torch's runtime.
 */

typedef __INT64_TYPE__ i64;
typedef REAL real;

#if defined(__AVX512F__)
#define BYTES 64
#else
#define BYTES 32
#endif
#define W (BYTES / SIZE) /* numbers in a vector; rows and columns of a tile */
typedef real vec __attribute__((vector_size(BYTES), aligned(SIZE), may_alias));

/* The lower and the upper halves of two vectors, zipped. */
#if W == 16
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define HALVINGS 4
#elif W == 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#define HALVINGS 3
#else
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#define HALVINGS 2
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define ZIP(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#if SIZE == 4
typedef int places __attribute__((vector_size(BYTES)));
#else
typedef i64 places __attribute__((vector_size(BYTES)));
#endif
#define ZIP(x, y, ...) __builtin_shuffle(x, y, (places){__VA_ARGS__})
#endif

#define LINE 64   /* bytes of a cache line */
#define DEPTH 256 /* terms that are summed at a time: two panels of them fit into the first cache */
#define SHORT 128 /* positions whose sum is formed before it is added to that of the others */

static i64 least(i64 x, i64 y) { return x < y ? x : y; }

static double total(vec x)
{
    double sum = 0;
    for (int c = 0; c < W; c++) sum += x[c];
    return sum;
}

/* ---- Threads take one task after the other. ------------------------------------------------- */

typedef void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

/* What they share: the first member of each kind of job. */
typedef struct crew {
    i64 tasks, threads, room_each;
    real *room; /* room_each numbers for each thread */
    i64 next, arrived;
    void (*serve)(const struct crew *job, i64 task, real *room, int first);
} crew;

static void work(void *job)
{
    crew *c = job;
    real *room = c->room + __atomic_fetch_add(&c->arrived, 1, __ATOMIC_RELAXED) * c->room_each;
    for (int first = 1;; first = 0) {
        const i64 task = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED);
        if (task >= c->tasks) return;
        c->serve(c, task, room, first);
    }
}

static void run(crew *c, void (*serve)(const crew *, i64, real *, int), parallel start)
{
    c->next = c->arrived = 0;
    c->serve = serve;
    if (c->threads > 1)
        start(work, c, (unsigned)c->threads, 0);
    else
        work(c);
}

/* ---- Tiles of a Gram. ----------------------------------------------------------------------- */

/* A matrix for each example b and group n, with x[b*batch + n*group + t*row + k*column]. */
typedef struct {
    const real *x;
    i64 batch, group, row, column, width;
} side;

static side of(side s, i64 matrix, i64 groups)
{
    s.x += matrix / groups * s.batch + matrix % groups * s.group;
    return s;
}

/* How the panels of a Gram, W positions each, are cut: `count` blocks of at most `size`. */
typedef struct {
    i64 panels, count, size;
} cut;

static cut cut_of(i64 T, i64 most)
{
    cut c;
    c.panels = (T + W - 1) / W;
    c.count = (c.panels + most - 1) / most;
    c.size = (c.panels + c.count - 1) / c.count;
    return c;
}

/* `in` panels from i, multiplied by `jn` from j. */
typedef struct {
    i64 i, j, in, jn;
} place;

static place place_of(cut c, i64 block)
{
    place p = {0, 0, c.size, c.size};
    for (i64 i = 0, j = 0;; block--) {
        p.i = i * c.size, p.in = least(c.size, c.panels - p.i);
        p.j = j * c.size, p.jn = least(c.size, c.panels - p.j);
        if (!block) return p;
        if (++j == c.count) j = ++i;
    }
}

/* Memory that will be read next: `rows` pieces of `bytes`, `stride` apart. */
typedef struct {
    const char *x;
    i64 rows, stride, bytes, byte;
} ahead;

/* Of n panels from i, the terms from k. */
static ahead coming(side s, i64 T, i64 i, i64 n, i64 k)
{
    const i64 depth = least(DEPTH, s.width - k), rows = least(n * W, T - i * W);
    const char *x = (const char *)(s.x + i * W * s.row + k * s.column);
    if (s.row == 1) return (ahead){x, depth, s.column * SIZE, rows * SIZE, 0};
    return (ahead){x, rows, s.row * SIZE, depth * SIZE, 0};
}

static inline void fetch(ahead *next)
{
    if (next->rows <= 0) return;
    __builtin_prefetch(next->x + next->byte, 0, 2);
    next->byte += LINE;
    if (next->byte >= next->bytes) next->byte = 0, next->rows--, next->x += next->stride;
}

/* W rows side by side, out[k][c] = x[c][k]. Rows that are not there are zeros. */
static void pack(const real *x, side s, i64 rows, i64 depth, real *out)
{
    i64 k = 0;
    if (rows >= W && s.row == 1)
        for (; k < depth; k++) *(vec *)(out + k * W) = *(const vec *)(x + k * s.column);
    else if (s.column == 1)
        for (; k + W <= depth; k += W) {
            vec from[W], to[W];
            for (int c = 0; c < W; c++)
                from[c] = c < rows ? *(const vec *)(x + c * s.row + k) : (vec){0};
            for (int i = 0; i < HALVINGS; i++) { /* zipping the halves so often transposes */
                for (int c = 0; c < W / 2; c++) {
                    to[2 * c] = ZIP(from[c], from[c + W / 2], LOW);
                    to[2 * c + 1] = ZIP(from[c], from[c + W / 2], HIGH);
                }
                for (int c = 0; c < W; c++) from[c] = to[c];
            }
            for (int c = 0; c < W; c++) *(vec *)(out + (k + c) * W) = from[c];
        }
    for (; k < depth; k++)
        for (int c = 0; c < W; c++) out[k * W + c] = c < rows ? x[c * s.row + k * s.column] : 0;
}

/* out[r][c] (+)= Σ_k p[k][r] q[k][c], the sums in registers. They begin at zero each time: a single
 * running sum over thousands of terms loses digits.
 *
 * What comes next is fetched from memory meanwhile, a line at a time: many requests at once would
 * keep the processor waiting. */
static void tile(const real *p, const real *q, i64 depth, int first, vec *out, ahead *next)
{
    vec sum[W];
    ahead fetched = *next;
    for (int r = 0; r < W; r++) sum[r] = (vec){0};
    for (i64 k = 0; k < depth; k++, p += W, q += W) {
        const vec column = *(const vec *)q;
        if (k % 2) fetch(&fetched);
        for (int r = 0; r < W; r++) sum[r] += p[r] * column;
    }
    for (int r = 0; r < W && !first; r++) sum[r] += out[r];
    for (int r = 0; r < W; r++) out[r] = sum[r];
    *next = fetched;
}

/* Two tiles beside each other, by halves: a number of p that is read serves two vectors. */
static void tiles(const real *p, const real *q, i64 depth, int first, vec *out, ahead *next)
{
    ahead fetched = *next;
    for (int h = 0; h < W; h += W / 2) {
        vec sum[W / 2], beside[W / 2];
        const real *left = p + h, *right = q;
        for (int r = 0; r < W / 2; r++) sum[r] = (vec){0}, beside[r] = (vec){0};
        for (i64 k = 0; k < depth; k++, left += W, right += W) {
            const vec column = *(const vec *)right, other = *(const vec *)(right + depth * W);
            if (k % 2) fetch(&fetched);
            for (int r = 0; r < W / 2; r++) {
                sum[r] += left[r] * column;
                beside[r] += left[r] * other;
            }
        }
        for (int r = 0; r < W / 2 && !first; r++) sum[r] += out[h + r], beside[r] += out[W + h + r];
        for (int r = 0; r < W / 2; r++) out[h + r] = sum[r], out[W + h + r] = beside[r];
    }
    *next = fetched;
}

/* The tiles of one block: the upper ones only if it lies on the diagonal. */
static void block(side s, i64 T, place at, real *room, vec *out, ahead then)
{
    const int half = at.i == at.j;
    for (i64 k = 0; k < s.width; k += DEPTH) {
        const i64 depth = least(DEPTH, s.width - k);
        const real *x = s.x + k * s.column;
        real *left = room, *right = half ? left : left + at.in * W * depth;
        ahead next = k + DEPTH < s.width ? coming(s, T, at.i, at.in, k + DEPTH) : then;
        vec *to = out;
        for (i64 u = 0; u < at.in; u++) {
            const i64 t = (at.i + u) * W;
            pack(x + t * s.row, s, T - t, depth, left + u * W * depth);
        }
        for (i64 v = 0; v < at.jn && !half; v++) {
            const i64 t = (at.j + v) * W;
            pack(x + t * s.row, s, T - t, depth, right + v * W * depth);
        }
        for (i64 u = 0; u < at.in; u++) {
            i64 v = half ? u : 0;
            for (; v + 1 < at.jn; v += 2, to += 2 * W)
                tiles(left + u * W * depth, right + v * W * depth, depth, k == 0, to, &next);
            for (; v < at.jn; v++, to += W)
                tile(left + u * W * depth, right + v * W * depth, depth, k == 0, to, &next);
        }
    }
}

/* ---- Norms. --------------------------------------------------------------------------------- */

/* Of a task: the sum of the products, the traces of both Grams, and the sums of their entries. */
enum { PRODUCTS, TRACE_G, TRACE_A, ENTRIES_G, ENTRIES_A, SUMS };

typedef struct {
    crew crew;
    side g, a;
    i64 examples, groups, T;
    i64 most;      /* panels in a block: as many are multiplied by as many others at a time */
    double *sums;  /* of each task: SUMS numbers */
    real *results; /* see `finish` */
    double limit;
    i64 doubtful, doubtful_g, doubtful_a; /* see `finish` */
    /* A convolution: the pixels of a lie at `pixels` of a grid of `grid` places (-1: nowhere),
     * patches at `corners` with their terms `offsets` from there. */
    i64 S, grid, count;
    const i64 *pixels, *corners, *offsets;
} norms;

static void add(double times, const vec *G, const vec *A, i64 tiles, double *sums)
{
    vec products = {0}, of_g = {0}, of_a = {0};
    for (i64 r = 0; r < tiles * W; r++) {
        products += G[r] * A[r];
        of_g += G[r];
        of_a += A[r];
    }
    sums[PRODUCTS] += times * total(products);
    sums[ENTRIES_G] += times * total(of_g);
    sums[ENTRIES_A] += times * total(of_a);
}

static void serve_gram(const crew *job, i64 task, real *room, int first)
{
    const norms *w = (const norms *)job;
    const cut c = cut_of(w->T, w->most);
    const i64 pairs = c.count * (c.count + 1) / 2, matrix = task / pairs;
    const side g = of(w->g, matrix, w->groups), a = of(w->a, matrix, w->groups);
    const place at = place_of(c, task % pairs);
    const int half = at.i == at.j;
    vec *G = (vec *)(room + 2 * c.size * W * DEPTH), *A = G + c.size * c.size * W;
    ahead next = {0};
    const i64 then = task + w->crew.threads; /* most probably this thread's next */
    if (then < w->crew.tasks) {
        const place there = place_of(c, then % pairs);
        next = coming(of(w->g, then / pairs, w->groups), w->T, there.i, there.in, 0);
    }
    block(g, w->T, at, room, G, coming(a, w->T, at.i, at.in, 0));
    block(a, w->T, at, room, A, next);
    double *sums = w->sums + task * SUMS;
    for (int m = 0; m < SUMS; m++) sums[m] = 0;
    for (i64 u = 0; u < at.in; u++) {
        if (half) { /* the tile on the diagonal counts once */
            for (int r = 0; r < W; r++) {
                sums[TRACE_G] += G[r][r];
                sums[TRACE_A] += A[r][r];
            }
            add(1, G, A, 1, sums);
            G += W, A += W;
        }
        const i64 others = half ? at.in - u - 1 : at.jn; /* the others for those below it too */
        add(2, G, A, others, sums);
        G += others * W, A += others * W;
    }
    (void)first;
}

/* Tiles go to their places in a matrix. */
static void scatter(const vec *tiles, place at, i64 end, const i64 *row_at, const i64 *column_at,
                    i64 pitch, real *out)
{
    for (i64 u = at.i; u < at.i + at.in; u++)
        for (i64 v = at.i == at.j ? u : at.j; v < at.j + at.jn; v++, tiles += W) {
            const i64 *columns = column_at + v * W;
            const i64 height = least(W, end - u * W), width = least(W, end - v * W);
            int whole = width == W && columns[0] >= 0; /* they lie side by side there too */
            for (i64 c = 0; c < width; c++) whole &= columns[c] == columns[0] + c;
            for (i64 r = 0; r < height; r++) {
                const i64 row = row_at ? row_at[u * W + r] : u * W + r;
                real *to = out + row * pitch;
                if (row < 0) continue;
                if (whole) *(vec *)(to + columns[0]) = tiles[r];
                for (i64 c = 0; c < width && !whole; c++)
                    if (columns[c] >= 0) to[columns[c]] = tiles[r][c];
            }
        }
}

/* The upper half of a Gram, at its places in a larger matrix. */
static void spread(side s, i64 T, i64 most, const i64 *row_at, const i64 *column_at, i64 pitch,
                   real *room, vec *tiles, real *out, ahead then)
{
    const cut c = cut_of(T, most);
    for (i64 b = 0; b < c.count * (c.count + 1) / 2; b++) {
        const place at = place_of(c, b);
        block(s, T, at, room, tiles, then);
        scatter(tiles, at, T, row_at, column_at, pitch, out);
    }
}

/* One convolution: Σ_ts (g_t·g_s) Σ_k x_{t+k}·x_{s+k}, from the Gram of g and that of the pixels.
 *
 * Both lie in the grid, whose places between the patches are zeros in that of g: so a row of sums
 * over k is a sum of contiguous pieces of rows. What is read beyond them meets zeros. */
static void serve_shifts(const crew *job, i64 task, real *room, int first)
{
    const norms *w = (const norms *)job;
    const side g = of(w->g, task, w->groups), a = of(w->a, task, w->groups);
    const i64 pitch = w->grid + W, last = w->corners[w->T - 1], then = task + w->crew.threads;
    real *pixels = room, *pairs = pixels + w->grid * w->grid + W, *packed = pairs + w->T * pitch;
    vec *tiles = (vec *)(packed + 2 * w->most * W * DEPTH);
    for (i64 i = 0; first && i < packed - pixels; i++) pixels[i] = 0;
    ahead next = {0};
    if (then < w->crew.tasks) next = coming(of(w->a, then, w->groups), w->S, 0, w->most, 0);
    spread(a, w->S, w->most, w->pixels, w->pixels, w->grid, packed, tiles, pixels,
           coming(g, w->T, 0, w->most, 0));
    spread(g, w->T, w->most, 0, w->corners, pitch, packed, tiles, pairs, next);
    double *sums = w->sums + task * SUMS;
    for (int m = 0; m < SUMS; m++) sums[m] = 0;
    for (i64 t = 0; t < w->T; t++) {
        const i64 corner = w->corners[t];
        const real *row = pairs + t * pitch + corner, *from = pixels + corner * (w->grid + 1);
        vec upper = {0};
        real diagonal = 0;
        for (i64 u = 0; u <= last - corner; u += W) {
            vec sum = {0};
            for (i64 k = 0; k < w->count; k++)
                sum += *(const vec *)(from + w->offsets[k] * (w->grid + 1) + u);
            upper += sum * *(const vec *)(row + u);
            if (u == 0) diagonal = sum[0];
        }
        sums[PRODUCTS] += 2 * total(upper) - (double)diagonal * row[0];
        sums[TRACE_G] += row[0];
        sums[TRACE_A] += diagonal;
    }
}

/* For each example: |Gᵀ A|² and |G|² |A|², sums over groups; and of one group |Σ_t g_t|² and
 * |Σ_t a_t|², each with T times the trace. And in how many examples the first of such a pair is less
 * than its share of the second, or one of them not a number. */
static void finish(norms *w)
{
    const i64 B = w->examples, each = B ? w->crew.tasks / (B * w->groups) : 0;
    const real limit = (real)w->limit;
    w->doubtful = w->doubtful_g = w->doubtful_a = 0;
    for (i64 b = 0; b < B; b++) {
        double norm = 0, size = 0, sums[SUMS] = {0};
        for (i64 n = 0; n < w->groups; n++) {
            const double *task = w->sums + (b * w->groups + n) * each * SUMS;
            for (int m = 0; m < SUMS; m++) sums[m] = 0;
            for (i64 i = 0; i < each * SUMS; i++) sums[i % SUMS] += task[i];
            norm += sums[PRODUCTS];
            size += sums[TRACE_G] * sums[TRACE_A];
        }
        real *to = w->results + b;
        to[0] = (real)norm, to[B] = (real)size;
        to[2 * B] = (real)sums[ENTRIES_G], to[3 * B] = (real)(w->T * sums[TRACE_G]);
        to[4 * B] = (real)sums[ENTRIES_A], to[5 * B] = (real)(w->T * sums[TRACE_A]);
        w->doubtful += !(to[B] <= limit * to[0]);
        w->doubtful_g += !(to[3 * B] <= limit * to[2 * B]);
        w->doubtful_a += !(to[5 * B] <= limit * to[4 * B]);
    }
}

/* ---- Layer norms. --------------------------------------------------------------------------- */

/* Sums over positions, of g and of g times what a layer norm has made of x, for each example. */
typedef struct {
    crew crew;
    const real *g, *x, *mean, *scale;   /* no mean: zeros */
    i64 g_batch, g_row, x_batch, x_row; /* numbers of a position are contiguous */
    i64 T, size, parts;                 /* the positions of an example are cut into parts */
    real *sums;                         /* (examples, parts, 2, size); all sums in the first part */
    real *norms;                        /* (2, examples): squared norms of the sums */
} layers;

static double squares(const real *x, i64 n)
{
    double sum = 0;
    for (i64 i = 0; i < n;) {
        vec part = {0};
        const i64 end = least(i + DEPTH, n);
        for (; i + W <= end; i += W) part += *(const vec *)(x + i) * *(const vec *)(x + i);
        for (; i < end; i++) sum += (double)x[i] * x[i];
        sum += total(part);
    }
    return sum;
}

static void add_parts(const layers *w, i64 b)
{
    const i64 size = w->size, examples = w->crew.tasks / w->parts;
    real *sums = w->sums + b * w->parts * 2 * size;
    for (i64 part = 1; part < w->parts; part++)
        for (i64 f = 0; f < 2 * size; f++) sums[f] += sums[part * 2 * size + f];
    w->norms[b] = (real)squares(sums, size);
    w->norms[examples + b] = (real)squares(sums + size, size);
}

static void serve_layer(const crew *job, i64 task, real *room, int first)
{
    const layers *w = (const layers *)job;
    const i64 b = task / w->parts, part = task % w->parts, size = w->size;
    const i64 end = w->T * (part + 1) / w->parts;
    real *sums = w->sums + task * 2 * size;
    for (i64 f = 0; f < 2 * size; f++) sums[f] = 0;
    for (i64 lo = w->T * part / w->parts; lo < end; lo += SHORT) {
        real *scaled = room, *plain = room + size;
        for (i64 f = 0; f < 2 * size; f++) room[f] = 0;
        for (i64 t = lo; t < least(lo + SHORT, end); t++) {
            const real *g = w->g + b * w->g_batch + t * w->g_row;
            const real *x = w->x + b * w->x_batch + t * w->x_row;
            const real m = w->mean ? w->mean[b * w->T + t] : 0, r = w->scale[b * w->T + t];
            i64 f = 0;
            for (; f + W <= size; f += W) {
                const vec v = *(const vec *)(g + f);
                *(vec *)(plain + f) += v;
                *(vec *)(scaled + f) += (*(const vec *)(x + f) - m) * r * v;
            }
            for (; f < size; f++) {
                plain[f] += g[f];
                scaled[f] += (x[f] - m) * r * g[f];
            }
        }
        for (i64 f = 0; f < 2 * size; f++) sums[f] += room[f];
    }
    if (w->parts == 1) add_parts(w, b);
    (void)first;
}

/* ---- What is called from Python. No result depends on the number of threads. ----------------- */

/* How many tasks there are for a Gram, and numbers a thread needs room for. */
void fused_sizes(i64 T, i64 most, i64 *sizes)
{
    const cut c = cut_of(T, most);
    sizes[0] = c.count * (c.count + 1) / 2;
    sizes[1] = 2 * c.size * W * (DEPTH + c.size * W);
}

/* Numbers a thread needs room for if T patches lie in a grid. */
i64 fused_shift_room(i64 T, i64 grid, i64 most)
{
    return grid * grid + W + T * (grid + W) + most * W * (2 * DEPTH + most * W);
}

void fused_norms(norms *w, parallel start)
{
    run(&w->crew, w->offsets ? serve_shifts : serve_gram, start);
    finish(w);
}

void fused_layer(layers *w, parallel start)
{
    run(&w->crew, serve_layer, start);
    for (i64 b = 0; w->parts > 1 && b < w->crew.tasks / w->parts; b++) add_parts(w, b);
}
