// A thread pool for one parallel region at a time. A region is a sequence of phases, a phase a number of tasks that
// are handed out one by one; it is over when its tasks are done, not when every thread has come by. So a thread that
// the system does not let run holds up nobody, unless it holds a task.
//
// Own threads instead of OpenMP: torch brings its own OpenMP runtime, and a second one beside it would keep twice as
// many threads spinning as there are cores.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace specdec {

struct alignas(64) Phase {
    std::atomic<int64_t> next;
    std::atomic<int64_t> done;
};

struct Team {
    int threads;
    Phase* phases;
    std::atomic<int64_t>* reached;  // all phases before this one are over
};

// One thread's place in a region. Every thread walks through the same phases.
struct Member {
    Team& team;
    int thread;
    int64_t phase;
};

void wait_for(const Phase& phase, int64_t tasks);

// Runs `function(task)` for all tasks of the next phase, shared among the team; returns when all of them are done.
template <class Function>
inline void each(Member& me, int64_t tasks, Function function) {
    if (me.team.threads == 1) {
        for (int64_t task = 0; task < tasks; ++task) function(task);
        return;
    }
    const int64_t index = me.phase++;
    if (index < me.team.reached->load(std::memory_order_acquire)) return;
    Phase& phase = me.team.phases[index];
    int64_t finished = 0;
    for (;;) {
        const int64_t task = phase.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= tasks) break;
        function(task);
        ++finished;
    }
    if (finished != 0) phase.done.fetch_add(finished, std::memory_order_acq_rel);
    if (phase.done.load(std::memory_order_acquire) != tasks) wait_for(phase, tasks);
    // Racing threads may set it back by a phase or two, which costs a late one a few looks at phases that are over.
    me.team.reached->store(index + 1, std::memory_order_release);
}

using Body = void (*)(void* context, Member& me);

// Runs `body` on up to `threads` threads, the caller's among them, through at most `phases` phases.
// For one caller at a time: between lock_region and unlock_region.
void run_parallel(int threads, int64_t phases, Body body, void* context);

// Zeroed memory of at least `bytes`, kept between regions, or null; between lock_region and unlock_region.
void* workspace(std::size_t bytes);

void lock_region();
void unlock_region();

}  // namespace specdec
