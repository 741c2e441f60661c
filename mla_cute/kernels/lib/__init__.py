"""What the kernels share: loads of pages, the ring, row maps, softmax, partial rows, barriers, PTX, e4m3."""
