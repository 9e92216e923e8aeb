// Work shared by the threads of torch's own OpenMP runtime, so that no second pool waits beside torch's.
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel
using Barrier = void (*)();                                             // GOMP_barrier

static Parallel parallel_region = nullptr;
static Barrier region_barrier = nullptr;

extern "C" void set_team(Parallel region, Barrier barrier) { parallel_region = region, region_barrier = barrier; }

// Threads in one parallel region. `share` hands out the items of a phase, one after the other to whoever is free, and
// returns when all are done. What an item computes must not depend on the thread.
struct Team {
    std::atomic<int64_t>* counters;  // one per phase, zero at the start
    Barrier barrier;                 // null: one thread

    template <class F>
    void share(int64_t items, F f) {
        if (!barrier) {
            for (int64_t i = 0; i < items; i++) f(i);
            return;
        }
        for (int64_t i; (i = counters->fetch_add(1, std::memory_order_relaxed)) < items;) f(i);
        counters++;
        barrier();
    }
};

// Calls work(team) by `threads` threads; it may call Team::share `phases` times.
template <class Work>
static void in_parallel(int64_t phases, int64_t threads, Work work) {
    if (threads < 2 || !parallel_region) return work(Team{nullptr, nullptr});
    std::vector<std::atomic<int64_t>> counters(phases);
    struct Job {
        Work& work;
        const Team team;
    } job{work, {counters.data(), region_barrier}};
    auto body = [](void* p) { static_cast<Job*>(p)->work(static_cast<Job*>(p)->team); };
    parallel_region(body, &job, unsigned(threads), 0);
}
