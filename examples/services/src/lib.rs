//! Nothing: this package is its examples.
