// A kernel that takes so many cycles of the clock: what is launched meanwhile waits in line, and is
// done without a gap.

#include "device.cuh"

template <class T>
__global__ void spin(T cycles) {
    const T start = clock64();
    while (clock64() - start < cycles) {}
}
