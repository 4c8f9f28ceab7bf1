// The instructions of ptx.h that move data between threads or at a later time. Part of runtime.cpp,
// whose threads, regions and cells it uses. Section names are those of the PTX ISA 9.0.

// ------------------------------------------------------------------- addresses of shared memory

// In PTX shared memory has addresses of its own. Here the static part begins at 1024, as on sm_90
// (the first KiB is the system's), the dynamic part after it, aligned as the launch aligns it.
static const uint64_t STATIC_SHARED = 1024, SHARED_WINDOW = 256 << 10;

static uint64_t dynamic_shared_number() {
    uint64_t end = STATIC_SHARED + (uint64_t)(static_shared_high - static_shared_low);
    return (end + DYNAMIC_ALIGNMENT - 1) / DYNAMIC_ALIGNMENT * DYNAMIC_ALIGNMENT;
}

extern "C" uint32_t gpusim_shared_number(const void* pointer, void* pc) {
    const char* p = (const char*)pointer;
    if (p >= static_shared_low && p < static_shared_high)
        return STATIC_SHARED + (p - static_shared_low);
    if (launch->dynamic_shared && p >= dynamic_shared
        && p <= dynamic_shared + launch->dynamic_shared)
        return dynamic_shared_number() + (p - dynamic_shared);
    gpusim_fault(pc, "__cvta_generic_to_shared of a pointer that is not to shared memory");
}

// Where the bytes lie here. Faults unless all of them are in one part of the shared memory.
static char* shared_bytes(uint64_t number, unsigned size, const char* what, void* pc) {
    uint64_t dynamic = dynamic_shared_number();
    bool is_dynamic = launch->dynamic_shared && number >= dynamic;
    uint64_t low = is_dynamic ? dynamic : STATIC_SHARED;
    uint64_t bytes = is_dynamic ? launch->dynamic_shared : static_shared_high - static_shared_low;
    if (number < low || number >= SHARED_WINDOW)
        gpusim_fault(pc, "%s of %u bytes at %#llx, which is not an address of shared memory", what,
                     size, (unsigned long long)number);
    if (number + size > low + bytes)
        gpusim_fault(pc, "out-of-bounds %s of %u bytes: %llu bytes past the end of %s memory "
                         "(%llu bytes)", what, size,
                     (unsigned long long)(number + size - low - bytes),
                     is_dynamic ? "dynamic shared" : "static shared", (unsigned long long)bytes);
    return (is_dynamic ? dynamic_shared : static_shared_low) + (number - low);
}

extern "C" void* gpusim_shared_access(uint64_t number, unsigned size, bool write, void* pc) {
    char* p = shared_bytes(number, size, write ? "write" : "read", pc);
    check_access((uintptr_t)p, size, write, false, true, pc);
    return p;
}

static void require_global(uint64_t address, unsigned size, const char* what, bool constant,
                           void* pc) {
    Region* r = region_of(address, size);
    if (!r || !launch->checked) return;  // check_access says what is wrong
    if (r->kind == SHARED) gpusim_fault(pc, "%s with an address of %s memory", what, r->name);
    if (constant && r->writable)
        gpusim_fault(pc, "%s of %s, which the kernel does not declare const", what, r->name);
}

extern "C" void* gpusim_global_access(uint64_t address, unsigned size, bool write, bool constant,
                                      void* pc) {
    require_global(address, size, write ? "st.global" : constant ? "ld.global.nc" : "ld.global",
                   constant, pc);
    check_access(address, size, write, false, true, pc);
    return (void*)address;
}

// ------------------------------------------------------------------ "Data Movement: cp.async"

template <class F> static void for_each_cell(const char* p, unsigned size, F f) {
    Region* r = region_of((uintptr_t)p, size);
    if (!r || !r->cells) return;
    for (size_t i = ((uintptr_t)p - r->low) >> r->shift;
         i <= ((uintptr_t)p + size - 1 - r->low) >> r->shift; i++)
        f(r->cells[i]);
}

// The bytes land as late as they may, at the wait that guarantees them. Until then nobody may touch
// the destination, which holds NaN; afterwards it counts as written by the thread that waited, so
// that other threads need a barrier after that wait.
extern "C" void gpusim_cp_async(uint64_t to, uint64_t from, unsigned size, unsigned source_size,
                                void* pc) {
    char* destination = shared_bytes(to, size, "cp.async write", pc);
    check_access((uintptr_t)destination, size, true, false, true, pc);
    if (source_size > size)
        gpusim_fault(pc, "cp.async: src-size %u is larger than cp-size %u", source_size, size);
    if (source_size) {
        if (from % size) gpusim_fault(pc, "misaligned cp.async read of %u bytes", size);
        require_global(from, source_size, "cp.async", false, pc);
        check_access(from, source_size, false, false, false, pc);
    }
    memset(destination, 0xFF, size);
    for_each_cell(destination, size, [](Cell& c) { c.last_write |= IN_FLIGHT; });
    current->uncommitted_copies.push_back(
        {destination, (const char*)from, size, source_size, pc});
}

extern "C" void gpusim_cp_async_commit() {
    current->copy_groups.push_back(std::move(current->uncommitted_copies));
    current->uncommitted_copies.clear();
}

extern "C" void gpusim_cp_async_wait(unsigned groups_left) {
    std::vector<CopyGroup>& groups = current->copy_groups;
    while (groups.size() > groups_left) {
        for (const AsyncCopy& copy : groups.front()) {
            memcpy(copy.to, copy.from, copy.source_size);
            memset(copy.to + copy.source_size, 0, copy.size - copy.source_size);
            for_each_cell(copy.to, copy.size, [](Cell& c) {
                c.last_write = pack();
                c.proxy_fences = current->proxy_fences;
            });
        }
        groups.erase(groups.begin());
    }
}

// ------------------------------------------------------------------------- formats of 16 bits

// To nearest, ties to even; NaN becomes the canonical NaN ("cvt").
extern "C" uint16_t gpusim_half(float x) {
    uint32_t bits, a;
    memcpy(&bits, &x, 4);
    uint16_t sign = bits >> 16 & 0x8000;
    a = bits & 0x7FFFFFFF;
    if (a > 0x7F800000) return 0x7FFF;
    if (a >= 0x477FF000) return sign | 0x7C00;  // 65520 and more round to infinity
    if (a < 0x38800000) {  // below 2^-14: adding 0.5 rounds to the subnormals' spacing, 2^-24
        float shifted;
        memcpy(&shifted, &a, 4);
        shifted += 0.5f;
        memcpy(&a, &shifted, 4);
        return sign | (uint16_t)(a - 0x3F000000);
    }
    return sign | (uint16_t)((a - 0x38000000 + 0xFFF + (a >> 13 & 1)) >> 13);
}

extern "C" uint16_t gpusim_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

extern "C" float gpusim_from_half(uint16_t h) {
    uint32_t exponent = h >> 10 & 31, mantissa = h & 1023, bits;
    float magnitude = mantissa * 0x1p-24f;  // of a subnormal
    if (exponent) {
        bits = (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13;
        memcpy(&magnitude, &bits, 4);
    }
    return h & 0x8000 ? -magnitude : magnitude;
}

enum Type : unsigned { F16, BF16, TF32 };  // GpusimType of ptx.h

static float from_16_bits(uint16_t h, Type type) {
    if (type == F16) return gpusim_from_half(h);
    uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// Value i of those that a fragment's registers hold.
static float fragment_value(const uint32_t* registers, unsigned i, Type type) {
    if (type != TF32) return from_16_bits(registers[i / 2] >> (i % 2 * 16), type);
    // The tensor core does not see the low 13 bits: a value must have been rounded before.
    uint32_t bits = registers[i] & 0xFFFFE000;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// ------------------------------------------- "Warp-level matrix load instruction: ldmatrix"

struct Ldmatrix { uint32_t* const* to; unsigned matrices; bool transposed; const char* row; };

// Lane 8 * m + i gives the address of row i of matrix m. Lane l receives two neighbours of row
// l / 4, or with .trans of column l / 4.
static void ldmatrix_lanes(void** lanes, unsigned) {
    Ldmatrix** all = (Ldmatrix**)lanes;
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!all[lane]) gpusim_fault(current->pc, "ldmatrix needs all 32 lanes");
        for (unsigned m = 0; m < all[lane]->matrices; m++) {
            uint16_t pair[2];
            for (unsigned i = 0; i < 2; i++) {
                unsigned row = lane / 4, column = lane % 4 * 2 + i;
                if (all[lane]->transposed) std::swap(row, column);
                memcpy(&pair[i], all[m * 8 + row]->row + column * 2, 2);
            }
            memcpy(all[lane]->to[m], pair, 4);
        }
    }
}

extern "C" void gpusim_ldmatrix(uint32_t* const* to, unsigned matrices, bool transposed,
                                uint64_t row, void* pc) {
    const char* p = nullptr;
    if ((current->id & 31) < matrices * 8)  // the other lanes' addresses are not used
        p = (const char*)gpusim_shared_access(row, 16, false, pc);
    Ldmatrix l{to, matrices, transposed, p};
    gpusim_collective(~0u, &l, ldmatrix_lanes, pc);
}

// ---------------------------------------------- "Warp-level matrix instructions: mma"

struct Mma { float* const* d; const uint32_t *a, *b; const float* c; Type type; unsigned k; };

// Products are exact; they are added to c in float32, one after another in the order of k. (The
// tensor core adds several at once and truncates: results differ in the last bits.)
static float multiply_add(float sum, const float* a, const float* b, unsigned k) {
    for (unsigned i = 0; i < k; i++) sum = (float)(sum + (double)a[i] * b[i]);
    return sum;
}

// "Matrix Fragments for mma.m16n8k8" and "m16n8k16". A register holds `pack` values along k. With
// g = lane / 4 and t = lane % 4:
//     A, register r: row g + 8 * (r % 2), from k = t * pack + 4 * pack * (r / 2)
//     B, register r: column g,            from k = t * pack + 4 * pack * r
//     C and D, value i: row g + 8 * (i / 2), column 2 * t + i % 2
static void mma_lanes(void** lanes, unsigned) {
    Mma** all = (Mma**)lanes;
    float a[16][16], b[8][16];  // b transposed
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!all[lane]) gpusim_fault(current->pc, "mma needs all 32 lanes");
        const Mma& m = *all[lane];
        unsigned g = lane / 4, t = lane % 4, pack = m.type == TF32 ? 1 : 2;
        for (unsigned r = 0; r < m.k / (2 * pack); r++)
            for (unsigned v = 0; v < pack; v++)
                a[g + 8 * (r % 2)][t * pack + 4 * pack * (r / 2) + v]
                    = fragment_value(m.a, r * pack + v, m.type);
        for (unsigned r = 0; r < m.k / (4 * pack); r++)
            for (unsigned v = 0; v < pack; v++)
                b[g][t * pack + 4 * pack * r + v] = fragment_value(m.b, r * pack + v, m.type);
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        const Mma& m = *all[lane];
        for (unsigned i = 0; i < 4; i++) {
            unsigned row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
            *m.d[i] = multiply_add(m.c[i], a[row], b[column], m.k);
        }
    }
}

extern "C" void gpusim_mma(float* const* d, const uint32_t* a, const uint32_t* b, const float* c,
                           Type type, unsigned k, void* pc) {
    Mma m{d, a, b, c, type, k};
    gpusim_collective(~0u, &m, mma_lanes, pc);
}

// ------------------------ "Asynchronous warpgroup level matrix instructions": wgmma.mma_async

extern "C" void gpusim_fence_proxy_async() {
    current->proxy_fences++;
    current->last_proxy_fence = barrier_epoch;
}

// The tensor core reads shared memory past the generic proxy. What threads or cp.async wrote there
// is seen only after a fence.proxy.async of the writer, or of the reader after a barrier.
static void check_proxy(const char* p, unsigned size, void* pc) {
    for_each_cell(p, size, [pc](Cell& cell) {
        const Thread& writer = threads[thread_of(cell.last_write)];
        if (writer.proxy_fences == cell.proxy_fences
            && current->last_proxy_fence <= barriers_before(cell.last_write))
            gpusim_fault(pc, "wgmma reads what thread #%u wrote with no fence.proxy.async since",
                         writer.id);
    });
}

// "Matrix Descriptor Format": 16-byte units, in bits 0-13 the start address, 16-29 the leading, 32-45
// the stride dimension byte offset; bits 49-51 base offset; 62-63 swizzling mode, 1 for 128 bytes.
// "Canonical Layouts" of that mode: the 16 bytes that hold element (mn, k) and its neighbours.
static const char* operand_chunk(uint64_t descriptor, bool transposed, unsigned mn, unsigned k,
                                 void* pc) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7))
        gpusim_fault(pc, "wgmma: only descriptors with 128-byte swizzling and base offset 0 are "
                         "modelled; got %#llx", (unsigned long long)descriptor);
    uint64_t leading = (descriptor >> 16 & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    uint64_t at = (descriptor & 0x3FFF) << 4;
    if (transposed)  // MN-major: 64 neighbours along mn in a row, 8 rows along k in an atom
        at += mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * 128;
    else             // K-major: 64 neighbours along k in a row, 8 rows along mn in an atom
        at += mn / 8 * stride + mn % 8 * 128 + k * 2;
    at ^= (at >> 7 & 7) << 4;
    const char* p = (const char*)gpusim_shared_access(at & ~15ull, 16, false, pc);
    check_proxy(p, 16, pc);
    return p;
}

// Rows first..first + count - 1 of an operand, 16 k each.
static std::vector<float> read_operand(uint64_t descriptor, bool transposed, unsigned first,
                                       unsigned count, Type type, void* pc) {
    std::vector<float> rows(count * 16);
    for (unsigned i = 0; i < count * 2; i++) {
        unsigned mn = transposed ? i / 16 * 8 : i / 2, k = transposed ? i % 16 : i % 2 * 8;
        uint16_t chunk[8];
        memcpy(chunk, operand_chunk(descriptor, transposed, first + mn, k, pc), 16);
        for (unsigned j = 0; j < 8; j++)
            rows[transposed ? (mn + j) * 16 + k : mn * 16 + k + j] = from_16_bits(chunk[j], type);
    }
    return rows;
}

static const uint32_t POISON = 0xFFFFFFFF;

static void require_poison(const float* accumulator, void* pc) {
    if (memcmp(accumulator, &POISON, 4))
        gpusim_fault(pc, "an accumulator of this wgmma was written while it was in flight: "
                         "wgmma.wait_group missing or too early");
}

static unsigned warp_in_group() { return current->id / 32 % 4; }

// Each thread passes its own; the last to arrive compares them, and reads the operands, so that
// they count as read from the issue on.
static void issue_wgmma_lanes(void** lanes, unsigned) {
    const Wgmma* first = (const Wgmma*)lanes[0];
    for (unsigned lane = 0; lane < 32; lane++) {
        const Wgmma* other = (const Wgmma*)lanes[lane];
        if (!first || !other) gpusim_fault(current->pc, "wgmma needs all 32 lanes of each warp");
        if (other->a != first->a || other->b != first->b || other->accumulate != first->accumulate)
            gpusim_fault(other->pc, "wgmma: the lanes of a warp disagree on descriptors or scale-d");
    }
    read_operand(first->a, first->transposed_a, 16 * warp_in_group(), 16, (Type)first->type,
                 first->pc);
    read_operand(first->b, first->transposed_b, 0, first->n, (Type)first->type, first->pc);
}

extern "C" void gpusim_wgmma(float* const* d, uint64_t a, uint64_t b, unsigned n, unsigned type,
                             bool accumulate, float scale, bool transposed_a, bool transposed_b,
                             void* pc) {
    if (n_threads % 128) gpusim_fault(pc, "wgmma needs whole groups of four warps");
    Wgmma w{std::vector<float*>(d, d + n / 2), a, b, n, type, transposed_a, transposed_b,
            accumulate, scale, pc};
    for (float* p : w.d) {
        auto [place, is_new] = current->accumulators.try_emplace(p);
        Accumulator& accumulator = place->second;
        if (accumulator.pending) {
            require_poison(p, pc);
        } else {
            // Those that hold what the last wgmma left there need no further fence.
            if (!current->wgmma_fenced && (is_new || memcmp(p, &accumulator.value, 4)))
                gpusim_fault(pc, "wgmma: its accumulators were written with no wgmma.fence since");
            accumulator.value = *p;
            memcpy(p, &POISON, 4);
        }
        accumulator.pending++;
    }
    gpusim_collective(~0u, &w, issue_wgmma_lanes, pc);
    current->uncommitted_wgmmas.push_back(std::move(w));
}

static void nothing_lanes(void**, unsigned) {}

extern "C" void gpusim_wgmma_fence(void* pc) {
    gpusim_collective(~0u, nullptr, nothing_lanes, pc);
    current->wgmma_fenced = true;
}

extern "C" void gpusim_wgmma_commit(void* pc) {
    gpusim_collective(~0u, nullptr, nothing_lanes, pc);
    current->wgmma_groups.push_back(std::move(current->uncommitted_wgmmas));
    current->uncommitted_wgmmas.clear();
}

// "Matrix Fragments for wgmma.mma_async.m64nNk16": value i of accumulator D of lane l in warp w is in
// row 16 * w + l / 4 + 8 * (i / 2 % 2), column 8 * (i / 4) + 2 * (l % 4) + i % 2.
static void execute_wgmma(Thread** warp, unsigned number) {
    const Wgmma& w = warp[0]->wgmma_groups.front()[number];
    Type type = (Type)w.type;
    std::vector<float> a = read_operand(w.a, w.transposed_a, 16 * warp_in_group(), 16, type, w.pc);
    std::vector<float> b = read_operand(w.b, w.transposed_b, 0, w.n, type, w.pc);
    for (float& value : a) value *= w.scale;
    for (unsigned lane = 0; lane < 32; lane++) {
        const Wgmma& mine = warp[lane]->wgmma_groups.front()[number];
        for (unsigned i = 0; i < w.n / 2; i++) {
            Accumulator& accumulator = warp[lane]->accumulators[mine.d[i]];
            unsigned row = lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + lane % 4 * 2 + i % 2;
            accumulator.value = multiply_add(w.accumulate ? accumulator.value : 0.0f, &a[row * 16],
                                             &b[column * 16], 16);
            if (--accumulator.pending) continue;
            require_poison(mine.d[i], w.pc);
            *mine.d[i] = accumulator.value;
        }
    }
}

struct WgmmaWait { Thread* thread; unsigned groups_left; };

// As late as legal: operands are read here, and accumulators hold NaN until now.
static void wait_wgmma_lanes(void** lanes, unsigned) {
    Thread* warp[32];
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!lanes[lane]) gpusim_fault(current->pc, "wgmma needs all 32 lanes of each warp");
        warp[lane] = ((WgmmaWait*)lanes[lane])->thread;
    }
    while (warp[0]->wgmma_groups.size() > ((WgmmaWait*)lanes[0])->groups_left) {
        for (unsigned i = 0; i < warp[0]->wgmma_groups.front().size(); i++) execute_wgmma(warp, i);
        for (Thread* t : warp) t->wgmma_groups.erase(t->wgmma_groups.begin());
    }
}

extern "C" void gpusim_wgmma_wait(unsigned groups_left, void* pc) {
    WgmmaWait wait{current, groups_left};
    gpusim_collective(~0u, &wait, wait_wgmma_lanes, pc);
    current->wgmma_fenced = false;
}
