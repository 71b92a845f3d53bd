// A thread pool for one parallel region at a time. A region is a sequence of phases, a phase a number of tasks; it is
// over when its tasks are done, not when every thread has come by. So a thread that the system does not let run holds up
// nobody, unless it holds a task.
//
// Every thread first takes the tasks of a range of its own, in order, and then what is left of the others'. Neighbouring
// tasks read neighbouring weights, and a processor fetches ahead only of a core that reads on: two cores that take every
// other piece of 18 KB read half as fast as two that read a half each (24 and 55 GB/s on a Zen 4).
//
// Own threads instead of OpenMP: torch brings its own OpenMP runtime, and a second one beside it would keep twice as
// many threads spinning as there are cores.
#pragma once
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>

#include "interface.hpp"

namespace specdec {

struct alignas(64) Counter {
    std::atomic<int64_t> value;
};

struct Team {
    int threads;
    Counter* done;   // [phases] tasks that are done
    Counter* taken;  // [phases, threads] tasks taken from each thread's range
    std::atomic<int64_t>* reached;  // all phases before this one are over
};

// One thread's place in a region. Every thread walks through the same phases.
struct Member {
    Team& team;
    int thread;
    int64_t phase;
    int64_t* spent = nullptr;  // [NUM_WORKS], where its time is measured
    int64_t since = 0;
};

inline int64_t nanoseconds() {
    return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Where time is measured, what has passed since the last call went into `work`.
inline void spend(Member& me, Work work) {
    if (me.spent == nullptr) return;
    const int64_t now = nanoseconds();
    me.spent[work] += now - me.since;
    me.since = now;
}

void wait_for(const Counter& done, int64_t tasks);

// Runs `function(task)` for all tasks of the next phase, shared among the team; returns when all of them are done.
template <class Function>
inline void each(Member& me, Work work, int64_t tasks, Function function) {
    if (me.team.threads == 1) {
        for (int64_t task = 0; task < tasks; ++task) function(task);
        return spend(me, work);
    }
    const int64_t index = me.phase++;
    if (index < me.team.reached->load(std::memory_order_acquire)) return;
    const int threads = me.team.threads;
    int64_t finished = 0;
    for (int turn = 0; turn < threads; ++turn) {
        const int owner = (me.thread + turn) % threads;
        std::atomic<int64_t>& taken = me.team.taken[index * threads + owner].value;
        const int64_t end = tasks * (owner + 1) / threads;
        for (;;) {
            const int64_t task = tasks * owner / threads + taken.fetch_add(1, std::memory_order_relaxed);
            if (task >= end) break;
            function(task);
            ++finished;
        }
    }
    spend(me, work);
    Counter& done = me.team.done[index];
    if (finished != 0) done.value.fetch_add(finished, std::memory_order_acq_rel);
    if (done.value.load(std::memory_order_acquire) != tasks) wait_for(done, tasks);
    spend(me, WAIT);
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
