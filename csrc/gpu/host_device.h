// Functions for the CPU and the GPU alike, in files that g++ compiles too.
#pragma once

#ifdef __CUDACC__
#define COMMFUSE_HOST_DEVICE __host__ __device__
#else
#define COMMFUSE_HOST_DEVICE
#endif
