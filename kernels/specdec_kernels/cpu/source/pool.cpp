#include "pool.hpp"

#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <sched.h>
#include <unistd.h>

namespace specdec {
namespace {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A phase lasts 5 to 500 microseconds, so a waiting thread spins for about 50; longer waits mean that a thread was
// interrupted, and then its core is better given away.
constexpr int SPINS = 1500;

// The gate to the current region: its number, whether it is open, and how many workers are inside.
constexpr uint64_t OPEN = 1u << 15, INSIDE = OPEN - 1, REGION = 1u << 16;

struct Pool {
    std::mutex mutex;
    std::condition_variable wake;
    std::vector<std::thread> workers;
    std::unique_ptr<Counter[]> counters;
    int64_t num_counters = 0;
    std::atomic<uint64_t> gate{0};
    std::atomic<int64_t> reached{0};
    Team team{};
    Body body = nullptr;
    void* context = nullptr;

    bool news(uint64_t seen) const {
        const uint64_t now = gate.load(std::memory_order_acquire);
        return (now & OPEN) != 0 && now / REGION != seen;
    }

    void work(int thread, uint64_t seen) {
        for (;;) {
            for (int spin = 0; spin < SPINS && !news(seen); ++spin) relax();
            if (!news(seen)) {
                std::unique_lock<std::mutex> lock(mutex);
                wake.wait(lock, [&] { return news(seen); });
            }
            // Whoever is inside keeps the region's data alive; one that comes too late finds the gate closed.
            uint64_t now = gate.load(std::memory_order_acquire);
            while ((now & OPEN) != 0 && !gate.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) {
            }
            if ((now & OPEN) == 0) continue;
            seen = now / REGION;
            if (thread < team.threads) {
                Member me{team, thread, 0};
                body(context, me);
            }
            gate.fetch_sub(1, std::memory_order_release);
        }
    }

    void run(int threads, int64_t count, Body function, void* argument) {
        const int64_t needed = count * (1 + threads);
        if (needed > num_counters) {
            counters.reset(new Counter[static_cast<std::size_t>(needed)]);
            num_counters = needed;
        }
        for (int64_t i = 0; i < needed; ++i) counters[i].value.store(0, std::memory_order_relaxed);
        reached.store(0, std::memory_order_relaxed);
        const uint64_t region = gate.load(std::memory_order_relaxed) / REGION;
        while (static_cast<int>(workers.size()) < threads - 1) {
            const int thread = static_cast<int>(workers.size()) + 1;
            workers.emplace_back([this, thread, region] { work(thread, region); });
        }
        team = Team{threads, counters.get(), counters.get() + count, &reached};
        body = function;
        context = argument;
        {
            std::lock_guard<std::mutex> lock(mutex);
            gate.store((region + 1) * REGION | OPEN, std::memory_order_release);
        }
        wake.notify_all();
        Member me{team, 0, 0};
        function(argument, me);
        uint64_t now = gate.fetch_and(~OPEN, std::memory_order_acq_rel);
        for (int spin = 0; (now & INSIDE) != 0; ++spin) {
            if (spin < SPINS) relax();
            else sched_yield();
            now = gate.load(std::memory_order_acquire);
        }
    }
};

// Never destroyed: its threads run until the process ends.
Pool* pool = nullptr;
pid_t owner = 0;
std::mutex* region_mutex = new std::mutex;
void* memory = nullptr;
std::size_t memory_bytes = 0;

}  // namespace

void wait_for(const Counter& done, int64_t tasks) {
    for (int spin = 0; done.value.load(std::memory_order_acquire) != tasks; ++spin) {
        if (spin < SPINS) relax();
        else sched_yield();
    }
}

void lock_region() {
    if (owner != 0 && owner != getpid()) {
        // A fork copies no threads, and maybe a locked mutex: what the parent had is left behind.
        region_mutex = new std::mutex;
        pool = nullptr;
        owner = getpid();
    }
    region_mutex->lock();
}

void unlock_region() { region_mutex->unlock(); }

void run_parallel(int threads, int64_t phases, Body body, void* context) {
    if (threads <= 1) {
        Team team{1, nullptr, nullptr, nullptr};
        Member alone{team, 0, 0};
        body(context, alone);
        return;
    }
    if (pool == nullptr) {
        pool = new Pool;
        owner = getpid();
    }
    pool->run(threads, phases, body, context);
}

void* workspace(std::size_t bytes) {
    if (bytes > memory_bytes) {
        std::free(memory);
        bytes += bytes / 4;
        bytes = (bytes + 4095) / 4096 * 4096;
        memory = std::aligned_alloc(4096, bytes);
        memory_bytes = memory == nullptr ? 0 : bytes;
        if (memory != nullptr) std::memset(memory, 0, bytes);
    }
    return memory;
}

}  // namespace specdec
