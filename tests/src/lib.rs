//! The published test kit of hapax.
