// Runs a compiled artifact without Python: for boards and for emulators.
//
//   runner PLAN
//
// PLAN is a text file of lines; every path is the rest of its line:
//   module PATH                    the shared object
//   weights PATH                   the blob that holds the parameters
//   param OFFSET DTYPE NDIM DIM…   one parameter of the tuple, in order
//   input DTYPE NDIM DIM… PATH     one input, raw little-endian, in order
//   outputs PREFIX                 output i is written to PREFIX<i>.bin, its type to PREFIX<i>.txt
//   repeat N                       timed runs after the first; their milliseconds go to standard output
//   allocator N                    TVM's number: 2 keeps memory for later (the default), 1 gives it back at once
//
// Links against libtvm_ffi and libtvm_runtime alone.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

struct HeapAlloc {
  void AllocData(DLTensor* tensor) {
    size_t bytes = ffi::GetDataSize(*tensor);
    if (posix_memalign(&tensor->data, 64, bytes ? bytes : 1)) throw std::bad_alloc();
  }
  void FreeData(DLTensor* tensor) { free(tensor->data); }
};

// A view into the mapped weight blob, which outlives every tensor.
struct MappedView {
  char* address;
  void AllocData(DLTensor* tensor) { tensor->data = address; }
  void FreeData(DLTensor*) {}
};

static DLDataType ParseType(const std::string& name) {
  if (name == "bool") return DLDataType{kDLBool, 8, 1};
  struct Kind { const char* prefix; uint8_t code; };
  for (Kind kind : {Kind{"float", kDLFloat}, Kind{"bfloat", kDLBfloat}, Kind{"uint", kDLUInt}, Kind{"int", kDLInt}}) {
    std::string prefix = kind.prefix;
    if (name.rfind(prefix, 0) == 0)
      return DLDataType{kind.code, static_cast<uint8_t>(atoi(name.c_str() + prefix.size())), 1};
  }
  throw std::runtime_error("unknown dtype " + name);
}

static std::vector<int64_t> ReadShape(std::istream& in) {
  int rank;
  in >> rank;
  std::vector<int64_t> shape(rank);
  for (int64_t& dim : shape) in >> dim;
  return shape;
}

static std::string RestOfLine(std::istream& in) {
  std::string rest;
  std::getline(in >> std::ws, rest);
  return rest;
}

static char* MapFile(const std::string& path) {
  int file = open(path.c_str(), O_RDONLY);
  struct stat info;
  if (file < 0 || fstat(file, &info) != 0) throw std::runtime_error("cannot open " + path);
  if (info.st_size == 0) return nullptr;
  void* address = mmap(nullptr, info.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
  if (address == MAP_FAILED) throw std::runtime_error("cannot map " + path);
  return static_cast<char*>(address);
}

static ffi::Tensor ReadInput(std::istream& in) {
  std::string type;
  in >> type;
  std::vector<int64_t> shape = ReadShape(in);
  ffi::Tensor tensor =
      ffi::Tensor::FromNDAlloc(HeapAlloc(), ffi::Shape(shape), ParseType(type), DLDevice{kDLCPU, 0});
  std::string path = RestOfLine(in);
  std::ifstream file(path, std::ios::binary);
  size_t bytes = ffi::GetDataSize(tensor);
  if (!file.read(static_cast<char*>(tensor.data_ptr()), bytes)) throw std::runtime_error("short input file " + path);
  return tensor;
}

static void WriteOutput(const ffi::Tensor& tensor, const std::string& stem) {
  std::ofstream data(stem + ".bin", std::ios::binary);
  data.write(static_cast<const char*>(tensor.data_ptr()), ffi::GetDataSize(tensor));
  std::ofstream type(stem + ".txt");
  type << static_cast<int>(tensor.dtype().code) << ' ' << static_cast<int>(tensor.dtype().bits);
  for (int i = 0; i < tensor.ndim(); ++i) type << ' ' << tensor.size(i);
  if (!data || !type) throw std::runtime_error("cannot write " + stem);
}

static int Run(const char* plan_path) {
  std::ifstream plan(plan_path);
  std::string line, module_path, prefix;
  char* blob = nullptr;
  int repeat = 0, allocator = 2;
  std::vector<ffi::Any> arguments;
  ffi::Array<ffi::Tensor> parameters;
  while (std::getline(plan, line)) {
    std::istringstream in(line);
    std::string word;
    in >> word;
    if (word == "module") module_path = RestOfLine(in);
    else if (word == "weights") blob = MapFile(RestOfLine(in));
    else if (word == "outputs") prefix = RestOfLine(in);
    else if (word == "repeat") in >> repeat;
    else if (word == "allocator") in >> allocator;
    else if (word == "input") arguments.push_back(ReadInput(in));
    else if (word == "param") {
      int64_t offset;
      std::string type;
      in >> offset >> type;
      parameters.push_back(ffi::Tensor::FromNDAlloc(MappedView{blob + offset}, ffi::Shape(ReadShape(in)),
                                                    ParseType(type), DLDevice{kDLCPU, 0}));
    }
  }
  arguments.push_back(parameters);

  ffi::Module library = ffi::Module::LoadFromFile(module_path);
  ffi::Module vm = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  vm->GetFunction("vm_initialization").value()(static_cast<int>(kDLCPU), 0, allocator);
  ffi::Function entry = vm->GetFunction("main").value();

  std::vector<ffi::AnyView> views(arguments.begin(), arguments.end());
  ffi::Any result;
  for (int i = 0; i <= repeat; ++i) {
    auto start = std::chrono::steady_clock::now();
    entry.CallPacked(views.data(), static_cast<int>(views.size()), &result);
    double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    if (i > 0) std::printf("%.6f\n", ms);
  }
  if (auto single = result.try_cast<ffi::Tensor>()) {
    WriteOutput(*single, prefix + "0");
    return 0;
  }
  ffi::Array<ffi::Tensor> outputs = result.cast<ffi::Array<ffi::Tensor>>();
  for (size_t i = 0; i < outputs.size(); ++i) WriteOutput(outputs[i], prefix + std::to_string(i));
  return 0;
}

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: runner PLAN\n");
    return 2;
  }
  try {
    return Run(argv[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "runner: %s\n", error.what());
    return 1;
  }
}
