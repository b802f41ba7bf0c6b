//! What was measured: medians over rounds, and the same figures for a program to read.

use std::fmt::Write as _;
use std::path::Path;

/// Middle, smallest and largest of repeated measurements. The middle is what is reported: others work on the machine
/// too, and what they take makes a round slower, never faster.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    /// The middle one.
    pub median: f64,
    /// The smallest.
    pub least: f64,
    /// The largest.
    pub most: f64,
}

impl Spread {
    /// Of at least one measurement.
    pub fn of(measured: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = measured.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        Self { median: sorted[sorted.len() / 2], least: sorted[0], most: sorted[sorted.len() - 1] }
    }
}

/// The value below which `share` of `sorted` lie.
pub fn percentile(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}

/// Figures by name, in the order in which they came.
#[derive(Clone, Debug, Default)]
pub struct Figures(Vec<(String, f64)>);

impl Figures {
    /// Notes one.
    pub fn note(&mut self, case: &str, what: &str, value: f64) {
        self.0.push((format!("{case}.{what}"), value));
    }

    /// Writes them as one JSON object, where a file was asked for.
    pub fn write(&self, file: Option<&Path>) -> std::io::Result<()> {
        let Some(file) = file else { return Ok(()) };
        let mut text = String::from("{");
        for (index, (name, value)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            // Names are ours: letters, digits, dots, dashes.
            let _infallible = write!(text, "{comma}\n  \"{name}\": {value:.3}");
        }
        text.push_str("\n}\n");
        std::fs::write(file, text)
    }
}
