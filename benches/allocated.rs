//! The allocator, and what it gave out where the feature `count-allocations` counts it.

#[cfg(feature = "count-allocations")]
#[global_allocator]
static COUNTED: &stats_alloc::StatsAlloc<std::alloc::System> = &stats_alloc::INSTRUMENTED_SYSTEM;

#[cfg(all(feature = "mimalloc", not(feature = "count-allocations")))]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Which allocator it is, for the top of a report.
pub const NAME: &str = if cfg!(all(feature = "mimalloc", not(feature = "count-allocations"))) {
    "mimalloc"
} else {
    "the system's allocator"
};

/// Allocations since the start; none where they are not counted.
pub fn count() -> Option<usize> {
    #[cfg(feature = "count-allocations")]
    return Some(COUNTED.stats().allocations);
    #[cfg(not(feature = "count-allocations"))]
    None
}

/// Bytes in use; none where they are not counted.
pub fn bytes() -> Option<usize> {
    #[cfg(feature = "count-allocations")]
    return Some(COUNTED.stats()).map(|stats| stats.bytes_allocated.saturating_sub(stats.bytes_deallocated));
    #[cfg(not(feature = "count-allocations"))]
    None
}
