// Checks and times the CUDA kernels of kernels/ by themselves, without Rust: the files that the crate compiles are
// included as they are. From the top of the repository:
//
//     mkdir -p target
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o target/kernels benches/kernels/main.cu -ldl
//     target/kernels check
//     target/kernels time
//
// -arch=sm_80 (and any later one) builds for other cards. `time`
// loads cuBLAS, 13 or 12, at run time.
//
//   common.cuh                  error checks, memory, the card
//   data.cuh, reference.cuh     weights and activations; what the kernels must give
//   launch.cuh                  a planned product
//   staged.cuh, pair.cuh        matrices in the layouts: packed, decoded, products planned
//   kquant.cuh                  matrices of GGUF files
//   code_of_pairs.h             the prefix code of `pair`
//   check.cuh, cases.cuh        mode `check`
//   timing.cuh, cublas.cuh,
//   time.cuh                    mode `time`
#include <cstring>

#include "cases.cuh"
#include "time.cuh"

using namespace bench;

static const char* const HELP =
    "Checks or times the CUDA kernels on the first card (CUDA_VISIBLE_DEVICES chooses another).\n"
    "\n"
    "  kernels check [LAYOUT] [--small]   decoded words against the weights, products against f64,\n"
    "                                     repeated launches against each other; exit status 1 on failure\n"
    "  kernels time [LAYOUT]              products beside cuBLAS, decoding and packing; nothing else\n"
    "                                     should use the card meanwhile\n"
    "\n"
    "LAYOUT     fixed, window, e4m3, e5m2, int8, int5, int4, pair, q4_k and so on, int4_g128 (AWQ,\n"
    "           GPTQ), or integers for the three int, kquants for the formats of GGUF files; all of\n"
    "           them if absent\n"
    "--small    a few small matrices only, for compute-sanitizer\n"
    "--help     this\n"
    "\n"
    "Times are microseconds a launch, medians over replays of a graph of launches that read copies in turn\n"
    "which no cache holds. x cuBLAS is cuBLAS's time on the dense bf16 matrix over the kernel's.\n";

static int misused(const char* what, const char* argument) {
  fprintf(stderr, "%s `%s`\n\n%s", what, argument, HELP);
  return 2;
}

// Calls use(a null pointer of the type) for the matrices of each layout that is asked for; false if it is none.
template <class Use>
static bool each_layout(const char* name, const Use& use) {
  bool found = false;
  const auto offer = [&](auto* matrix, int family) {
    const char* own = std::remove_pointer_t<decltype(matrix)>::NAME;
    const char* const families[] = {"", "integers", "kquants"};
    if (strcmp(name, "all") && strcmp(name, own) && strcmp(name, families[family])) return;
    found = true;
    use(matrix);
  };
  offer((Staged<Fixed>*)nullptr, 0);
  offer((Staged<Window>*)nullptr, 0);
  offer((Staged<E4M3>*)nullptr, 0);
  offer((Staged<E5M2>*)nullptr, 0);
  offer((Staged<Int8>*)nullptr, 1);
  offer((Staged<IntN<5>>*)nullptr, 1);
  offer((Staged<IntN<4>>*)nullptr, 1);
  offer((PairMatrix*)nullptr, 0);
  offer((KQuantMatrix<LayoutQ4K>*)nullptr, 2);
  offer((KQuantMatrix<LayoutQ5K>*)nullptr, 2);
  offer((KQuantMatrix<LayoutQ6K>*)nullptr, 2);
  offer((KQuantMatrix<LayoutQ80>*)nullptr, 2);
  offer((KQuantMatrix<LayoutQ2K>*)nullptr, 2);
  offer((KQuantMatrix<LayoutQ3K>*)nullptr, 2);
  offer((KQuantMatrix<LayoutQ40>*)nullptr, 2);
  offer((KQuantMatrix<LayoutQ41>*)nullptr, 2);
  offer((KQuantMatrix<LayoutQ50>*)nullptr, 2);
  offer((KQuantMatrix<LayoutQ51>*)nullptr, 2);
  offer((KQuantMatrix<LayoutInt4G128>*)nullptr, 0);
  return found;
}

int main(int argc, char** argv) {
  const char *mode = nullptr, *layout = "all";
  bool small = false, layout_given = false;
  for (int i = 1; i < argc; i++) {
    const char* argument = argv[i];
    if (!strcmp(argument, "--help") || !strcmp(argument, "-h")) return fputs(HELP, stdout), 0;
    if (!strcmp(argument, "--small"))
      small = true;
    else if (argument[0] == '-')
      return misused("unknown option", argument);
    else if (!mode)
      mode = argument;
    else if (!layout_given)
      layout = argument, layout_given = true;
    else
      return misused("one argument too many:", argument);
  }
  if (!mode) return fputs(HELP, stderr), 2;
  const bool timed = !strcmp(mode, "time");
  if (!timed && strcmp(mode, "check")) return misused("unknown mode", mode);
  if (timed && small) return misused("mode time has no", "--small");
  if (!each_layout(layout, [](auto*) {})) return misused("unknown layout", layout);

  setvbuf(stdout, nullptr, _IOLBF, 0);  // a long run shows its lines as they come, into a file too
  const Device device;
  if (timed) {
    const Cublas cublas;
    each_layout(layout, [&](auto* matrix) { time_layout<std::remove_pointer_t<decltype(matrix)>>(device, cublas); });
    return 0;
  }
  Tally tally;
  each_layout(layout,
              [&](auto* matrix) { check_layout<std::remove_pointer_t<decltype(matrix)>>(device, small, tally); });
  CUDA(cudaDeviceSynchronize());
  printf("%d checks, %d failures, %d skipped (stages that do not fit this card's shared memory)\n", tally.checks,
         tally.failures, tally.skipped);
  return tally.failures != 0;
}
