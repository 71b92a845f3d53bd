"""CUDA C++: each `name.cu` here is compiled on first use (`build`) and called through `ctypes` (`library`)."""
