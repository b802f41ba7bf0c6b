//! What tests and simulations do to a group that no consumer could ask for: copies and disorder, from a seed.

/// Off unless a test pulls them.
#[derive(Debug, Default)]
pub(super) struct Levers {
    duplicates: usize,
    shuffle: Option<u64>,
}

impl Levers {
    pub(super) fn duplicate(&mut self, deliveries: usize) {
        self.duplicates = deliveries;
    }

    pub(super) fn shuffle(&mut self, seed: Option<u64>) {
        self.shuffle = seed;
    }

    pub(super) fn shuffles(&self) -> bool {
        self.shuffle.is_some()
    }

    /// Whether the delivery that is going out is to be followed by a copy.
    pub(super) fn take_duplicate(&mut self) -> bool {
        let takes = self.duplicates > 0;
        self.duplicates -= usize::from(takes);
        takes
    }

    /// Which of `waiting` goes out next, where the order is shuffled.
    pub(super) fn choose(&mut self, waiting: usize) -> Option<usize> {
        let state = self.shuffle.as_mut().filter(|_| waiting > 0)?;
        // SplitMix64 (Steele, Lea, Flood 2014): short, seeded, the same on every machine.
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Some(((z ^ (z >> 31)) % waiting as u64) as usize)
    }
}
