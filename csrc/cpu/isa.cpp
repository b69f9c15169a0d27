// Choice of the instruction set.
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace peftdyno {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
}

#if defined(PEFTDYNO_EMULATE_TILES)
bool has_amx() { return has_avx512_bf16(); }
#else
// CPUID leaf 7: AMX-BF16 is bit 22 and AMX-TILE bit 24 of EDX; the kernel must also grant the tile registers.
bool has_amx() {
  unsigned a = 7, b, c = 0, d;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const unsigned tiles = (1u << 22) | (1u << 24);
  if ((d & tiles) != tiles || !has_avx512_bf16()) return false;
  const long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
bool has_amx() { return false; }
#endif

const Kernels& named(const std::string& wanted) {
  struct Candidate {
    const char* name;
    bool (*available)();
    const Kernels* table;
  };
  const Candidate candidates[] = {
#if defined(__x86_64__)
      {"amx", has_amx, &amx::table},
      {"avx512_bf16", has_avx512_bf16, &avx512_bf16::table},
      {"avx512", has_avx512, &avx512::table},
      {"avx2", has_avx2, &avx2::table},
#endif
      {"portable", [] { return true; }, &portable::table},
  };
  std::string names;
  for (const Candidate& c : candidates) {
    names += names.empty() ? c.name : std::string(", ") + c.name;
    if (!wanted.empty() && wanted != c.name) continue;
    if (c.available()) return *c.table;
    if (!wanted.empty()) throw std::runtime_error("instruction set '" + wanted + "': this processor does not have it");
  }
  throw std::runtime_error("instruction set '" + wanted + "' is not one of " + names);
}

std::atomic<const Kernels*> in_force{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* chosen = in_force.load(std::memory_order_relaxed);
  if (chosen != nullptr) return *chosen;
  const char* wanted = std::getenv("PEFTDYNO_ISA");
  use_isa(wanted == nullptr ? "" : wanted);
  return *in_force.load(std::memory_order_relaxed);
}

void use_isa(const char* name) {
  in_force.store(&named(name), std::memory_order_relaxed);
}

}  // namespace peftdyno
