/* A GPU that computes nothing: the calls that PyTorch makes to the CUDA runtime, the driver, cuBLAS
 * and NCCL, answered on the host. Device memory is address space, counted and never touched by
 * kernels; launches are counted by name and left out. bench/null_gpu.py builds it and says what for.
 *
 *   NULL_GPU_GIB    memory of a device, 139 by default
 *   NULL_GPU_COUNT  devices, 1 by default
 *
 * Preloaded, these definitions come before the libraries' own; as libcuda.so.1 they stand in for the
 * driver too. Written against the headers of CUDA 12 and 13.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define API __attribute__((visibility("default")))
/* A function under the name that the libraries ask for, free of the type that a header gives it. */
#define AS(name) __asm__(#name)

/* ---- what bench/null_gpu.py reads */

API uint64_t null_gpu_launches, null_gpu_products, null_gpu_copies, null_gpu_collectives;
API uint64_t null_gpu_waits;  /* of the host for the device */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static FILE *names;  /* a line for each launch, product and copy, while it is open */

API void null_gpu_names(const char *path) {
    pthread_mutex_lock(&lock);
    if (names) fclose(names);
    names = path ? fopen(path, "w") : NULL;
    pthread_mutex_unlock(&lock);
}

static void count(uint64_t *counter, const char *name) {
    pthread_mutex_lock(&lock);
    ++*counter;
    if (names) fprintf(names, "%s\n", name);
    pthread_mutex_unlock(&lock);
}

/* ---- memory */

#define PAGE 4096
typedef struct Block { char *start; size_t size; int pinned, counted; struct Block *next; } Block;
static Block *blocks;
static uint64_t used = 512ull << 20;  /* a context and its modules take about that */
static __thread cudaError_t last_error;

static uint64_t capacity(void) {
    const char *gib = getenv("NULL_GPU_GIB");
    return (uint64_t)((gib ? atof(gib) : 139.0) * (1ull << 30));
}

static int take(size_t size) {  /* whether so much is left */
    pthread_mutex_lock(&lock);
    int fits = used + size <= capacity();
    if (fits) used += size;
    pthread_mutex_unlock(&lock);
    return fits;
}

static void give(size_t size) {
    pthread_mutex_lock(&lock);
    used -= size;
    pthread_mutex_unlock(&lock);
}

static void *reserve(size_t size, int pinned, int counted) {
    size_t pages = size ? (size + PAGE - 1) / PAGE * PAGE : PAGE;
    char *start = mmap(NULL, pages, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return NULL;
    Block *block = malloc(sizeof *block);
    *block = (Block){start, size, pinned, counted, NULL};
    pthread_mutex_lock(&lock);
    block->next = blocks;
    blocks = block;
    pthread_mutex_unlock(&lock);
    return start;
}

static void release(void *start) {
    pthread_mutex_lock(&lock);
    for (Block **at = &blocks; *at; at = &(*at)->next)
        if ((*at)->start == start) {
            Block *block = *at;
            *at = block->next;
            if (block->counted) used -= block->size;
            munmap(start, block->size ? (block->size + PAGE - 1) / PAGE * PAGE : PAGE);
            free(block);
            break;
        }
    pthread_mutex_unlock(&lock);
}

enum { FOREIGN, PINNED, DEVICE };
static int kind_of(const void *address) {
    int kind = FOREIGN;
    pthread_mutex_lock(&lock);
    for (Block *block = blocks; block && kind == FOREIGN; block = block->next)
        if ((char *)address >= block->start && (char *)address < block->start + block->size)
            kind = block->pinned ? PINNED : DEVICE;
    pthread_mutex_unlock(&lock);
    return kind;
}

API cudaError_t cudaMalloc(void **out, size_t size) {
    *out = take(size) ? reserve(size, 0, 1) : NULL;
    return last_error = *out ? cudaSuccess : cudaErrorMemoryAllocation;
}
API cudaError_t cudaFree(void *p) { release(p); return cudaSuccess; }
API cudaError_t cudaHostAlloc(void **out, size_t size, unsigned flags) {
    *out = reserve(size, 1, 0);
    return *out ? cudaSuccess : cudaErrorMemoryAllocation;
}
API cudaError_t cudaFreeHost(void *p) { release(p); return cudaSuccess; }
API cudaError_t cudaMemGetInfo(size_t *left, size_t *total) {
    *total = capacity();
    *left = *total - used;
    return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *p) {
    int kind = kind_of(p);
    memset(out, 0, sizeof *out);
    out->type = kind == DEVICE ? cudaMemoryTypeDevice
              : kind == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    out->devicePointer = (void *)p;
    out->hostPointer = kind == PINNED ? (void *)p : NULL;
    return cudaSuccess;
}

/* Bytes move between host and device. Within the device they would only fill the host's memory. */
API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                                cudaStream_t stream) {
    int inside = kind_of(to) == DEVICE && kind_of(from) == DEVICE;
    count(&null_gpu_copies, inside ? "copy on the device" : "copy");
    if (!inside) memcpy(to, from, size);
    return cudaSuccess;
}
API cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    null_gpu_waits++;
    return cudaMemcpyAsync(to, from, size, kind, NULL);
}
API cudaError_t cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t stream) {
    count(&null_gpu_launches, "memset");
    if (size <= PAGE) memset(p, value, size);  /* flags, which the host may read */
    return cudaSuccess;
}
API cudaError_t cudaMemset(void *p, int value, size_t size) {
    return cudaMemsetAsync(p, value, size, NULL);
}

/* The driver's way, for expandable segments: addresses first, memory later. */
API int null_granularity(size_t *out) AS(cuMemGetAllocationGranularity);
API int null_granularity(size_t *out) { *out = 2 << 20; return 0; }
API int null_address(void **out, size_t size) AS(cuMemAddressReserve);
API int null_address(void **out, size_t size) { *out = reserve(size, 0, 0); return *out ? 0 : 2; }
API int null_address_free(void *p) AS(cuMemAddressFree);
API int null_address_free(void *p) { release(p); return 0; }
API int null_create(size_t **out, size_t size) AS(cuMemCreate);
API int null_create(size_t **out, size_t size) {
    if (!take(size)) return CUDA_ERROR_OUT_OF_MEMORY;
    *out = malloc(sizeof size);
    **out = size;
    return 0;
}
API int null_release(size_t *size) AS(cuMemRelease);
API int null_release(size_t *size) { give(*size); free(size); return 0; }

/* ---- the device: figures of an H200 */

static int attribute(int which) {
    switch (which) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrL2CacheSize: return 60 << 20;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 3201000;
    case cudaDevAttrGlobalMemoryBusWidth: return 6144;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrConcurrentKernels: return 1;
    default: return 0;
    }
}

static int num_devices(void) {
    const char *number = getenv("NULL_GPU_COUNT");
    return number ? atoi(number) : 1;
}

static __thread int current;
API cudaError_t cudaGetDeviceCount(int *out) { *out = num_devices(); return cudaSuccess; }
API cudaError_t cudaGetDevice(int *out) { *out = current; return cudaSuccess; }
API cudaError_t cudaSetDevice(int device) { current = device; return cudaSuccess; }
API cudaError_t cudaDriverGetVersion(int *out) { *out = CUDART_VERSION; return cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int *out) { *out = CUDART_VERSION; return cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int *out, enum cudaDeviceAttr which, int device) {
    *out = attribute(which);
    return cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "null GPU, sm_90");
    p->uuid.bytes[0] = p->pciBusID = device + 1;
    p->totalGlobalMem = capacity();
    p->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    p->reservedSharedMemPerBlock = attribute(cudaDevAttrReservedSharedMemoryPerBlock);
    p->regsPerBlock = p->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerBlock);
    p->warpSize = attribute(cudaDevAttrWarpSize);
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    p->maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
    p->maxGridSize[0] = attribute(cudaDevAttrMaxGridDimX);
    p->maxGridSize[1] = p->maxGridSize[2] = attribute(cudaDevAttrMaxGridDimY);
    p->major = attribute(cudaDevAttrComputeCapabilityMajor);
    p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
    p->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
    p->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
    p->textureAlignment = 512;
    p->concurrentKernels = p->unifiedAddressing = p->streamPrioritiesSupported = 1;
    p->cooperativeLaunch = p->clusterLaunch = 1;
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char *out, int size, int device) {
    snprintf(out, size, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int *out, int a, int b) { *out = 0; return cudaSuccess; }
API cudaError_t cudaDeviceSynchronize(void) { null_gpu_waits++; return cudaSuccess; }
API cudaError_t cudaPeekAtLastError(void) { return last_error; }
API cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
API const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "error of the null GPU";
}
API const char *cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown";
}

/* ---- streams and events: all is done at once */

typedef struct { double seconds; int priority; } Mark;
static void *mark(int priority) {
    Mark *made = calloc(1, sizeof *made);
    made->priority = priority;
    return made;
}
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int priority) {
    *out = mark(priority);
    return cudaSuccess;
}
API cudaError_t cudaStreamCreate(cudaStream_t *out) { *out = mark(0); return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *out) {
    *out = stream ? ((Mark *)stream)->priority : 0;
    return cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) { null_gpu_waits++; return cudaSuccess; }
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *out) {
    *out = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
API int null_capture_12(void *stream, int *status) AS(cudaStreamGetCaptureInfo_v2);
API int null_capture_12(void *stream, int *status) { *status = 0; return 0; }
API int null_capture_13(void *stream, int *status) AS(cudaStreamGetCaptureInfo);
API int null_capture_13(void *stream, int *status) { *status = 0; return 0; }
API cudaError_t cudaEventCreate(cudaEvent_t *out) { *out = mark(0); return cudaSuccess; }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
    *out = mark(0);
    return cudaSuccess;
}
API cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    ((Mark *)event)->seconds = t.tv_sec + 1e-9 * t.tv_nsec;
    return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}
API cudaError_t cudaEventSynchronize(cudaEvent_t event) { null_gpu_waits++; return cudaSuccess; }
API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
    *ms = 1e3 * (((Mark *)end)->seconds - ((Mark *)start)->seconds);
    return cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *data) {
    call(data);
    return cudaSuccess;
}

/* ---- kernels */

typedef struct { const void *function; char name[200]; } Kernel;
#define SLOTS (1u << 18)
static Kernel *kernels[SLOTS];  /* open addressing by the function's address */

static Kernel *kernel_of(const void *function) {
    unsigned at = (unsigned)(((uintptr_t)function >> 3) * 0x9E3779B97F4A7C15ull >> 46);
    while (kernels[at] && kernels[at]->function != function) at = (at + 1) % SLOTS;
    if (!kernels[at]) {
        kernels[at] = calloc(1, sizeof(Kernel));
        kernels[at]->function = function;
    }
    return kernels[at];
}
static void name_kernel(const void *function, const char *name) {
    pthread_mutex_lock(&lock);
    strncpy(kernel_of(function)->name, name, sizeof(((Kernel *)0)->name) - 1);
    pthread_mutex_unlock(&lock);
}
static int launched(const void *function) {
    pthread_mutex_lock(&lock);
    const char *name = kernel_of(function)->name;
    pthread_mutex_unlock(&lock);
    count(&null_gpu_launches, name);
    return 0;
}

API int null_launch(const void *function) AS(cudaLaunchKernel);
API int null_launch(const void *function) { return launched(function); }
API int null_launch_13(const void *function) AS(__cudaLaunchKernel);
API int null_launch_13(const void *function) { return launched(function); }
API int null_launch_cooperative(const void *function) AS(cudaLaunchCooperativeKernel);
API int null_launch_cooperative(const void *function) { return launched(function); }
API int null_launch_ex(void *config, const void *function) AS(cudaLaunchKernelExC);
API int null_launch_ex(void *config, const void *function) { return launched(function); }
API int null_launch_driver(const void *function) AS(cuLaunchKernel);
API int null_launch_driver(const void *function) { return launched(function); }
API int null_launch_driver_ex(void *config, const void *function) AS(cuLaunchKernelEx);
API int null_launch_driver_ex(void *config, const void *function) { return launched(function); }

API void null_register(void **binary, const void *host, char *device, const char *name)
    AS(__cudaRegisterFunction);
API void null_register(void **binary, const void *host, char *device, const char *name) {
    name_kernel(host, name);
}
API void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
API int null_get_kernel(const void **out, const void *function) AS(__cudaGetKernel);
API int null_get_kernel(const void **out, const void *function) { *out = function; return 0; }
API int null_pop(dim3 *grid, dim3 *block, size_t *shared, void **stream)
    AS(__cudaPopCallConfiguration);
API int null_pop(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
    *grid = *block = (dim3){1, 1, 1};
    *shared = 0;
    *stream = NULL;
    return 0;
}
API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *out, const void *function) {
    memset(out, 0, sizeof *out);
    out->maxThreadsPerBlock = 1024;
    out->numRegs = 32;
    out->binaryVersion = out->ptxVersion = 90;
    out->maxDynamicSharedSizeBytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    return cudaSuccess;
}
API int null_occupancy(int *out) AS(cudaOccupancyMaxActiveBlocksPerMultiprocessor);
API int null_occupancy(int *out) { *out = 2; return 0; }
API int null_occupancy_flags(int *out) AS(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags);
API int null_occupancy_flags(int *out) { *out = 2; return 0; }
API cudaError_t cudaGetSymbolAddress(void **out, const void *symbol) {
    static char scratch[1 << 20];
    *out = scratch;
    return cudaSuccess;
}

/* ---- the driver */

static char context;
API CUresult cuDeviceGet(CUdevice *out, int number) { *out = number; return CUDA_SUCCESS; }
API CUresult cuDeviceGetCount(int *out) { *out = num_devices(); return CUDA_SUCCESS; }
API CUresult cuDeviceGetAttribute(int *out, CUdevice_attribute which, CUdevice device) {
    *out = attribute((int)which);
    return CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext *out) { *out = (CUcontext)&context; return CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxRetain(CUcontext *out, CUdevice device) {
    *out = (CUcontext)&context;
    return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}
API CUresult cuGetErrorString(CUresult error, const char **out) {
    *out = "error of the null GPU";
    return CUDA_SUCCESS;
}
API CUresult cuModuleLoad(CUmodule *out, const char *file) { *out = mark(0); return CUDA_SUCCESS; }
API CUresult cuModuleLoadData(CUmodule *out, const void *image) {
    *out = mark(0);
    return CUDA_SUCCESS;
}
API CUresult cuModuleGetFunction(CUfunction *out, CUmodule module, const char *name) {
    *out = mark(0);
    name_kernel(*out, name);
    return CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int *out, CUfunction_attribute which, CUfunction function) {
    *out = which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32
         : which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
API CUresult cuPointerGetAttribute(void *out, CUpointer_attribute which, CUdeviceptr p) {
    if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)out = p;
    else *(int *)out = 0;
    return CUDA_SUCCESS;
}
static int entry_point(const char *name, void **out, int *found) {
    *out = dlsym(RTLD_DEFAULT, name);
    if (found) *found = *out ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return 0;
}
API int null_entry_12(const char *name, void **out, unsigned long long flags, int *found)
    AS(cudaGetDriverEntryPoint);
API int null_entry_12(const char *name, void **out, unsigned long long flags, int *found) {
    return entry_point(name, out, found);
}
API int null_entry_13(const char *name, void **out, unsigned version, unsigned long long flags,
                      int *found) AS(cudaGetDriverEntryPointByVersion);
API int null_entry_13(const char *name, void **out, unsigned version, unsigned long long flags,
                      int *found) {
    return entry_point(name, out, found);
}

/* ---- cuBLAS and NCCL, whose arguments do not matter */

#define DO(name, action) API int null_##name() AS(name); API int null_##name() { action; return 0; }
#define NOTHING(name) DO(name, )
#define PRODUCT(name) DO(name, count(&null_gpu_products, #name))
#define COLLECTIVE(name) DO(name, count(&null_gpu_collectives, #name))
#define HANDLE(name) \
    API int null_##name(void **out) AS(name); \
    API int null_##name(void **out) { *out = mark(0); return 0; }
#define ZERO(name) \
    API int null_##name(void *of, int *out) AS(name); \
    API int null_##name(void *of, int *out) { *out = 0; return 0; }

HANDLE(cublasCreate_v2)
HANDLE(cublasLtMatmulDescCreate)
HANDLE(cublasLtMatmulPreferenceCreate)
HANDLE(cublasLtMatrixLayoutCreate)
ZERO(cublasGetMathMode)
ZERO(cublasGetPointerMode_v2)
API size_t cublasLtGetVersion(void) { return 130000; }
API int null_heuristic(void *handle, void *operation, void *a, void *b, void *c, void *d,
                       void *preference, int wanted, void *results, int *found)
    AS(cublasLtMatmulAlgoGetHeuristic);
API int null_heuristic(void *handle, void *operation, void *a, void *b, void *c, void *d,
                       void *preference, int wanted, void *results, int *found) {
    *found = 1;
    return 0;
}
PRODUCT(cublasLtMatmul) PRODUCT(cublasGemmEx) PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2) PRODUCT(cublasSgemmEx) PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemm_v2) PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgemv_v2) PRODUCT(cublasSdot_v2) PRODUCT(cublasDotEx)
NOTHING(cublasDestroy_v2) NOTHING(cublasSetStream_v2) NOTHING(cublasSetWorkspace_v2)
NOTHING(cublasSetMathMode) NOTHING(cublasSetPointerMode_v2)
NOTHING(cublasLtMatmulDescDestroy) NOTHING(cublasLtMatmulDescSetAttribute)
NOTHING(cublasLtMatmulPreferenceDestroy) NOTHING(cublasLtMatmulPreferenceSetAttribute)
NOTHING(cublasLtMatrixLayoutDestroy) NOTHING(cublasLtMatrixLayoutSetAttribute)

HANDLE(ncclCommInitRank)
HANDLE(ncclCommInitRankConfig)
ZERO(ncclCommGetAsyncError)
API int ncclGetVersion(int *out) { *out = 22809; return 0; }
API int ncclGetUniqueId(char *out) { memset(out, 1, 128); return 0; }
API const char *ncclGetErrorString(int error) { return "error of the null GPU"; }
API const char *ncclGetLastError(void *communicator) { return ""; }
API int ncclCommSplit(void *from, int color, int key, void **out) { *out = mark(0); return 0; }
API int ncclRedOpCreatePreMulSum(int *out) { *out = 0; return 0; }
COLLECTIVE(ncclAllReduce) COLLECTIVE(ncclReduceScatter) COLLECTIVE(ncclAllGather)
COLLECTIVE(ncclBroadcast) COLLECTIVE(ncclReduce) COLLECTIVE(ncclSend) COLLECTIVE(ncclRecv)
NOTHING(ncclGroupStart) NOTHING(ncclGroupEnd) NOTHING(ncclCommAbort) NOTHING(ncclCommDestroy)
NOTHING(ncclCommFinalize) NOTHING(ncclCommRegister) NOTHING(ncclCommDeregister)
NOTHING(ncclRedOpDestroy)

/* ---- what succeeds by doing nothing */

NOTHING(__cudaInitModule) NOTHING(__cudaPushCallConfiguration) NOTHING(__cudaRegisterFatBinaryEnd)
NOTHING(__cudaRegisterVar) NOTHING(__cudaUnregisterFatBinary)
NOTHING(cudaDeviceEnablePeerAccess) NOTHING(cudaEventQuery) NOTHING(cudaFuncSetAttribute)
NOTHING(cudaHostRegister) NOTHING(cudaHostUnregister) NOTHING(cudaMemcpyPeerAsync)
NOTHING(cudaMemcpyToSymbol) NOTHING(cudaProfilerStart) NOTHING(cudaProfilerStop)
NOTHING(cudaStreamDestroy) NOTHING(cudaStreamQuery) NOTHING(cudaStreamWaitEvent)
NOTHING(cudaThreadExchangeStreamCaptureMode)
NOTHING(cuInit) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxGetLimit) NOTHING(cuCtxSetLimit)
NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig) NOTHING(cuModuleUnload)
NOTHING(cuMemMap) NOTHING(cuMemUnmap) NOTHING(cuMemSetAccess)

/* ---- what is looked up together with the above, and not called */

NOTHING(cuMemExportToShareableHandle) NOTHING(cuMemImportFromShareableHandle)
NOTHING(cuMemRetainAllocationHandle) NOTHING(cuMemGetAllocationPropertiesFromHandle)
#undef cuStreamWriteValue32  /* the header renames it, the libraries do not */
NOTHING(cuMemsetD32Async) NOTHING(cuStreamWriteValue32)
