// llama.cpp's assertions as C++ exceptions, where llama.cpp itself or a caller can catch them.
#ifndef SX_ABORTS_H
#define SX_ABORTS_H

namespace sx {

// While one exists, a GGML_ABORT or GGML_ASSERT on the thread that made it throws std::runtime_error.
class abort_watch {
  public:
    abort_watch();
    ~abort_watch();
    abort_watch(const abort_watch &) = delete;
    abort_watch & operator=(const abort_watch &) = delete;
};

}  // namespace sx

#endif
