// Threads that share work, and meet.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

class Barrier {
  public:
    explicit Barrier(int count) : count_(count) {}
    void wait() {
        if (count_ == 1) return;
        const int turn = turn_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
            if (spins > 4000) std::this_thread::yield();  // more threads than free cores
#if defined(__x86_64__)
            else __builtin_ia32_pause();
#endif
        }
    }

  private:
    const int count_;
    std::atomic<int> arrived_{0}, turn_{0};
};

struct Range {
    int64_t begin, end;
};

inline Range part(int64_t count, int64_t thread, int64_t threads) {
    return {count * thread / threads, count * (thread + 1) / threads};
}

// The process's OpenMP threads, by the interface of GNU's runtime, which others offer too. Those of
// torch wait at work: threads beside them would share their cores.
struct Pool {
    void (*parallel)(void (*work)(void*), void* data, unsigned count, unsigned flags) = nullptr;
    int (*thread)() = nullptr;
    int (*count)() = nullptr;
};
inline Pool pool;

extern "C" inline __attribute__((used, visibility("default"))) void hrm_use_pool(
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned), int (*thread)(), int (*count)()) {
    pool = {parallel, thread, count};
}

// Calls work(thread) for 0 to count - 1, each on a thread of its own, and waits for all.
template <class Work>
void on_threads(int64_t count, const Work& work) {
    if (count == 1) {
        work(0);
        return;
    }
    if (pool.parallel) {
        struct Task {
            const Work* work;
            int64_t count;
            bool is_done;
        } task{&work, count, false};
        pool.parallel(
            [](void* data) {
                Task& mine = *static_cast<Task*>(data);
                if (pool.count() != mine.count) return;  // all see the same: none has begun
                (*mine.work)(pool.thread());
                if (pool.thread() == 0) mine.is_done = true;
            },
            &task, unsigned(count), 0);
        if (task.is_done) return;
    }
    std::vector<std::thread> others;
    for (int64_t thread = 1; thread < count; ++thread) others.emplace_back(work, thread);
    work(0);
    for (auto& other : others) other.join();
}
