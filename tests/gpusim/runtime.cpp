// Runs the blocks of a launch one after another, each CUDA thread on a fiber, and checks every
// memory access.
//
// The kernel is compiled with g++ -fsanitize=thread but linked with this file instead of libtsan.
// The compiler then calls __tsan_readN and __tsan_writeN before each access: those calls are the
// checker. In the same way UBSan's handlers become faults with the line of the .cu file.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <unordered_map>
#include <vector>

struct Index3 { unsigned x, y, z; };
extern "C" {
Index3 gpusim_threadIdx, gpusim_blockIdx, gpusim_blockDim, gpusim_gridDim;
}

// What the race checker remembers of one granule of memory.
struct Cell {
    uint64_t last_write, last_read;
    uint64_t proxy_fences;  // how many fence.proxy.async the writer had executed
};

enum Kind : uint32_t { GLOBAL, SHARED, MODULE };  // module data is not checked for races

struct Region {  // the layout of engine.py's _Region
    uintptr_t low, high;
    uint32_t shift;  // log2 of the bytes in a granule
    uint32_t writable;
    const char* name;
    Cell* cells;
    uint32_t kind;
};

struct Launch {  // the layout of engine.py's _Launch
    unsigned grid[3], block[3];
    unsigned dynamic_shared, order, seed, checked, n_regions;
    Region* regions;
    void (*entry)(void**);
    void** args;
    uint64_t max_accesses;
    // Results.
    uintptr_t fault_address;
    char fault[400];
};

enum State : uint8_t { RUNNING, AT_BARRIER, AT_WARP_OPERATION, EXITED };
enum Order : unsigned { ASCENDING, DESCENDING, SHUFFLED };

struct Fiber {
    jmp_buf env;
    ucontext_t context;
    char* stack;
    bool started;
};

typedef void (*Collective)(void** lanes, unsigned mask);

struct AsyncCopy { char* to; const char* from; unsigned size, source_size; void* pc; };
typedef std::vector<AsyncCopy> CopyGroup;

// One wgmma.mma_async in flight, for one of its threads. d: where the thread's accumulators lie.
struct Wgmma {
    std::vector<float*> d;
    uint64_t a, b;  // descriptors
    unsigned n, type;
    bool transposed_a, transposed_b, accumulate;
    float scale;
    void* pc;
};
typedef std::vector<Wgmma> WgmmaGroup;
struct Accumulator { float value; unsigned pending; };  // pending: how many wgmmas still add to it

struct Thread {
    Fiber* fiber;
    Index3 index;
    unsigned id;
    uint16_t warp_epoch;  // how many __syncwarp() it has passed
    State state;
    void* pc;  // where it waits
    int predicate;  // at a barrier
    int* barrier_result;
    unsigned mask;  // at a warp operation
    void* arg;
    Collective operation;
    // For inline PTX, see runtime_ptx.h.
    CopyGroup uncommitted_copies;
    std::vector<CopyGroup> copy_groups;  // oldest first
    uint64_t proxy_fences;               // how many fence.proxy.async it has executed,
    uint32_t last_proxy_fence;           // and the barrier epoch of the last one
    WgmmaGroup uncommitted_wgmmas;
    std::vector<WgmmaGroup> wgmma_groups;
    std::unordered_map<float*, Accumulator> accumulators;
    bool wgmma_fenced;  // has it executed wgmma.fence since its last wgmma.wait_group?
};

static const size_t STACK = 256 << 10;
static const size_t GUARD = 4096;
static const size_t DYNAMIC_ALIGNMENT = 1024;

static Launch* launch;
static jmp_buf launch_env, scheduler_env;
static std::vector<Fiber*> idle_fibers;
static std::vector<Thread> threads;
static std::vector<Thread*> ready;
static std::vector<unsigned> start_order;
static Thread* current;
static uintptr_t current_stack;
static unsigned n_threads, n_started, n_waiting, n_exited, block_number;
static uint32_t barrier_epoch;
static std::vector<Region> regions;
static Region* last_region;
static char *dynamic_shared, *static_shared_low, *static_shared_high;
static size_t dynamic_capacity;
static uint64_t n_accesses;

extern "C" __attribute__((noreturn, format(printf, 2, 3))) void gpusim_fault(
    void* pc, const char* format, ...) {
    char message[300];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    launch->fault_address = (uintptr_t)pc;
    const Index3& b = gpusim_blockIdx;
    size_t room = sizeof launch->fault;
    if (current) {
        const Index3& t = current->index;
        snprintf(launch->fault, room, "%s [block (%u,%u,%u) thread (%u,%u,%u)]", message, b.x, b.y,
                 b.z, t.x, t.y, t.z);
    } else {
        snprintf(launch->fault, room, "%s [block (%u,%u,%u)]", message, b.x, b.y, b.z);
    }
    longjmp(launch_env, 1);
}

extern "C" void gpusim_trap(const char* why) {
    gpusim_fault(__builtin_return_address(0), "trap: %s", why);
}

// ---------------------------------------------------------------------------------- scheduler

static void release_barrier();
static void complete_warp_without(unsigned exited);

static void make_current(Thread* t) {
    current = t;
    current_stack = (uintptr_t)t->fiber->stack;
    gpusim_threadIdx = t->index;
}

static void wait_for_others() {
    if (!_setjmp(current->fiber->env)) _longjmp(scheduler_env, 1);
}

// A fiber runs thread after thread until one of them has to wait: a kernel without barriers is a
// plain loop, with no switch at all.
static void run_fiber() {
    for (;;) {
        launch->entry(launch->args);
        Thread* done = current;
        Fiber* fiber = done->fiber;
        done->state = EXITED;
        done->fiber = nullptr;
        n_exited++;
        if (n_waiting && n_waiting + n_exited == n_threads) release_barrier();
        complete_warp_without(done->id);
        if (ready.empty() && n_started < n_threads) {
            Thread* next = &threads[start_order[n_started++]];
            next->fiber = fiber;
            make_current(next);
            continue;
        }
        idle_fibers.push_back(fiber);
        current = nullptr;
        if (!_setjmp(fiber->env)) _longjmp(scheduler_env, 1);  // woken with another thread
    }
}

static Fiber* new_fiber() {
    Fiber* fiber = new Fiber();
    char* memory = (char*)mmap(nullptr, STACK + GUARD, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(memory, GUARD, PROT_NONE);
    fiber->stack = memory + GUARD;
    return fiber;
}

static void delete_fiber(Fiber* fiber) {
    munmap(fiber->stack - GUARD, STACK + GUARD);
    delete fiber;
}

// makecontext only for the first entry; _setjmp and _longjmp switch without system calls.
static void enter(Fiber* fiber) {
    if (fiber->started) _longjmp(fiber->env, 1);
    fiber->started = true;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = STACK;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, run_fiber, 0);
    setcontext(&fiber->context);
}

static void wake(Thread& t) {
    t.state = RUNNING;
    if (&t != current) ready.push_back(&t);
}

static void release_barrier() {
    int count = 0;
    void* pc = nullptr;
    for (Thread& t : threads) {
        if (t.state != AT_BARRIER) continue;
        if (pc && pc != t.pc)
            gpusim_fault(t.pc, "barrier divergence: threads of the block wait at different "
                               "__syncthreads()");
        pc = t.pc;
        count += t.predicate;
    }
    if (n_exited)
        gpusim_fault(pc, "barrier divergence: %u of %u threads had already returned", n_exited,
                     n_threads);
    for (unsigned i : start_order) {
        Thread& t = threads[i];
        if (t.state != AT_BARRIER) continue;
        if (t.barrier_result) *t.barrier_result = count;
        wake(t);
    }
    n_waiting = 0;
    barrier_epoch++;
}

extern "C" void gpusim_syncthreads(int predicate, int* result, void* pc) {
    current->state = AT_BARRIER;
    current->pc = pc;
    current->predicate = predicate;
    current->barrier_result = result;
    if (++n_waiting + n_exited == n_threads)
        release_barrier();
    else
        wait_for_others();
}

// Once all lanes that the mask names have arrived, the last one computes every lane's result.
static bool complete_warp(Thread& t) {
    unsigned first = t.id & ~31u, lanes = std::min(32u, n_threads - first);
    void* args[32] = {};
    for (unsigned j = 0; j < lanes; j++) {
        Thread& other = threads[first + j];
        if (!(t.mask >> j & 1) || other.state == EXITED) continue;
        if (other.state != AT_WARP_OPERATION || other.mask != t.mask) return false;
        args[j] = other.arg ? other.arg : (void*)1;
    }
    for (unsigned j = 0; j < lanes; j++) {
        Thread& other = threads[first + j];
        if (args[j] && (other.operation != t.operation || other.pc != t.pc))
            gpusim_fault(other.pc, "warp divergence: lanes meet in different warp operations");
    }
    if (t.operation) t.operation(args, t.mask);
    for (unsigned j = 0; j < lanes; j++) {
        Thread& other = threads[first + j];
        if (!args[j]) continue;
        if (!other.operation) other.warp_epoch++;  // __syncwarp orders memory, a shuffle does not
        wake(other);
    }
    return true;
}

static void complete_warp_without(unsigned exited) {
    unsigned first = exited & ~31u;
    for (unsigned i = first; i < std::min(first + 32, n_threads); i++)
        if (threads[i].state == AT_WARP_OPERATION) complete_warp(threads[i]);
}

extern "C" void gpusim_collective(unsigned mask, void* arg, Collective operation, void* pc) {
    if (!(mask >> (current->id & 31) & 1))
        gpusim_fault(pc, "warp operation: the mask %08x does not name the calling lane", mask);
    Thread& t = *current;
    t.pc = pc;
    t.state = AT_WARP_OPERATION;
    t.mask = mask;
    t.arg = arg;
    t.operation = operation;
    if (!complete_warp(t)) wait_for_others();
}

extern "C" void* gpusim_dynamic_shared() { return dynamic_shared; }

// ------------------------------------------------------------------------------ memory checker

// An access in a Cell, from the high bits down: valid, atomic (of a write) or several threads (of a
// read), in flight (of a cp.async) or several warps, several blocks, then block 24, thread 10,
// barrier epoch 13, warp epoch 13.
static const uint64_t VALID = 1ull << 63, ATOMIC = 1ull << 62, THREADS = 1ull << 62,
                      IN_FLIGHT = 1ull << 61, WARPS = 1ull << 61, BLOCKS = 1ull << 60;

static uint64_t pack() {
    return VALID | (uint64_t)(block_number & 0xFFFFFF) << 36 | (uint64_t)current->id << 26
           | (uint64_t)(barrier_epoch & 8191) << 13 | (current->warp_epoch & 8191);
}
static unsigned block_of(uint64_t a) { return a >> 36 & 0xFFFFFF; }
static unsigned thread_of(uint64_t a) { return a >> 26 & 1023; }
static unsigned warp_of(uint64_t a) { return thread_of(a) / 32; }
static unsigned barriers_before(uint64_t a) { return a >> 13 & 8191; }
static unsigned syncwarps_before(uint64_t a) { return a & 8191; }

// Are two accesses of one block without a barrier between them?
static bool unordered(uint64_t a, uint64_t b) {
    return barriers_before(a) == barriers_before(b)
           && (warp_of(a) != warp_of(b) || syncwarps_before(a) == syncwarps_before(b));
}

static __attribute__((noreturn)) void race(const Region& r, uintptr_t a, void* pc,
                                           const char* what, uint64_t other, bool other_block) {
    size_t byte = a - r.low;
    if (other_block)
        gpusim_fault(pc, "data race between blocks on %s (byte %zu): %s by block #%u thread #%u in "
                         "the same launch", r.name, byte, what, block_of(other), thread_of(other));
    gpusim_fault(pc, "data race on %s (byte %zu): %s by thread #%u with no %s in between", r.name,
                 byte, what, thread_of(other),
                 warp_of(other) == current->id / 32 ? "__syncwarp() or __syncthreads()"
                                                    : "__syncthreads()");
}

static void check_races(Region& r, uintptr_t a, unsigned size, bool write, bool atomic, void* pc) {
    const uint64_t me = pack();
    const bool between_blocks = r.kind == GLOBAL;
    for (size_t i = (a - r.low) >> r.shift; i <= (a + size - 1 - r.low) >> r.shift; i++) {
        uint64_t& written = r.cells[i].last_write;
        uint64_t& read = r.cells[i].last_read;
        bool written_here = (written & VALID) && block_of(written) == block_of(me);
        bool read_here = (read & VALID) && block_of(read) == block_of(me);
        bool both_atomic = atomic && (written & ATOMIC);
        const char* what = write ? "also written" : "written";

        if (written_here && (written & IN_FLIGHT))
            gpusim_fault(pc, "%s of %s (byte %zu) while a cp.async of thread #%u to it is in "
                             "flight: cp.async.wait_group missing or too early",
                         write ? "write" : "read", r.name, (size_t)(a - r.low),
                         thread_of(written));
        if (written_here && thread_of(written) != thread_of(me) && !both_atomic
            && unordered(written, me))
            race(r, a, pc, what, written, false);
        if (!written_here && (written & VALID) && between_blocks && !both_atomic)
            race(r, a, pc, what, written, true);
        if (r.kind == SHARED && !written_here && (atomic || !write))
            gpusim_fault(pc, "read of uninitialised %s memory (byte %zu)", r.name,
                         (size_t)(a - r.low));
        if (write) {
            if ((read & VALID) && between_blocks && (!read_here || (read & BLOCKS)))
                race(r, a, pc, "read", read, true);
            if (read_here && barriers_before(read) == barriers_before(me)) {
                bool other_thread = thread_of(read) != thread_of(me) || (read & THREADS);
                if ((read & WARPS) || warp_of(read) != warp_of(me)
                    || (other_thread && syncwarps_before(read) == syncwarps_before(me)))
                    race(r, a, pc, "read", read, false);
            }
            written = me | (atomic ? ATOMIC : 0);
            r.cells[i].proxy_fences = current->proxy_fences;
        } else {
            // One word stands for all readers so far: the last one, and whether there were others.
            uint64_t others = 0;
            if (read & VALID) others = read_here ? read & BLOCKS : BLOCKS;
            if (read_here && barriers_before(read) == barriers_before(me)) {
                bool same_epoch = syncwarps_before(read) == syncwarps_before(me);
                others |= read & (WARPS | (same_epoch ? THREADS : 0));
                if (warp_of(read) != warp_of(me))
                    others |= WARPS;
                else if (thread_of(read) != thread_of(me) && same_epoch)
                    others |= THREADS;
            }
            read = me | others;
        }
    }
}

static __attribute__((noreturn)) void out_of_bounds(uintptr_t a, unsigned size, bool write,
                                                    void* pc) {
    const char* what = write ? "write" : "read";
    if (a < 4096) gpusim_fault(pc, "%s of %u bytes through a null pointer", what, size);
    const Region* nearest = nullptr;
    size_t distance = SIZE_MAX;
    bool after = false;
    for (const Region& r : regions) {
        if (r.kind == MODULE) continue;
        size_t d = a < r.low ? r.low - a : a + size - r.high;
        if (d < distance) distance = d, nearest = &r, after = a >= r.low;
    }
    if (nearest && distance < 1ull << 40)
        gpusim_fault(pc, "out-of-bounds %s of %u bytes: %zu bytes %s of %s (%zu bytes)", what, size,
                     distance, after ? "past the end" : "before the start", nearest->name,
                     (size_t)(nearest->high - nearest->low));
    gpusim_fault(pc, "out-of-bounds %s of %u bytes at %p", what, size, (void*)a);
}

static inline Region* region_of(uintptr_t a, unsigned size) {
    Region* r = last_region;
    if (r && a >= r->low && a + size <= r->high) return r;
    auto found = std::find_if(regions.begin(), regions.end(), [&](const Region& q) {
        return a >= q.low && a + size <= q.high; });
    if (found == regions.end()) return nullptr;
    // The module's region holds the static shared one: remembered, it would hide its races.
    if (found->kind != MODULE) last_region = &*found;
    return &*found;
}

static inline __attribute__((always_inline)) void check_access(uintptr_t a, unsigned size,
                                                               bool write, bool atomic,
                                                               bool natural, void* pc) {
    if (!current || a - current_stack < STACK) return;  // the thread's own locals
    if (!launch->checked) return;
    if (++n_accesses > launch->max_accesses)
        gpusim_fault(pc, "%llu memory accesses: an endless loop?", (unsigned long long)n_accesses);
    Region* r = region_of(a, size);
    if (!r) out_of_bounds(a, size, write, pc);
    if (natural && a % size)
        gpusim_fault(pc, "misaligned %s of %u bytes of %s", write ? "write" : "read", size,
                     r->name);
    if (write && !r->writable)
        gpusim_fault(pc, "write to %s, which the kernel declares const", r->name);
    if (r->cells) check_races(*r, a, size, write, atomic, pc);
}

#define PC __builtin_return_address(0)

extern "C" void gpusim_access(const void* p, unsigned size, bool write, bool atomic, void* pc) {
    check_access((uintptr_t)p, size, write, atomic, true, pc);
}

#define HOOK(name, size, write, natural) \
    extern "C" void __tsan_##name##size(void* p) { \
        check_access((uintptr_t)p, size, write, false, natural, PC); }
#define HOOKS(size) \
    HOOK(read, size, false, true) HOOK(write, size, true, true) \
    HOOK(unaligned_read, size, false, false) HOOK(unaligned_write, size, true, false) \
    HOOK(volatile_read, size, false, true) HOOK(volatile_write, size, true, true)
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)

extern "C" {
void __tsan_read_range(void* p, size_t n) { check_access((uintptr_t)p, n, false, false, false, PC); }
void __tsan_write_range(void* p, size_t n) { check_access((uintptr_t)p, n, true, false, false, PC); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
}

// UBSan hands each handler a block that begins with file, line and column; the line is found from
// the return address as for every other fault.
#define UNDEFINED(name, text) \
    extern "C" void __ubsan_handle_##name##_abort() { gpusim_fault(PC, text); }
UNDEFINED(add_overflow, "signed integer overflow in +")
UNDEFINED(sub_overflow, "signed integer overflow in -")
UNDEFINED(mul_overflow, "signed integer overflow in *")
UNDEFINED(negate_overflow, "signed integer overflow in unary -")
UNDEFINED(divrem_overflow, "integer division by zero or overflow")
UNDEFINED(shift_out_of_bounds, "shift out of range")
UNDEFINED(out_of_bounds, "index out of the bounds of a fixed-size array")
UNDEFINED(type_mismatch_v1, "misaligned or null pointer")
UNDEFINED(float_cast_overflow, "float to integer conversion out of range")
UNDEFINED(load_invalid_value, "invalid bool value")
extern "C" void __ubsan_handle_builtin_unreachable() { gpusim_fault(PC, "unreachable code"); }

#include "runtime_ptx.h"

// -------------------------------------------------------------------------------------- launch

static void start_block(char* shared_low, char* shared_high) {
    n_started = n_waiting = n_exited = barrier_epoch = 0;
    ready.clear();
    current = nullptr;
    for (unsigned i = 0; i < n_threads; i++) {
        Thread& t = threads[i] = Thread();
        t.id = i;
        t.index = {i % launch->block[0], i / launch->block[0] % launch->block[1],
                   i / launch->block[0] / launch->block[1]};
    }
    // Shared memory starts as garbage, here NaN.
    if (shared_low) memset(shared_low, 0xFF, shared_high - shared_low);
    if (launch->dynamic_shared) memset(dynamic_shared, 0xFF, launch->dynamic_shared);
}

static __attribute__((noreturn)) void deadlock() {
    unsigned at_barrier = 0, at_warp = 0;
    void* pc = nullptr;
    for (Thread& t : threads) {
        at_barrier += t.state == AT_BARRIER;
        at_warp += t.state == AT_WARP_OPERATION;
        if (t.state == AT_WARP_OPERATION || (t.state == AT_BARRIER && !pc)) pc = t.pc;
    }
    current = nullptr;
    gpusim_fault(pc, "deadlock: %u threads wait at __syncthreads(), %u in a warp operation, %u "
                     "have returned", at_barrier, at_warp, n_exited);
}

static void run_block() {
    static size_t next;  // static: it must survive the _longjmp back to the line below
    next = 0;
    _setjmp(scheduler_env);  // every wait comes back here
    if (next < ready.size()) {
        Thread* t = ready[next++];
        if (next == ready.size()) ready.clear(), next = 0;
        make_current(t);
        enter(t->fiber);
    } else if (n_started < n_threads) {
        Thread* t = &threads[start_order[n_started++]];
        if (idle_fibers.empty()) idle_fibers.push_back(new_fiber());
        t->fiber = idle_fibers.back();
        idle_fibers.pop_back();
        make_current(t);
        enter(t->fiber);
    } else if (n_exited < n_threads) {
        deadlock();
    }
}

static size_t cell_bytes(const Region& r) {
    return (((r.high - r.low) >> r.shift) + 1) * sizeof(Cell);
}

// Returns 0, or 1 after a fault, which it describes in l.
extern "C" int gpusim_launch(Launch* l, char* shared_low, char* shared_high, uintptr_t module_low,
                             uintptr_t module_high, uint32_t shared_shift) {
    launch = l;
    l->fault[0] = 0;
    l->fault_address = 0;
    n_accesses = 0;
    n_threads = l->block[0] * l->block[1] * l->block[2];
    gpusim_blockDim = {l->block[0], l->block[1], l->block[2]};
    gpusim_gridDim = {l->grid[0], l->grid[1], l->grid[2]};
    if (l->dynamic_shared > dynamic_capacity) {
        free(dynamic_shared);
        dynamic_capacity = (l->dynamic_shared / DYNAMIC_ALIGNMENT + 1) * DYNAMIC_ALIGNMENT;
        dynamic_shared = (char*)aligned_alloc(DYNAMIC_ALIGNMENT, dynamic_capacity);
    }
    static_shared_low = shared_low;
    static_shared_high = shared_high;
    regions.assign(l->regions, l->regions + l->n_regions);
    last_region = nullptr;
    if (shared_high > shared_low)
        regions.push_back({(uintptr_t)shared_low, (uintptr_t)shared_high, shared_shift, 1,
                           "static __shared__", nullptr, SHARED});
    if (l->dynamic_shared)
        regions.push_back({(uintptr_t)dynamic_shared, (uintptr_t)dynamic_shared + l->dynamic_shared,
                           shared_shift, 1, "dynamic shared", nullptr, SHARED});
    // Only what is written can race. The cells of huge arrays cost address space, not memory.
    for (Region& r : regions)
        if (r.writable && l->checked)
            r.cells = (Cell*)mmap(nullptr, cell_bytes(r), PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    regions.push_back({module_low, module_high, 0, 1, "module data", nullptr, MODULE});
    threads.assign(n_threads, Thread());
    start_order.resize(n_threads);
    for (unsigned i = 0; i < n_threads; i++)
        start_order[i] = l->order == DESCENDING ? n_threads - 1 - i : i;
    unsigned n_blocks = l->grid[0] * l->grid[1] * l->grid[2];
    volatile int failed = 0;
    if (_setjmp(launch_env) == 0) {
        std::mt19937 random(l->seed);
        for (unsigned b = 0; b < n_blocks; b++) {
            block_number = l->order == DESCENDING ? n_blocks - 1 - b : b;
            if (l->order == SHUFFLED) std::shuffle(start_order.begin(), start_order.end(), random);
            gpusim_blockIdx = {block_number % l->grid[0], block_number / l->grid[0] % l->grid[1],
                               block_number / l->grid[0] / l->grid[1]};
            start_block(shared_low, shared_high);
            run_block();
        }
    } else {  // a fault: fibers in the middle of a kernel are dropped with their stacks
        failed = 1;
        for (Thread& t : threads)
            if (t.fiber) delete_fiber(t.fiber), t.fiber = nullptr;
    }
    current = nullptr;
    for (Region& r : regions)
        if (r.cells) munmap(r.cells, cell_bytes(r));
    return failed;
}
