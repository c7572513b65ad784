/* Stands in for the driver library where there is no GPU, so that TVM's CUDA module can be loaded to compile.
   Every entry answers CUDA_ERROR_NO_DEVICE (100): nothing can run. */
#define NO_DEVICE(name) \
  int name(void) { return 100; }
NO_DEVICE(cuDeviceGetName)
NO_DEVICE(cuFuncSetAttribute)
NO_DEVICE(cuGetErrorName)
NO_DEVICE(cuGetErrorString)
NO_DEVICE(cuLaunchKernelEx)
NO_DEVICE(cuModuleGetFunction)
NO_DEVICE(cuModuleLoadData)
NO_DEVICE(cuModuleUnload)
NO_DEVICE(cuTensorMapEncodeTiled)
