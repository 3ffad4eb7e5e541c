// Memory that a caller gives, in parts.
#pragma once

#include <cstdint>

class Arena {
  public:
    // Without memory it only counts.
    explicit Arena(float* memory) : next_(memory) {}

    template <class T>
    T* take(int64_t count) {
        const int64_t floats = (count * int64_t(sizeof(T)) + LINE - 1) / LINE * (LINE / 4);
        T* here = reinterpret_cast<T*>(next_);
        if (next_) next_ += floats;
        used_ += floats;
        return here;
    }

    int64_t used() const { return used_; }  // floats

  private:
    static constexpr int64_t LINE = 128;  // bytes: no two parts share a line of the cache
    float* next_;
    int64_t used_ = 0;
};
