//! Nothing here: the benchmarks are the targets of this package.
