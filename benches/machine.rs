//! The machine that was measured on, for the top of a report.

use std::fmt;
use std::fs::read_to_string;

use crate::allocated;

/// Cores, model, kernel, the allocator, and how busy it is with other work.
#[derive(Clone, Debug)]
pub struct Machine {
    cores: usize,
    model: String,
    kernel: String,
    load: String,
}

impl Machine {
    /// This one, as Linux tells; what it does not tell is called unknown.
    pub fn this() -> Self {
        let unknown = || "unknown".to_owned();
        let cpus = read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        Self {
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            model: model.map_or_else(unknown, |(_, model)| model.trim().to_owned()),
            kernel: read_to_string("/proc/sys/kernel/osrelease").map_or_else(|_| unknown(), |text| text.trim().into()),
            load: load(),
        }
    }
}

/// The load average of the last minute: above the number of cores, others are at work too and figures are worse.
pub fn load() -> String {
    let text = read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().unwrap_or("unknown").to_owned()
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cores, model, kernel, load } = self;
        write!(f, "{cores} cores, {model}, Linux {kernel}, {}, load average {load}", allocated::NAME)
    }
}
