// Calls one function of a library of kernels, in a process of its own: aarch64_driver LIBRARY < request > answer.
//
// The request, in integers of 64 bits: the lengths of the function's name and of its arguments, the numbers of buffers
// and of pointers, the floating-point control of the threads before the call, and their number; the name; the
// arguments; of every pointer where it stands in the arguments, its buffer and its byte there; of every buffer its
// length, then its bytes. The answer: what the function returned, the control of every thread after the call, and the
// buffers.
#include <dlfcn.h>
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>
#include <vector>

namespace {

[[noreturn]] void fail(const char* reason) {
    fprintf(stderr, "%s\n", reason);
    exit(1);
}

void take(void* to, size_t bytes) {
    if (fread(to, 1, bytes, stdin) != bytes) fail("the request is too short");
}

std::vector<int64_t> take_integers(size_t count) {
    std::vector<int64_t> numbers(count);
    take(numbers.data(), count * sizeof(int64_t));
    return numbers;
}

struct Buffer {
    char* data;
    size_t bytes;
};

// Memory that ends where a page begins that may not be touched.
Buffer guarded(size_t bytes) {
    const size_t page = sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page;
    char* const start = (char*)mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || mprotect(start + room, page, PROT_NONE)) fail("no memory");
    return {start + room - bytes, bytes};
}

int64_t control() {
    uint64_t now;
    asm volatile("mrs %0, fpcr" : "=r"(now));
    return now;
}

}  // namespace

int main(int, char** arguments) {
    void* const library = dlopen(arguments[1], RTLD_NOW);
    if (!library) fail(dlerror());
    const std::vector<int64_t> header = take_integers(6);
    std::string name(header[0], 0);
    take(&name[0], name.size());
    const auto function = (int (*)(const void*))dlsym(library, name.c_str());
    if (!function) fail(dlerror());
    Buffer own = guarded(header[1]);
    take(own.data, own.bytes);
    const std::vector<int64_t> pointers = take_integers(3 * header[3]);
    std::vector<Buffer> buffers;
    for (int64_t i = 0; i < header[2]; i++) {
        buffers.push_back(guarded(take_integers(1)[0]));
        take(buffers[i].data, buffers[i].bytes);
    }
    for (size_t i = 0; i < pointers.size(); i += 3) {
        char* const address = buffers[pointers[i + 1]].data + pointers[i + 2];
        memcpy(own.data + pointers[i], &address, sizeof(address));
    }

    const int threads = header[5];
    omp_set_dynamic(0);
    std::vector<int64_t> answer(1 + threads);
#pragma omp parallel num_threads(threads)
    asm volatile("msr fpcr, %0" : : "r"(header[4]));
    answer[0] = function(own.data);
#pragma omp parallel num_threads(threads)
    answer[1 + omp_get_thread_num()] = control();

    fwrite(answer.data(), sizeof(int64_t), answer.size(), stdout);
    for (const Buffer& buffer : buffers) fwrite(buffer.data, 1, buffer.bytes, stdout);
    return 0;
}
